"""What a node may read and write, tried as someone would who sends graphs over the network."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

ALLOWED_BY = "dopsd_datasets in extra_model_paths.yaml"


def write_pair(folder: Path, name: str = "a", colour: str = "red") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(f"a {colour} square")


@pytest.fixture
def paths(comfyui):
    return comfyui.module("nodes.comfy_host.paths")


@pytest.fixture
def extra(paths, tmp_path, monkeypatch) -> Path:
    """A folder of the owner's, "sets", allowed as main.py does it for extra_model_paths.yaml."""
    folder = tmp_path / "sets"
    write_pair(folder / "cats")
    monkeypatch.setitem(paths.folder_paths.folder_names_and_paths, paths.EXTRA, ([], set()))
    paths.folder_paths.add_model_folder_path(paths.EXTRA, str(folder))
    return folder


def test_choices_are_folders_with_images_and_row_files(comfyui, paths, extra) -> None:
    write_pair(comfyui.input / "nested" / "10_dogs")
    (comfyui.input / "empty" / "deep").mkdir(parents=True, exist_ok=True)
    write_pair(comfyui.input / ".hidden")
    (comfyui.input / "nested" / "rows.jsonl").write_text("{}")
    choices = paths.dataset_choices()
    assert choices[0] == paths.DEMO
    assert {"nested", "nested/10_dogs", "nested/rows.jsonl", "sets", "sets/cats"} <= set(choices)
    assert not {"empty", "empty/deep", ".hidden", ".", ""} & set(choices)
    for choice in choices:
        assert paths.resolve_dataset(choice).exists()


def test_the_owners_key_is_known_to_comfyui(comfyui, paths) -> None:
    assert paths.EXTRA == "dopsd_datasets" and paths.EXTRA in paths.folder_paths.folder_names_and_paths


@pytest.mark.parametrize(
    "choice",
    [
        "../secret", "..", "../../", "nested/../../secret", "/etc", "/", "//server/share", "\\\\server\\share\\x",
        "C:\\Users", "C:secret", "c:/secret", "..\\secret", "nested\\..\\..\\secret", "file:x", "sets/../../secret",
    ],
)  # fmt: skip
def test_what_leads_outside_is_refused_by_its_spelling(comfyui, paths, extra, choice: str) -> None:
    write_pair(comfyui.base / "secret")
    with pytest.raises(ValueError, match="is outside of") as caught:
        paths.resolve_dataset(choice)
    assert repr(choice) in str(caught.value) and ALLOWED_BY in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_outside_folder_is_refused_whether_it_exists_or_not(comfyui, paths, tmp_path) -> None:
    write_pair(tmp_path / "there")
    reported = []
    for name in ("there", "gone"):
        with pytest.raises(ValueError) as caught:
            paths.resolve_dataset(str(tmp_path / name))
        reported.append(str(caught.value).replace(name, "NAME"))
    assert reported[0] == reported[1]


@pytest.mark.parametrize("choice", ["", "  ", "a\0b", "missing", "nested/missing", "~", "sets/missing", "other/cats"])
def test_what_is_not_there_is_reported(paths, extra, choice: str) -> None:
    with pytest.raises(ValueError, match=r"there is no dataset|choose a dataset") as caught:
        paths.resolve_dataset(choice)
    assert ALLOWED_BY in str(caught.value)


@pytest.mark.parametrize("value", [3, None, ["x"], {"a": 1}, 0.5], ids=str)
def test_what_a_damaged_graph_has_in_place_of_a_name_is_refused(comfyui, paths, value: object) -> None:
    for call in (paths.locate_dataset, paths.run_folder):
        with pytest.raises(ValueError, match=f"must be text, it is {type(value).__name__}"):
            call(value)


def test_a_damaged_link_in_a_graph_is_reported_without_a_traceback(comfyui) -> None:
    from graphs import training

    for node, name, value in (("data", "folder", 3), ("data", "folder", ["x"]), ("train", "run_name", ["x"])):
        graph = training()
        graph[node]["inputs"][name] = value
        run = comfyui.execute(graph)
        assert run.status in ("refused", "error") and run.error
        assert "has no attribute" not in run.error + str(run.refusal), "the pack raised in validation"


def test_a_link_out_of_the_input_folder_is_refused_until_its_target_is_allowed(
    comfyui, paths, tmp_path, monkeypatch
) -> None:
    write_pair(tmp_path / "elsewhere" / "set")
    link = comfyui.input / "link_out"
    link.symlink_to(tmp_path / "elsewhere" / "set", target_is_directory=True)
    try:
        assert "link_out" not in paths.dataset_choices()
        with pytest.raises(ValueError, match="'link_out' is outside"):
            paths.resolve_dataset("link_out")
        allowed = ([str(tmp_path / "elsewhere")], set())
        monkeypatch.setitem(paths.folder_paths.folder_names_and_paths, paths.EXTRA, allowed)
        assert paths.resolve_dataset("link_out") == (tmp_path / "elsewhere" / "set").resolve()
    finally:
        link.unlink()


def test_a_link_that_turns_in_a_circle_is_not_there(comfyui, paths) -> None:
    link = comfyui.input / "circle"
    link.symlink_to(link)
    try:
        with pytest.raises(ValueError, match="no dataset"):
            paths.resolve_dataset("circle")
    finally:
        link.unlink()


def test_absolute_paths_inside_are_fine(comfyui, paths, extra) -> None:
    write_pair(comfyui.input / "inside")
    assert paths.resolve_dataset(str(comfyui.input / "inside")) == (comfyui.input / "inside").resolve()
    assert paths.resolve_dataset(str(extra / "cats")) == (extra / "cats").resolve()


def test_the_demo_is_drawn_once_and_equal_each_time(comfyui, paths) -> None:
    folder = paths.resolve_dataset(paths.DEMO)
    assert folder.is_relative_to(comfyui.temp.resolve())
    assert sorted(path.suffix for path in folder.glob("[!.]*")) == [".png"] * 4 + [".txt"] * 4
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    stamp = (folder / "target_1.png").stat().st_mtime_ns
    assert paths.resolve_dataset(paths.DEMO) == folder and (folder / "target_1.png").stat().st_mtime_ns == stamp
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert {path.name: path.read_bytes() for path in paths.resolve_dataset(paths.DEMO).iterdir()} == before


def test_a_draft_that_fails_leaves_nothing(comfyui, paths) -> None:
    def write(folder: Path) -> None:
        (folder / "half.png").write_bytes(b"x")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        paths.store_dataset("broken", write)
    assert not [name for name in os.listdir(comfyui.temp) if "broken" in name]


def test_a_temp_folder_on_a_full_disk_is_named(comfyui, paths) -> None:
    def write(folder: Path) -> None:
        (folder / "half.png").write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as Pillow passes it on, without a name

    disk_error = comfyui.core("files.disk").DiskError
    with pytest.raises(disk_error, match=r"temp/broken could not be written: No space left .*free"):
        paths.store_dataset("broken", write)
    assert not [name for name in os.listdir(comfyui.temp) if "broken" in name]


def test_the_fingerprint_sees_every_change(comfyui, paths) -> None:
    folder = comfyui.input / "watched"
    write_pair(folder)
    seen = {paths.dataset_fingerprint("watched")}
    assert paths.dataset_fingerprint("watched") in seen
    (folder / "a.txt").write_text("a longer caption")
    seen.add(paths.dataset_fingerprint("watched"))
    os.utime(folder / "a.png", (1, 1))
    seen.add(paths.dataset_fingerprint("watched"))
    write_pair(folder / "10_more", "b")
    seen.add(paths.dataset_fingerprint("watched"))
    (folder / "10_more" / "b.txt").rename(folder / "10_more" / "c.txt")
    seen.add(paths.dataset_fingerprint("watched"))
    assert len(seen) == 5


def exchange(path: Path) -> None:
    """Another file of the same name, size and time, as a download that keeps the server's time leaves it."""
    facts = path.stat()
    other = path.with_name(f"other {path.name}")
    other.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.replace(other, path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)


@pytest.mark.skipif(sys.platform == "win32", reason="keeps no time of the last change of any kind")
def test_a_file_exchanged_under_its_name_size_and_time_is_read_again(comfyui, paths) -> None:
    """Load Dataset, Load LoRA, Compare LoRA and Load Teacher Vision, whose files ComfyUI caches by these, and the nodes
    that encode texts, which may name an embedding."""
    lora, vision, embedding = (
        comfyui.base / "models" / kind / "exchanged.safetensors" for kind in ("loras", "text_encoders", "embeddings")
    )
    folder = comfyui.input / "exchanged"
    write_pair(folder)
    for path in (lora, vision, embedding):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
    nodes = {name: node.fingerprint_inputs for name, node in comfyui.pack_nodes.items()}
    asked = {
        folder / "a.png": lambda: nodes["DOPSD_LoadDataset"](folder=["exchanged"]),
        folder / "a.txt": lambda: nodes["DOPSD_LoadDataset"](folder=["exchanged"]),
        lora: lambda: (
            nodes["DOPSD_LoadLoRA"](lora_name=lora.name),
            nodes["DOPSD_CompareLoRA"](lora_name=lora.name, strengths="1"),
        ),
        vision: lambda: nodes["DOPSD_LoadTeacherVision"](vision_name=vision.name),
        embedding: lambda: (
            nodes["DOPSD_BuildTeacherCondition"](preview_prompts="", mode="auto"),
            nodes["DOPSD_CompareLoRA"](lora_name="none", prompts="a embedding:exchanged"),
            nodes["DOPSD_CompareLoRA"](lora_name=lora.name, prompts=None),
        ),
    }
    for path, ask in asked.items():
        before = ask()
        assert ask() == before
        exchange(path)
        after = ask()
        assert after != before, path
        if path in (lora, embedding):
            assert all(one != other for one, other in zip(before, after, strict=True))
    for path in (lora, vision, embedding):
        path.unlink()


def test_the_fingerprint_sees_sources_and_what_rows_name_elsewhere(comfyui, paths, tmp_path) -> None:
    folder, other = comfyui.input / "watched_edits", comfyui.input / "elsewhere"
    for place in (folder / "target", folder / "source", other, tmp_path):
        write_pair(place)
    (folder / "source" / "link.png").symlink_to(other / "a.png")
    (folder / "sub").mkdir()
    row = '{"ref_img": ["../source/a.png", "../../elsewhere/a.png", "a\\u0000", "%s"], "target_img": "../target/a.png"}'
    (folder / "sub" / "rows.jsonl").write_text(row % (tmp_path / "a.png").as_posix())

    def marks() -> tuple[str, str]:
        return paths.dataset_fingerprint("watched_edits"), paths.dataset_fingerprint("watched_edits/sub/rows.jsonl")

    seen = [marks()]
    assert marks() == seen[0]
    for number, file in enumerate((folder / "source" / "a.png", folder / "target" / "a.png", other / "a.png"), 1):
        os.utime(file, (number, number))
        seen.append(marks())
    assert all(len(set(column)) == 4 for column in zip(*seen, strict=True))
    (other / "a.png").unlink()
    assert not set(marks()) & set(seen[-1])
    gone = marks()
    os.utime(tmp_path / "a.png", (9, 9))  # outside of what may be read: never looked at
    assert marks() == gone


def test_the_halves_of_edits_are_not_offered(comfyui, paths) -> None:
    for half in ("source", "target"):
        write_pair(comfyui.input / "offered" / "edits" / half / "10_more")
        write_pair(
            comfyui.input / "offered" / "alone" / half if half == "target" else comfyui.input / "offered" / "alone"
        )
    (comfyui.input / "offered" / "edits" / "rows.jsonl").touch()
    found = {choice for choice in paths.dataset_choices() if choice.startswith("offered")}
    edits = {"offered", "offered/edits", "offered/edits/rows.jsonl"}
    assert found == edits | {"offered/alone", "offered/alone/target"}


BAD_NAMES = (
    "", " ", ".", "..", "../x", "/x", "x/../../y", "..\\x", "C:\\x", "C:x", "a:b", "con", "NUL.txt", "COM1", "lpt9.x",
    "x.", ".x", "a\0b", "a\nb", "what?", "star*", "pipe|", '"', "x" * 101, "日" * 34, "\ud83d",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name[:12]))
def test_bad_names_for_results_are_refused(comfyui, paths, name: str) -> None:
    for call in (paths.run_folder, paths.lora_file_path):
        with pytest.raises(ValueError, match=r"^the (run name|filename_prefix) ") as caught:
            call(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x/../y", "a//b", "/abs/x", "loras/", "loras/aux", "./x"])
def test_bad_prefixes_are_refused(comfyui, paths, name: str) -> None:
    before = sorted(comfyui.output.rglob("*"))
    with pytest.raises(ValueError, match="^the filename_prefix "):
        paths.lora_file_path(name)
    assert sorted(comfyui.output.rglob("*")) == before


def test_results_lie_in_the_output_folder(comfyui, paths) -> None:
    output = comfyui.output.resolve()
    assert paths.run_folder(" my concept 日本 ") == output / "dopsd" / "my concept 日本"
    first = paths.lora_file_path("deep\\er/name")
    assert first.resolve() == output / "deep" / "er" / "name_00001_.safetensors" and first.parent.is_dir()
    first.touch()
    assert paths.lora_file_path("deep/er/name").name == "name_00002_.safetensors"
    assert paths.lora_file_path("deep/%year%").name.startswith("2")
    assert paths.shown(first) == "output/deep/er/name_00001_.safetensors"
    assert paths.condition_cache().is_relative_to(comfyui.base / "user")


def test_the_fingerprint_reads_no_file_but_rows(comfyui, paths, monkeypatch) -> None:
    """Before a run, ComfyUI asks for it with any choice; a large file or a pipe would stop the server."""
    monkeypatch.setattr(paths, "read_jsonl", lambda *_: pytest.fail("it was read"))
    (comfyui.input / "large.bin").write_bytes(bytes(9))
    before = paths.dataset_fingerprint("large.bin")
    (comfyui.input / "large.bin").write_bytes(bytes(10))
    assert paths.dataset_fingerprint("large.bin") != before


def test_a_run_name_leaves_room_for_the_digest(comfyui, paths) -> None:
    """Otherwise the name is refused only after everything is encoded."""
    validate = comfyui.pack_nodes["DOPSD_TrainLoRA"].validate_inputs
    assert validate(run_name="x" * 91) is True
    assert paths.run_folder("x" * 91 + "-01234567").name.endswith("-01234567")
    assert validate(run_name="x" * 92) == f"the run name is longer than 91 bytes; shorten {'x' * 20!r}..."
