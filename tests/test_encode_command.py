"""The commands encode and train on the demo model: in several processes, killed, after changes, on bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from dopsd_core.__main__ import main
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.shards.index import INDEX, Index
from dopsd_core.shards.reader import Shards
from dopsd_core.shards.writer import read_rows
from dopsd_core.standalone.encoding import _Work
from dopsd_core.training.world import Peers
from tests.ranks import ThreadWorld
from tests.tiny import saved_bytes

ROOT = Path(__file__).parent.parent
ALONE = ("-m", "dopsd_core")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dopsd_core")
TRIGGER = ("--trigger", "[V7]")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ with five images, and shards/ of them in three shards."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    write_dataset(make_concept(0), folder / "photos")
    image = Image.new("RGB", (64, 48), "navy")
    image.paste("white", (10, 10, 40, 30))
    image.save(folder / "photos" / "wide.png")
    (folder / "photos" / "wide.txt").write_text("a [V] badge, wide", encoding="utf-8")
    assert main(encoding(folder, folder / "shards")) == 0
    return folder


def encoding(place: Path, output: Path, *words: object) -> list[str]:
    given = [place / "photos", "--output", output, "--shard-size", 2, *TRIGGER, "--heldout-caption", "a [V] star"]
    return ["encode", *map(str, (*given, *words))]


def training(dataset: Path, output: Path, *words: object) -> list[str]:
    given = [dataset, "--output", output, "--steps", 2, "--warmup", 0, "--batch-size", 1, "--grad-accumulation", 2]
    return ["train", *map(str, (*given, "--probe-every", 2, "--threads", 1, "--track", "none", *words))]


def call(words: list[str], launcher: tuple[str, ...] = ALONE) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *launcher, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def files(folder: Path) -> dict[str, bytes]:
    """The index, all rows, and the tensors without their header, whose order is random."""
    found = {}
    for file in sorted(folder.glob("*.*")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else 0
        found[file.name] = data[start:]
    return {name: data for name, data in found.items() if name != ".lock"}


# -- the same run ------------------------------------------------------------------------------------------------------


def test_a_training_on_shards_has_the_bits_of_one_on_the_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, optimizer, log and identity: the run may also be resumed on the other."""
    held = ("--heldout-caption", "a [V] star", *TRIGGER)
    assert main(training(place / "shards", tmp_path / "shards")) == 0
    assert "5 encoded images in 3 shards, 5 pairs" in capsys.readouterr().out
    assert main(training(place / "photos", tmp_path / "folder", *held)) == 0
    assert saved_bytes(tmp_path / "shards") == saved_bytes(tmp_path / "folder")
    logs = [(tmp_path / name / "train.jsonl").read_text(encoding="utf-8").splitlines() for name in ("shards", "folder")]
    for ours, theirs in zip(*map(lambda lines: map(json.loads, lines), logs), strict=True):
        for volatile in ("seconds", "ram_gb"):
            ours.pop(volatile, None)
            theirs.pop(volatile, None)
        assert ours == theirs
    states = [next((tmp_path / name / "checkpoints").glob("*/state.json")) for name in ("shards", "folder")]
    assert states[0].read_bytes() == states[1].read_bytes()


@pytest.mark.long
def test_two_processes_write_the_same_shards(place: Path, tmp_path: Path) -> None:
    result = call(encoding(place, tmp_path), TORCHRUN)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path) == files(place / "shards")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_part_is_read_by_one_process(tmp_path: Path, size: int) -> None:
    parts: list[int] = []

    class Source:
        parts = 5

        def count(self, some: Any) -> None:
            return None

        def chunks(self, part: int) -> Any:
            parts.append(part)
            return iter(())

    work = _Work(tmp_path, Source(), None, None, None, (), False, ())  # type: ignore[arg-type]
    shares = []
    for rank in range(size):
        work.encode(Peers(ThreadWorld(rank, size, None, [])))  # type: ignore[arg-type]  # it does not talk
        shares.append(len(parts))
    assert sorted(parts) == list(range(5)) and shares[0] == -(-5 // size)


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_kill_leaves_whole_shards_and_the_same_command_continues(place: Path, tmp_path: Path) -> None:
    words = [sys.executable, *ALONE, *encoding(place, tmp_path)]
    started = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while started.poll() is None and not list(tmp_path.glob("shard-*.json")):
        time.sleep(0.005)
    started.kill()
    started.wait()
    whole = [file for file in tmp_path.glob("shard-*.json") if read_rows(tmp_path, file.stem) is not None]
    assert whole == list(tmp_path.glob("shard-*.json"))
    before = {file: file.stat().st_mtime_ns for file in whole}
    assert main(encoding(place, tmp_path)) == 0
    assert files(tmp_path) == files(place / "shards")
    assert {file: file.stat().st_mtime_ns for file in before} == before, "what was whole is not encoded again"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_tar_of_the_same_images_gives_the_same_pairs(place: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for file in sorted((place / "photos").iterdir()):
            archive.add(file, file.name)
    words = encoding(place, tmp_path / "shards")
    words[1] = str(tmp_path / "photos.tar")
    assert main(words) == 0
    assert [name for name in files(tmp_path / "shards") if name.endswith("json")] == [
        INDEX, "shard-00000-00000.json", "shard-00000-00001.json", "shard-00000-00002.json",
    ]  # fmt: skip
    ours, theirs = (Shards(folder, Index.read(folder)) for folder in (tmp_path / "shards", place / "shards"))
    assert list(ours.described()) == list(theirs.described())
    for number in range(ours.num_pairs):
        assert torch.equal(ours.pair(number).teacher.features, theirs.pair(number).teacher.features)


def test_a_hugging_face_dataset_of_the_same_images_gives_the_same_pairs(place: Path, tmp_path: Path) -> None:
    images = sorted((place / "photos").glob("*.png"))
    rows = {
        "photo": [{"bytes": image.read_bytes(), "path": None} for image in images],
        "text": [image.with_suffix(".txt").read_text(encoding="utf-8") for image in images],
    }
    kinds = datasets.Features({"photo": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(str(tmp_path / "rows"))
    words = encoding(place, tmp_path / "shards")
    words[1] = f"hf:{tmp_path / 'rows'}"
    assert main(words) == 0
    ours, theirs = (Shards(folder, Index.read(folder)) for folder in (tmp_path / "shards", place / "shards"))
    assert list(ours.described()) == list(theirs.described())


# -- what changed ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    """A copy of photos/ and shards/ with the same times."""
    shutil.copytree(place / "photos", tmp_path / "photos")
    shutil.copytree(place / "shards", tmp_path / "shards")
    return tmp_path


def test_only_the_shard_of_a_changed_image_is_encoded_again(copied: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in (copied / "shards").glob("shard-*")}
    (copied / "photos" / "target_3.txt").write_text("a [V] badge, anew", encoding="utf-8")
    assert main(encoding(copied, copied / "shards")) == 0
    after = {file.name: file.stat().st_mtime_ns for file in (copied / "shards").glob("shard-*")}
    assert {name.partition(".")[0] for name in before if after[name] != before[name]} == {"shard-00001-00000"}


def test_errors_are_listed_at_the_end_and_may_be_left_out(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "photos" / "target_2.png").write_bytes(b"no image")
    shutil.rmtree(copied / "shards")
    assert main(encoding(copied, copied / "shards")) == 1
    error = capsys.readouterr().err
    assert "1 errors in the dataset" in error and "target_2.png" in error and "--skip-errors" in error
    assert not Index.read(copied / "shards").is_complete and len(list((copied / "shards").glob("shard-*.json"))) == 2
    assert main(encoding(copied, copied / "shards", "--skip-errors")) == 0
    output = capsys.readouterr().out
    assert "1 images were left out because of errors" in output and "4 encoded images in 3 shards" in output


# -- bad input ---------------------------------------------------------------------------------------------------------


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--trigger", "ohwx"), "undo --trigger ('[V7]', now 'ohwx')"),
        (("--resolution", "128"), "undo --resolution (64, now 128)"),
        (("--teacher-background", "blur"), "undo --teacher-background ('keep', now 'blur')"),
        (("--heldout-caption", "other"), "undo --heldout-caption ('a [V7] star', now 'other')"),
        (("--root", "."), "is an encoded dataset, and --root is for folders and JSONL files"),
        (("--resolutions", "64", "128"), "is an encoded dataset, and --resolutions needs the images"),
        (("--teacher-image", "other"), "--teacher-image other needs the images"),
        (("--preview-prompts", "x"), "--preview-prompts needs the images"),
        (("--caption-dropout", "0.5"), "caption_dropout is above 0, but no empty caption was encoded"),
    ],
)
def test_train_refuses_what_the_shards_are_not(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(training(place / "shards", tmp_path, *words)) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "checkpoints").exists()


def test_a_slider_in_shards(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slider = ("--teacher-view", "words", "--teacher-sentence", "[V] badge -> [V] red badge")
    words = [word.replace("star", "badge, low") for word in encoding(place, tmp_path / "shards", *slider)]
    message = "an empty caption has no words that the teacher words replaces: set caption_dropout to 0, and for sh"
    assert message in error_of([*words, "--empty-captions"], capsys)
    message = "the teacher words reads nothing else for the held-out caption 'a [V7] star'"
    assert message in error_of(encoding(place, tmp_path / "other", *slider), capsys)
    shutil.rmtree(tmp_path / "shards", ignore_errors=True)
    assert main(words) == 0
    assert Index.read(tmp_path / "shards").encoding.sentence == "[V7] badge -> [V7] red badge"
    sft = training(tmp_path / "shards", tmp_path / "run", "--objective", "sft")
    assert "the teacher words makes a slider, and objective sft trains on the images" in error_of(sft, capsys)
    assert main(training(tmp_path / "shards", tmp_path / "run", *slider)) == 0


def test_train_refuses_shards_of_another_model(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copied / "shards" / INDEX
    index = json.loads(file.read_bytes())
    index["encoding"]["encoder"] += "-finetuned"
    file.write_text(json.dumps(index), encoding="utf-8")
    error = error_of(training(copied / "shards", copied / "run"), capsys)
    assert "was encoded in another way" in error and "undo the model (its text encoder, vision tower or VAE" in error


def test_train_names_the_family_of_the_shards(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copied / "shards" / INDEX
    index = json.loads(file.read_bytes())
    index["encoding"]["family"] = "krea2"
    file.write_text(json.dumps(index), encoding="utf-8")
    error = error_of(training(copied / "shards", copied / "run"), capsys)
    assert "was encoded for Krea 2 Turbo, and --model demo is a Z-Image-Turbo: choose that model, or encode" in error


def test_train_refuses_shards_that_are_incomplete(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied / "shards"
    index = (folder / INDEX).read_bytes()
    (folder / INDEX).write_bytes(index[:100])
    assert "index.json is damaged" in error_of(training(folder, copied / "run"), capsys)
    (folder / INDEX).unlink()
    assert "has shards but no index.json: run encode again" in error_of(training(folder, copied / "run"), capsys)
    (folder / INDEX).write_bytes(index)
    (folder / "shard-00001-00000.safetensors").unlink()
    assert "shard-00001-00000.safetensors is missing" in error_of(training(folder, copied / "run"), capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--trigger", "ohwx"), "contains another encoding: choose another folder, or undo --trigger"),
        (("--heldout-caption", "a [V7] moon"), "or undo --heldout-caption"),
        (("--split", "test"), "--split is for Hugging Face datasets: write hf:"),
        (("--teacher-view", "edit"), "has no teacher 'edit'"),
    ],
)
def test_encode_refuses_bad_options(
    place: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    before = files(place / "shards")
    assert message in error_of(encoding(place, place / "shards", *words), capsys)
    assert files(place / "shards") == before


def test_a_caption_of_the_dataset_is_no_heldout_caption(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = encoding(place, tmp_path, "--heldout-caption", "a [V] badge, wide")
    assert "the held-out caption 'a [V7] badge, wide' is in the dataset" in error_of(words, capsys)
    assert not list(tmp_path.iterdir()), "it is read with the last images, whose shards before would be of no use"


def test_several_concepts_are_for_train_on_the_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard with images of one would leave the name of another in its captions without the name, the anchors."""
    for name in ("one", "two"):
        shutil.copytree(place / "photos", tmp_path / "photos" / name)
        (tmp_path / "photos" / name / "trigger.txt").write_text(name, encoding="utf-8")
    words = ["encode", str(tmp_path / "photos"), "--output", str(tmp_path / "out")]
    assert "has the concepts one, two, and shards have one: train on the folder itself" in error_of(words, capsys)
    shutil.rmtree(tmp_path / "photos" / "two")
    assert main(words) == 0
    assert Index.read(tmp_path / "out").encoding.trigger == "one"


def test_shards_of_another_encoding_are_encoded_again(copied: Path) -> None:
    """Where the index is lost that would refuse it, the shards say themselves how they were encoded."""
    (copied / "shards" / INDEX).unlink()
    assert main(encoding(copied, copied / "shards", "--trigger", "ohwx")) == 0
    index = Index.read(copied / "shards")
    captions = Shards(copied / "shards", index).captions(9)
    assert index.is_complete and all("ohwx" in text and "[V7]" not in text for text in captions)


def test_a_source_that_is_not_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 1
    assert "nowhere: is not there" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    words = ["encode", str(tmp_path / "empty"), "--output", str(tmp_path / "out")]
    assert "empty has no images" in error_of(words, capsys)


def test_a_place_that_cannot_be_written_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "photos" / "wide.png"
    assert f"{file} could not be written: Not a directory" in error_of(encoding(place, file), capsys)


@pytest.mark.long
def test_processes_with_different_datasets_are_refused(place: Path, tmp_path: Path) -> None:
    """As on two machines whose folders differ: here by the rank in the path."""
    for rank in ("0", "1"):
        shutil.copytree(place / "photos", tmp_path / f"photos{rank}")
    (tmp_path / "photos1" / "wide.txt").write_text("another caption", encoding="utf-8")
    script = tmp_path / "launched.py"
    script.write_text(
        "import os, sys\nfrom dopsd_core.__main__ import main\n"
        "sys.exit(main([word.replace('RANK', os.environ['RANK']) for word in sys.argv[1:]]))\n",
        encoding="utf-8",
    )
    words = ["encode", str(tmp_path / "photosRANK"), "--output", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, *TORCHRUN[:5], str(script), *words], cwd=ROOT, capture_output=True, text=True, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode != 0
    assert "error: the processes of this run disagree about the dataset" in result.stderr, result.stderr
    assert not list((tmp_path / "out").glob("shard-*"))
