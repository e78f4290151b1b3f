"""What `train` refuses before it encodes a dataset, which may take hours, and what the commands do not read."""

from __future__ import annotations

import json
import logging
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dopsd_core.__main__ import main
from dopsd_core.arguments import config_from_args, parse_args
from dopsd_core.config import TrainConfig
from dopsd_core.data.dataset import read_dataset
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.families import get_family
from dopsd_core.files.lock import FolderLock
from dopsd_core.standalone import training
from dopsd_core.standalone.beforehand import check_beforehand
from dopsd_core.standalone.chosen import view_of
from dopsd_core.standalone.hosts.model import DemoHostModel
from dopsd_core.standalone.model_options import ModelOptions
from dopsd_core.standalone.prepared import first_then_others
from dopsd_core.training import training_set
from dopsd_core.training.trainer import PeerError
from dopsd_core.training.world import Peers
from tests.ranks import ThreadWorld, on_threads

SHORT = ("--steps", "2", "--warmup", "0", "--probe-every", "0", "--batch-size", "1", "--track", "none")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, and run/ of two steps on them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    write_dataset(make_concept(0), folder / "photos")
    assert main(training_of(folder, folder / "run")) == 0
    return folder


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("the dataset was encoded")

    monkeypatch.setattr(training_set, "encode_dataset", refuse)


def training_of(place: Path, output: Path, *words: str, trigger: str = "[V7]") -> list[str]:
    return ["train", str(place / "photos"), "--output", str(output), "--trigger", trigger, *SHORT, *words]


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 1
    return capsys.readouterr().err


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--targets", "nothing"), "target 'nothing' matches none of the network's"),
        (("--optimizer", "custom", "--custom-path", "nowhere.Lion"), "nowhere.Lion"),
    ],
)
def test_what_does_not_fit_the_network_or_this_machine(
    place: Path,
    tmp_path: Path,
    no_encoding: None,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    assert message in error_of(training_of(place, tmp_path / "new", *words), capsys)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "remark"),
    [
        (("--save-every", "1"), "which of the LoRA files is the best will not be known: give --heldout-caption"),
        (
            ("--stop-at-plateau", "2", "--probe-every", "1"),
            "the run will not stop at a plateau, since no gap is measured",
        ),
        (("--heldout-caption", "[V7], red"), "the held-out caption is not measured: probe_every is 0"),
        (
            ("--save-every", "1", "--probe-every", "0"),
            "which of the LoRA files is the best will not be known: give --heldout-caption and set --probe-every",
        ),
        (
            ("--stop-at-plateau", "2", "--probe-every", "0"),
            "the run will not stop at a plateau, since no gap is measured: give --heldout-caption and set --probe-",
        ),
        (("--keep-loras", "2"), "keep_loras 2 is not used: save_every is 0"),
        (("--small-first", "2"), "small_first 2 is not used: there is only one resolution"),
        (
            ("--small-first", "2", "--steps", "2", "--resolutions", "32", "64"),
            "small_first (2) leaves none of the 2 steps for the largest resolution: lower it or raise steps",
        ),
    ],
)
def test_what_will_not_be_measured_is_said_first(
    place: Path,
    tmp_path: Path,
    no_encoding: None,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    remark: str,
) -> None:
    with pytest.raises(AssertionError, match="the dataset was encoded"):
        main(training_of(place, tmp_path / "new", *words))
    assert f"warning: {remark}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--objective", "sft"), "objective sft trains on the images"),
        (("--objective", "dreambooth"), "objective dreambooth trains on the images"),
        (("--objective", "pso"), "objective pso trains on the images"),
        (("--regression-target", "ground_truth"), "dopsd with regression_target ground_truth trains on the images"),
        (("--states", "teacher", "--regression-target", "ground_truth"), "ground_truth trains on the images"),
    ],
)
def test_a_slider_whose_words_the_objective_ignores(
    place: Path,
    tmp_path: Path,
    no_encoding: None,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    named: str,
) -> None:
    slider = ("--teacher-view", "words", "--teacher-sentence", "badge -> red badge")
    assert named in error_of(training_of(place, tmp_path / "new", *slider, *words), capsys)
    assert not (tmp_path / "new").exists()


def test_a_slider_is_not_asked_for_masks(
    place: Path, tmp_path: Path, no_encoding: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """It sees no image, so drawing them would be in vain."""
    slider = ("--teacher-view", "words", "--teacher-sentence", "badge -> red badge", "--teacher-background", "blur")
    new = tmp_path / "new"
    assert "sees no image: set teacher_background to keep" in error_of(training_of(place, new, *slider), capsys)


@pytest.mark.parametrize(("given", "word"), [("sks", "sks"), ("", "ohwx")])
def test_the_trigger_stands_in_the_teachers_sentence_as_in_captions(tmp_path: Path, given: str, word: str) -> None:
    write_dataset(make_concept(0), tmp_path / "photos")
    if not given:
        (tmp_path / "photos" / "trigger.txt").write_text("ohwx", encoding="utf-8")
    slider = ("--teacher-view", "words", "--teacher-sentence", "a [V] -> an old [v]")
    args = parse_args(training_of(tmp_path, tmp_path / "run", *slider, trigger=given))
    report = read_dataset(args.dataset, pixel_budget=4096, multiple=16, trigger=given)
    view = view_of(args, get_family("z_image"), report, ModelOptions.of(args))
    assert view.replaces == (f"a {word}", f"an old {word}")
    assert all(view.teaches(pair.captions[0]) for pair in report.pairs)


def test_an_adapter_that_needs_weights_which_will_be_packed(tmp_path: Path) -> None:
    args = parse_args(training_of(tmp_path, tmp_path / "run", "--adapter", "dora", "--quantise", "torchao-int8"))
    with pytest.raises(ValueError, match="dora needs the values of the weights, which --quantise torchao-int8 packs"):
        check_beforehand(args, _config(args), DemoHostModel(), "photos", Peers())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seed", "7"), "run contains a different run; choose another folder, or undo what changed: seed: 0 -> 7"),
        (("--model", "demo-undistilled", "--objective", "sft"), "undo what changed: "),
        (("--fresh",), "run already contains a run; resume it, or choose another folder"),
        (("--steps", "1"), "run is already at step 2; raise steps (1)"),
    ],
)
def test_a_folder_with_another_run(
    place: Path, no_encoding: None, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert message in error_of(training_of(place, place / "run", *words), capsys)


def test_another_model_in_the_folder(
    place: Path, no_encoding: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DemoHostModel, "fingerprint", "another")
    error = error_of(training_of(place, place / "run"), capsys)
    assert "undo what changed: the model: its weights or patches" in error


def _brightened(photos: Path) -> None:
    image = sorted(photos.glob("*.png"))[1]
    Image.open(image).point(lambda value: 255 - value).save(image)


def _recaptioned(photos: Path) -> None:
    sorted(photos.glob("*.txt"))[1].write_text("a [V] badge on a table", encoding="utf-8")


def _one_less(photos: Path) -> None:
    sorted(photos.glob("*.png"))[0].unlink()


@pytest.mark.parametrize("change", [_brightened, _recaptioned, _one_less])
def test_another_dataset_in_the_folder(
    place: Path, tmp_path: Path, no_encoding: None, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None]
) -> None:
    """Its files are compared, not their names: a copy of it still resumes."""
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "photos", tmp_path / "photos")
    for file in (tmp_path / "photos").iterdir():
        file.rename(file.with_name(f"a-{file.name}"))
    words = training_of(tmp_path, tmp_path / "run")
    with pytest.raises(AssertionError, match="the dataset was encoded"):
        main(words)
    change(tmp_path / "photos")
    assert "undo what changed: the dataset or how it is read: its images" in error_of(words, capsys)


def test_a_folder_that_another_run_uses(
    place: Path, no_encoding: None, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    lock = FolderLock(place / "run")
    lock.acquire()
    try:
        assert "another run is using" in error_of(training_of(place, place / "run"), capsys)
    finally:
        lock.release()


def test_a_run_without_anchors_still_resumes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its configuration has none, since no caption gives any; that is known only when they are encoded."""
    words = training_of(place, tmp_path / "run", trigger="elsewhere")
    for text in (place / "photos").glob("*.txt"):  # without [V], which the trigger would replace
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / text.name).write_text("a badge on a lawn", encoding="utf-8")
        image = text.with_suffix(".png")
        (tmp_path / "photos" / image.name).write_bytes(image.read_bytes())
    words[1] = str(tmp_path / "photos")
    assert main(words) == 0
    assert "anchor_probability is set to 0" in capsys.readouterr().out
    assert main([*words, "--steps", "3"]) == 0
    assert "3 steps" in capsys.readouterr().out


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "dataset", "message"),
    [
        (("--preview-prompts", "a badge"), "photos", "disagree about --preview-prompts"),
        (("--heldout-caption", "a badge"), "photos", "disagree about --heldout-caption"),
        (("--seed", "3"), "photos", "disagree about the configuration"),
        ((), "others", "disagree about the dataset"),
    ],
)
def test_ranks_that_disagree(tmp_path: Path, words: tuple[str, ...], dataset: str, message: str) -> None:
    """Each would encode first, or draw other previews and wait for the others inside them."""

    def work(world: ThreadWorld) -> None:
        given = training_of(tmp_path, tmp_path / "run", "--grad-accumulation", "2", *(words if world.rank else ()))
        args = parse_args(given)
        check_beforehand(args, _config(args), DemoHostModel(), dataset if world.rank else "photos", Peers(world))

    results = on_threads(2, work)
    assert all(isinstance(result, ValueError) and message in str(result) for result in results), results
    assert not (tmp_path / "run").exists()


def test_ranks_may_have_their_own_paths_and_devices(tmp_path: Path) -> None:
    def work(world: ThreadWorld) -> str:
        own = ("--device", "cpu", "--threads", str(1 + world.rank), "--grad-accumulation", "2")
        args = parse_args(training_of(tmp_path / str(world.rank), tmp_path / f"run{world.rank}", *own))
        check_beforehand(args, _config(args), DemoHostModel(), "photos", Peers(world))
        return "fits"

    assert on_threads(2, work) == ["fits", "fits"]


def test_batches_that_the_ranks_cannot_share(tmp_path: Path) -> None:
    def work(world: ThreadWorld) -> None:
        args = parse_args(training_of(tmp_path, tmp_path / "run", "--grad-accumulation", "3"))
        check_beforehand(args, _config(args), DemoHostModel(), "photos", Peers(world))

    assert all("which 2 processes cannot share equally" in str(result) for result in on_threads(2, work))


def _config(args: Any) -> TrainConfig:
    from dopsd_core.demo.settings import demo_config

    return config_from_args(args, demo_config())


def test_rank_0_encodes_first() -> None:
    """Then the others find in the cache what it encoded."""
    events: list[tuple[str, int]] = []

    def work(world: ThreadWorld) -> None:
        def encode() -> None:
            events.append(("begins", world.rank))
            time.sleep(0.02)
            events.append(("ends", world.rank))

        first_then_others(Peers(world), encode)

    on_threads(2, work)
    assert events == [("begins", 0), ("ends", 0), ("begins", 1), ("ends", 1)]


def test_a_tracker_that_cannot_be_started_ends_all_ranks(
    place: Path, tmp_path: Path, no_encoding: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = threading.local()

    @contextmanager
    def joined(on_cpu: bool) -> Iterator[Any]:
        yield here.world

    def fail(names: Any, *args: Any) -> Any:
        raise ValueError("--track wandb cannot be started: no login")

    monkeypatch.setattr(logging.getLogger("dopsd"), "setLevel", lambda level: None)  # all ranks of this test share it
    monkeypatch.setattr(training, "joined_world", joined)
    monkeypatch.setattr(training, "chosen_trackers", lambda names: ("wandb",))
    monkeypatch.setattr(training, "open_tracking", fail)

    def work(world: ThreadWorld) -> None:
        here.world = world
        args = parse_args(training_of(place, tmp_path / "run", "--grad-accumulation", "2", "--track", "wandb"))
        args.train_config = _config(args)
        training.run_train(args)

    results = on_threads(2, work)
    assert [type(result) for result in results] == [ValueError, PeerError], results
    assert "process 0 of 2 failed: --track wandb cannot be started: no login" in str(results[1])


def test_a_launcher_is_for_train_and_encode(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others would draw and write everything as often as there are processes."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    error = error_of(["sample", "a badge"], capsys)
    assert "sample runs in one process, and a launcher started 4: leave out accelerate or torchrun" in error
    monkeypatch.setenv("WORLD_SIZE", "")
    assert main(["inspect-dataset", str(place / "photos"), "--model", "demo"]) == 0


# -- datasets that other commands read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "teacher-preview", "evaluate", "inspect-dataset"])
def test_tars_and_the_hub_are_for_encode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:  # fmt: skip
    (tmp_path / "a.txt").write_text("a badge", encoding="utf-8")
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(tmp_path / "a.txt", "a.txt")
    save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors")
    rest = {
        "train": ("--output", str(tmp_path / "run")),
        "evaluate": ("--lora", str(tmp_path / "lora.safetensors")),
    }.get(command, ())
    for name, what in ((str(tmp_path / "photos.tar"), "a WebDataset"), ("hf:some/photos", "a Hugging Face dataset")):
        error = error_of([command, name, *rest], capsys)
        assert f"{name} is {what}: write it as shards with encode first, and train on those" in error


@pytest.mark.parametrize("command", ["teacher-preview", "inspect-dataset"])
def test_shards_are_for_train(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"format": "dopsd-shards-1"}), encoding="utf-8")
    assert "is an encoded dataset, which only train reads" in error_of([command, str(tmp_path)], capsys)
