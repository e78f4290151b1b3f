"""The real command line on a small model in diffusers' layout, in processes of its own, alone and under launchers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dopsd_core.__main__ import main
from dopsd_core.adapters.lora_file import load_lora
from dopsd_core.config import TrainConfig
from dopsd_core.families import Z_IMAGE
from dopsd_core.standalone.hosts import parts, quantised
from dopsd_core.standalone.settings import family_config
from dopsd_core.training.checkpoint import load_checkpoint
from tests import model_folders

ROOT = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dopsd_core")
ACCELERATE = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "-m", "dopsd_core",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, vision/ and photos/."""
    folder = tmp_path_factory.mktemp("place")
    model_folders.write_z_image(folder / "model")
    model_folders.write_vision(folder / "vision")
    model_folders.write_photos(folder / "photos", "a [V] badge")
    return folder


def command(place: Path, name: str, *words: object, launcher: tuple[str, ...] = ("-m", "dopsd_core")) -> list[str]:
    model = ("--model", place / "model", "--vision", place / "vision", "--dtype", "fp32", "--device", "cpu")
    return [sys.executable, *launcher, name, *map(str, (*words, *model))]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def call(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)


def here(words: list[str], capsys: pytest.CaptureFixture[str]) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has imported everything."""
    code, said = main(words[3:]), capsys.readouterr()
    return subprocess.CompletedProcess(words, code, said.out, said.err)


def training(place: Path, output: Path, *words: object, launcher: tuple[str, ...] = ("-m", "dopsd_core")) -> list[str]:
    quick = (
        "--output", output, "--resolution", 64, "--rank", 4, "--rollout-steps", 2, "--grad-accumulation", 2,
        "--probe-every", 2, "--checkpoint-every", 2, "--threads", 1,
    )  # fmt: skip
    return command(place, "train", place / "photos", *quick, *words, launcher=launcher)


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A run of four steps in one process."""
    result = call(
        training(place, place / "run", "--steps", 4, "--preview-every", 4, "--trigger", "sks", "--save-every", 2)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 usable images" in result.stdout and "4 steps; LoRA:" in result.stdout
    return place / "run"


def student(folder: Path) -> torch.Tensor:
    checkpoint = load_checkpoint(folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 4
    return torch.cat([value.flatten() for _, value in sorted(checkpoint.lora.items())])


def test_train_writes_a_lora_of_the_family(trained: Path) -> None:
    tensors, facts = load_lora(trained / "lora.safetensors")
    assert {name.rpartition(".lora_")[0].split(".", 2)[2] for name in tensors} == set(Z_IMAGE.lora_targets)
    assert (
        facts["dopsd_base_model"] == "model" and facts["dopsd_trigger"] == "sks" and facts["dopsd_family"] == "z_image"
    )
    assert len(facts["dopsd_base_fingerprint"]) == 16 and facts["dopsd_teacher_sees"] == "vlm"
    config = TrainConfig.from_json((trained / "config.json").read_text(encoding="utf-8"))
    usual = family_config("z_image")
    assert config.optimizer == usual.optimizer and config.teacher == usual.teacher and config.family == "z_image"
    assert sorted(file.name for file in (trained / "previews").iterdir()) == ["step-000000.png", "step-000004.png"]


def test_sample_of_a_run_is_a_strip_of_its_steps(
    place: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("a [V] badge", "a lamp", "--output", place / "strip", "--size", 64, 64, "--steps", 1)
    result = here(command(place, "sample", *words, "--lora", trained), capsys)
    assert result.returncode == 0, result.stderr
    assert "strip.png: 2 prompts at 2 steps of run" in result.stdout
    sheet = Image.open(place / "strip" / "strip.png")
    assert sheet.width > 3 * 256 and sheet.height > 2 * 256  # the untouched model and two steps; two prompts
    result = here(command(place, "sample", "a lamp", "--output", place / "strip", "--lora", place / "photos"), capsys)
    assert result.returncode == 1 and "has no LoRA files along the way: train with --save-every" in result.stderr


def test_sample_and_teacher_preview(place: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = {}
    for name, words in (("without", ()), ("with", ("--lora", trained / "lora.safetensors"))):
        given = ("a [V] badge", "--output", place / name, "--size", 64, 96, *words)
        result = here(command(place, "sample", *given), capsys)
        assert result.returncode == 0, result.stderr
        images[name] = Image.open(place / name / "01_seed0.png")
    assert images["with"].size == (64, 96) and images["with"].tobytes() != images["without"].tobytes()
    sheet = place / "teacher.png"
    given = (place / "photos", "--output", sheet, "--resolution", 64, "--steps", 2)
    result = here(command(place, "teacher-preview", *given), capsys)
    assert result.returncode == 0, result.stderr
    assert Image.open(sheet).height > 3 * 64


@pytest.mark.long
def test_a_training_on_shards_is_the_one_on_the_folder(
    place: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Encoded by two processes with the real architectures; shards of another dtype are refused."""
    words = ("--output", tmp_path / "shards", "--trigger", "sks", "--resolution", 64, "--shard-size", 1)
    encoded = call(command(place, "encode", place / "photos", *words, launcher=TORCHRUN))
    assert encoded.returncode == 0 and "2 encoded images in 2 shards" in encoded.stdout, encoded.stderr
    on_shards = training(place, tmp_path / "run", "--steps", 4, "--preview-every", 4, "--save-every", 2)
    on_shards[4] = str(tmp_path / "shards")
    result = here(on_shards, capsys)
    assert result.returncode == 0, result.stderr
    assert torch.equal(student(tmp_path / "run"), student(trained))
    for sheet in (trained / "previews").iterdir():
        assert Image.open(tmp_path / "run" / "previews" / sheet.name).tobytes() == Image.open(sheet).tobytes()
    assert main([*on_shards[3:], "--dtype", "bf16"]) == 1
    assert "undo the model (its text encoder, vision tower or VAE, or their settings)" in capsys.readouterr().err


def test_evaluate_draws_the_model_with_the_lora(
    place: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measures that need no weights; the demo's judge is for the demo model alone."""
    words = ("--lora", trained / "lora.safetensors", "--resolution", 64, "--steps", 1, "--seeds", 1)
    prompts = ("--prompts", "a lamp", "a [V] cup")
    result = here(command(place, "evaluate", place / "photos", *words, "--output", tmp_path, *prompts), capsys)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report_card.json").read_text(encoding="utf-8"))
    assert list(report["measures"]) == ["sharpness", "sharpness_prior", "pixel_retention"]
    (distance,) = report["measures"]["pixel_retention"]["strengths"]["1"]["values"]
    assert distance > 0 and report["measures"]["sharpness_prior"]["prompts"] == ["a lamp"]
    assert Image.open(tmp_path / "report_card.png").width > 500


@pytest.mark.parametrize("command_name", ["evaluate", "sample"])
def test_a_lora_of_another_family_is_refused(
    place: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(parts, "_loaded", lambda *args, **kwargs: pytest.fail("a part was loaded"))
    tensors, facts = load_lora(trained / "lora.safetensors")
    save_file(tensors, tmp_path / "other.safetensors", {**facts, "dopsd_family": "krea2"})
    words = command(place, command_name, place / "photos", "--lora", tmp_path / "other.safetensors")
    assert main(words[3:]) == 1
    error = capsys.readouterr().err
    assert "other.safetensors is a LoRA of the family krea2, and --model" in error and "is a Z-Image" in error


def test_inspect_dataset_takes_the_models_sizes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-dataset", str(place / "photos"), "--model", str(place / "model")]) == 0
    assert "2 in bucket 1024x1024" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_make_the_same_run(place: Path, trained: Path, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    result = call(training(place, tmp_path, "--steps", 4, "--trigger", "sks", launcher=launcher))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.count("2 usable images") == result.stdout.count("4 steps; LoRA:") == 1
    assert "2 processes share the 2 batches of each step" in result.stdout
    ours, theirs = student(tmp_path), student(trained)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["grad_accumulation"] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM")
def test_sigterm_stops_and_the_same_command_resumes(place: Path, trained: Path, tmp_path: Path) -> None:
    words = training(place, tmp_path, "--steps", 4, "--trigger", "sks")
    started = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    log = tmp_path / "train.jsonl"
    while started.poll() is None and not (log.exists() and log.read_text(encoding="utf-8").count("\n") >= 2):
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    output = started.communicate(timeout=300)[0].decode()
    if started.returncode:  # it may have been too late
        assert started.returncode == 143 and "the same command resumes" in output
    assert call(words).returncode == 0
    assert torch.equal(student(tmp_path), student(trained))


def test_without_a_network_an_id_is_one_sentence(place: Path, tmp_path: Path) -> None:
    result = call([*training(place, tmp_path / "run", "--steps", 1), "--model", "no-such/model"])
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 1 and len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    assert lines[0].startswith("error: no-such/model cannot be downloaded"), lines
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "/no/such/folder"), "/no/such/folder does not exist"),
        (("--model", "{place}/photos"), "has no model_index.json"),
        (("--vision", "/no/such/folder"), "/no/such/folder does not exist; --vision takes"),
        (("--vision", "{place}/photos"), "photos has no safetensors files"),
        (("--vision", "{place}/model/vae"), "vae is not Qwen3-VL"),
        (("--quantise", "quanto-int8"), "needs optimum-quanto, which is not installed"),
        (("--teacher-view", "edit"), "has no teacher 'edit'"),
        (("--config", "{place}/klein.json"), "the configuration is for FLUX.2-klein and --model"),
        (("--steps", "0"), "steps is 0"),
        (("--activation-offloading", "--checkpoint-blocks", "1"), "each block keeps: leave --checkpoint-blocks out"),
    ],
)
def test_bad_input_is_one_sentence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(quantised, "_is_installed", lambda module: False)
    (place / "klein.json").write_text(family_config("flux2_klein").to_json(), encoding="utf-8")
    given = [word.format(place=place) for word in words]
    assert main([*training(place, tmp_path / "run", "--steps", 1)[3:], *given]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoints").exists()
