"""Load Dataset in the real executor: every way to hand data in, and the sentence for every way to get it wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
from PIL import Image

DEMO = "demo badge (built in)"


def graph(folder: str = DEMO, **inputs: Any) -> dict:
    settings = {"resolution": 64, "trigger": "", "repeats": 1, "caption_dropout": 0.0}
    return {"1": {"class_type": "DOPSD_LoadDataset", "inputs": {"folder": folder, **settings, **inputs}}}


def write_pair(folder: Path, name: str, caption: str | None, size: tuple[int, int] = (64, 64), colour: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    gradient = Image.linear_gradient("L").resize(size).point([(value + colour) % 256 for value in range(256)])
    gradient.save(folder / f"{name}.png")
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def folder(comfyui, request) -> Path:
    """A folder of two good pairs in input/, of its own for each test."""
    folder = comfyui.input / "data" / request.node.name.replace("[", "-").replace("]", "").replace("/", "-")
    write_pair(folder, "a", "a [V] cat", (96, 64))
    write_pair(folder, "b", "a [V] cat, asleep", colour=99)
    return folder


@pytest.fixture
def run(comfyui):
    """Runs the node on a folder below input/."""
    return lambda folder, **inputs: comfyui.execute(graph(folder.relative_to(comfyui.input).as_posix(), **inputs))


def shown_image(comfyui, run) -> Image.Image:
    (image,) = run.outputs["1"]["images"]
    return Image.open(comfyui.temp / image["filename"])


def test_the_demo_needs_nothing(comfyui) -> None:
    before = set(sys.modules)  # another test may have loaded them for a comparison
    run = comfyui.execute(graph())
    assert run.status == "success", run.error
    dataset = run.value("1")
    assert [pair.captions[0][:9] for pair in dataset.report.pairs] == ["a [V] bad"] * 4
    assert "4 usable images" in run.value("1", 1) and "4 usable images" in run.texts("1")[-1]
    assert "diffusers" not in set(sys.modules) - before


def test_a_folder_with_its_settings(comfyui, folder, run) -> None:
    done = run(folder, trigger=" ohwx ", repeats=3, caption_dropout=0.25)
    dataset = done.value("1")
    assert dataset.trigger == "ohwx" and dataset.caption_dropout == 0.25
    assert [pair.captions for pair in dataset.report.pairs] == [("a ohwx cat",), ("a ohwx cat, asleep",)]
    assert {pair.repeats for pair in dataset.report.pairs} == {3}
    assert all(pair.bucket.area <= 64 * 64 and pair.bucket.width % 16 == 0 for pair in dataset.report.pairs)
    assert [event.data["max"] for event in done.of("progress", "1")] == [2, 2]


def test_thumbnails_are_shown_on_the_node(comfyui, folder, run, artefacts) -> None:
    write_pair(folder, "tiny", "a [V] cat, far away", (40, 30))
    (folder / "stray.txt").write_text("nothing")
    done = run(folder)
    image = shown_image(comfyui, done)
    image.save(artefacts / "load_dataset.png")
    assert image.width > 400 and len(image.convert("RGB").getcolors(1 << 24) or ()) > 50
    assert "warning: tiny.png: is 40x30, smaller than its bucket" in done.texts("1")[-1]
    assert str(folder) in done.value("1", 1)


def test_jsonl_rows_may_name_images_anywhere_in_the_input_folder(comfyui, folder) -> None:
    write_pair(comfyui.input / "data" / "other", "c", None, colour=7)
    rows = [
        {"path": "a.png", "short_en": "a [V] cat", "caption": "a cat"},
        {"path": "../other/c.png", "text": "a [V] dog"},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = comfyui.execute(graph(f"data/{folder.name}/rows.jsonl"))
    assert run.status == "success", run.error
    assert [pair.captions for pair in run.value("1").report.pairs] == [("a [V] cat", "a cat"), ("a [V] dog",)]


@pytest.mark.parametrize("place", ["/etc/passwd", "../../../secret.png", "link.png"])
def test_jsonl_rows_that_leave_the_input_folder_are_refused(comfyui, folder, place: str) -> None:
    write_pair(comfyui.base, "secret", None)
    (folder / "link.png").symlink_to(comfyui.base / "secret.png")
    (folder / "rows.jsonl").write_text(json.dumps({"path": place, "text": "a [V] dog"}))
    run = comfyui.execute(graph(f"data/{folder.name}/rows.jsonl"))
    assert run.status == "error" and "is outside of the folder" in run.error and str(comfyui.input) in run.error


def test_a_caption_linked_from_outside_is_not_shown(comfyui, folder, run) -> None:
    (comfyui.base / "secret.txt").write_text("top secret")
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to(comfyui.base / "secret.txt")
    done = run(folder)
    assert done.status == "error" and "is outside of the folder" in done.error
    assert "top secret" not in json.dumps([done.error, done.texts()])


def break_caption(folder: Path) -> None:
    (folder / "a.txt").unlink()


def break_encoding(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"caf\xe9")


def break_image(folder: Path) -> None:
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])


def break_by_copy(folder: Path) -> None:
    (folder / "z.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "z.txt").write_text("again")


def break_all(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (break_caption, "error: a.png: no caption: write it to a.txt beside it"),
        (break_encoding, "error: a.txt:1: the text is not UTF-8; save it as UTF-8"),
        (break_image, "error: a.png: truncated or damaged"),
        (break_by_copy, "error: z.png: duplicate: the same image as a.png; remove one, or use repeats"),
        (break_all, ": no images; put .png, .jpg, .jpeg, .webp or .bmp files with .txt captions there"),
    ],
    ids=lambda value: getattr(value, "__name__", "-")[:20],
)
def test_bad_data_stops_with_its_sentence_and_shows_it_on_the_node(folder, run, spoil, sentence: str) -> None:
    spoil(folder)
    done = run(folder)
    assert done.status == "error"
    assert sentence in done.error.splitlines()[0], done.error
    assert sentence in done.texts("1")[-1]


def test_all_errors_are_reported_at_once(folder, run) -> None:
    break_caption(folder)
    (folder / "b.txt").write_text("")
    first, *rest = run(folder).error.splitlines()
    assert "(and 1 more error" in first and any("b.txt:1: the caption is empty" in line for line in rest)
    assert str(folder) in rest[-1]


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ("../../etc", "'../../etc' is outside of the folders that D-OPSD may read"),
        ("/etc", "'/etc' is outside"),
        ("C:\\Users", "is outside of"),
        ("gone", "there is no dataset 'gone'; put it into its own folder in "),
        ("", "choose a dataset folder"),
    ],
)
def test_a_bad_choice_is_refused_before_anything_runs(comfyui, choice: str, sentence: str) -> None:
    run = comfyui.execute(graph(choice))
    assert run.status == "refused" and sentence in run.error and "dopsd_datasets" in run.error
    (node_error,) = run.refusal["node_errors"]["1"]["errors"]
    assert node_error["extra_info"]["input_name"] == "folder"


@pytest.mark.parametrize(
    "inputs", [{"resolution": 32}, {"repeats": 0}, {"caption_dropout": 1.5}, {"resolution": 4096}], ids=str
)
def test_numbers_out_of_range_are_refused(comfyui, inputs: dict) -> None:
    run = comfyui.execute(graph(**inputs))
    assert run.status == "refused" and next(iter(inputs)) in run.error


def test_a_changed_folder_is_read_again_and_an_unchanged_one_is_not(comfyui, folder) -> None:
    choice = f"data/{folder.name}"
    comfyui.execute(graph(choice))
    cached = comfyui.execute(graph(choice), keep_cache=True)
    assert not cached.of("text", "1")
    (folder / "a.txt").write_text("a [V] cat in a hat")
    os.utime(folder / "a.txt", ns=(1, 1))
    again = comfyui.execute(graph(choice), keep_cache=True)
    assert again.value("1").report.pairs[0].captions == ("a [V] cat in a hat",)


# -- edits -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def edits(comfyui, request) -> Path:
    """A folder of two edits in input/, of its own for each test."""
    folder = comfyui.input / "edits" / request.node.name.replace("[", "-").replace("]", "").replace("/", "-")
    for name, colour in (("a", 10), ("b", 120)):
        write_pair(folder / "target", name, f"make it {colour}", (96, 64), colour=colour)
        write_pair(folder / "source", name, None, (64, 96), colour=colour + 60)
    return folder


def test_edits_are_shown_beside_their_sources(comfyui, edits, run, artefacts) -> None:
    Image.new("RGB", (64, 96), (200, 10, 10)).save(edits / "source" / "a.png")
    done = run(edits)
    assert done.status == "success", done.error
    pairs = done.value("1").report.pairs
    assert [(pair.image_path.name, pair.source_images, pair.captions) for pair in pairs] == [
        (f"{name}.png", (edits.resolve() / "source" / f"{name}.png",), (f"make it {colour}",))
        for name, colour in (("a", 10), ("b", 120))
    ]
    assert "2 usable edit pairs" in done.texts("1")[-1] and "2 source images" in done.value("1", 1)
    assert "warning: source/a.png: is 64x96: " in done.texts("1")[-1].replace("\\", "/")
    image = shown_image(comfyui, done)
    image.save(artefacts / "load_edits.png")
    colours = dict((colour, count) for count, colour in image.convert("RGB").getcolors(1 << 24) or ())
    assert colours[(200, 10, 10)] == 107 * 160 and len(colours) > 60  # one source, whole; the rest is gradients


def test_rows_of_edits(comfyui, edits) -> None:
    row = {"ref_img": ["source/a.png", "source/b.png"], "target_img": "target/a.png", "short_en": "put both together"}
    (edits / "rows.jsonl").write_text(json.dumps(row))
    run = comfyui.execute(graph(f"edits/{edits.name}/rows.jsonl"))
    assert run.status == "success", run.error
    (pair,) = run.value("1").report.pairs
    assert [path.name for path in pair.source_images] == ["a.png", "b.png"]


@pytest.mark.parametrize("place", ["/etc/passwd", "../../../secret.png", "source/link.png"])
def test_sources_that_leave_the_input_folder_are_refused(comfyui, edits, place: str) -> None:
    write_pair(comfyui.base, "secret", None)
    (edits / "source" / "link.png").symlink_to(comfyui.base / "secret.png")
    (edits / "rows.jsonl").write_text(json.dumps({"ref_img": place, "target_img": "target/a.png", "text": "change"}))
    run = comfyui.execute(graph(f"edits/{edits.name}/rows.jsonl"))
    assert run.status == "error" and "is outside of the folder" in run.error and str(comfyui.input) in run.error


def break_source(folder: Path) -> None:
    (folder / "source" / "a.png").write_bytes(b"no image")


def break_by_stray(folder: Path) -> None:
    write_pair(folder, "z", "beside them", colour=3)


def break_by_loss(folder: Path) -> None:
    (folder / "source" / "b.png").unlink()


def break_nothing_changed(folder: Path) -> None:
    (folder / "source" / "a.png").write_bytes((folder / "target" / "a.png").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (break_source, "error: source/a.png: not a PNG, JPEG, WebP or BMP image"),
        (break_by_stray, "error: z.png: is outside of source/ and target/: move it into one of them"),
        (break_by_loss, "error: target/b.png: no source: put the source image of this edit at source/b.png"),
        (break_nothing_changed, "error: target/a.png: the same image as its source"),
    ],
    ids=lambda value: getattr(value, "__name__", "-")[:20],
)
def test_bad_edits_stop_with_their_sentence(edits, run, spoil, sentence: str) -> None:
    spoil(edits)
    done = run(edits)
    assert done.status == "error" and sentence in done.error.splitlines()[0].replace("\\", "/"), done.error


def test_a_changed_source_is_read_again(comfyui, edits) -> None:
    choice = f"edits/{edits.name}"
    comfyui.execute(graph(choice))
    assert not comfyui.execute(graph(choice), keep_cache=True).of("text", "1")
    write_pair(edits / "source", "a", None, (96, 64), colour=200)
    os.utime(edits / "source" / "a.png", ns=(1, 1))
    assert (
        "source/a.png" not in comfyui.execute(graph(choice), keep_cache=True).texts("1")[-1]
    )  # of the right shape now


# -- from ComfyUI's own nodes ------------------------------------------------------------------------------------------


def from_nodes(images: str, **inputs: Any) -> dict:
    return {
        "9": {"class_type": "LoadImageTextDataSetFromFolder", "inputs": {"folder": images}},
        **graph(images=["9", 0], texts=["9", 1], **inputs),
    }


def test_images_and_texts_of_comfyuis_own_reader(comfyui, folder) -> None:
    run = comfyui.execute(from_nodes(f"data/{folder.name}"))
    assert run.status == "success", run.error
    pairs = run.value("1").report.pairs
    assert sorted(pair.captions for pair in pairs) == [("a [V] cat",), ("a [V] cat, asleep",)]
    original = {Image.open(path).convert("RGB").tobytes() for path in folder.glob("*.png")}
    assert {Image.open(pair.image_path).convert("RGB").tobytes() for pair in pairs} == original
    assert all(pair.image_path.is_relative_to(comfyui.temp.resolve()) for pair in pairs)
    again = comfyui.execute(from_nodes(f"data/{folder.name}"))
    assert again.value("1").report.source == run.value("1").report.source


def test_images_that_comfyuis_reader_repeats_become_repeats(comfyui, folder) -> None:
    write_pair(folder / "3_more", "c", "a [V] cat, thrice", colour=50)
    run = comfyui.execute(from_nodes(f"data/{folder.name}", repeats=2))
    assert run.status == "success", run.error
    assert {pair.captions[0]: pair.repeats for pair in run.value("1").report.pairs} == {
        "a [V] cat": 2,
        "a [V] cat, asleep": 2,
        "a [V] cat, thrice": 6,
    }


def test_a_missing_caption_of_the_reader_is_an_error(comfyui, folder) -> None:
    break_caption(folder)
    run = comfyui.execute(from_nodes(f"data/{folder.name}"))
    assert run.status == "error" and "the caption is empty; write what the image shows" in run.error


def test_counts_that_do_not_match_are_one_sentence(comfyui, folder) -> None:
    bad = from_nodes(f"data/{folder.name}")
    bad["1"]["inputs"]["texts"] = "only one"
    run = comfyui.execute(bad)
    assert run.error == "2 images and 1 texts are connected to Load Dataset; give one text for each image"
    del bad["1"]["inputs"]["texts"]
    assert comfyui.execute(bad).error.startswith("2 images and 0 texts")


def test_connected_images_stay_plain_images(comfyui, edits) -> None:
    run = comfyui.execute(from_nodes(f"edits/{edits.name}/target", folder=f"edits/{edits.name}"))
    assert run.status == "success", run.error
    assert [pair.source_images for pair in run.value("1").report.pairs] == [(), ()]


def test_batches_and_transparency(comfyui) -> None:
    store = comfyui.module("nodes.load_dataset").store_images
    batch = torch.rand(2, 32, 48, 3)
    clear = torch.cat([torch.rand(1, 16, 16, 3), torch.zeros(1, 16, 16, 1)], -1)
    clear[0, 0, 0] = 1.0  # a fully transparent image is refused
    versions = batch._version, clear._version
    source = store([batch, clear], ["one", "two", "three"])
    assert sorted(path.name for path in source.glob("*.png")) == [f"image_000{i}.png" for i in (1, 2, 3)]
    report = comfyui.core("data.dataset").read_dataset(source, pixel_budget=4096, multiple=16)
    assert not report.errors and (batch._version, clear._version) == versions
    read = comfyui.core("data.images").read_image
    assert read(source / "image_0003.png").getcolors() == [(256, (255, 255, 255))]
    assert store([batch, clear], ["one", "two", "four"]) != source


@pytest.mark.parametrize(
    ("text", "reported"), [("three \ud800", "half a character (U+D800)"), ("a\0 \0d", "NUL characters")]
)
def test_connected_texts_that_are_no_text(comfyui, text: str, reported: str) -> None:
    store = comfyui.module("nodes.load_dataset").store_images
    with pytest.raises(ValueError, match="^text 2 of those connected to Load Dataset cannot be used: ") as caught:
        store([torch.rand(2, 16, 16, 3)], ["one", text])
    assert reported in str(caught.value)


def test_a_mark_that_another_node_left_on_a_text(comfyui) -> None:
    source = comfyui.module("nodes.load_dataset").store_images([torch.rand(1, 16, 16, 3)], ["\ufeffa [V] dog"])
    assert (source / "image_0001.txt").read_bytes() == b"a [V] dog"


def test_a_connected_pair_comes_at_most_as_often_as_a_folder_may_ask(comfyui) -> None:
    store = comfyui.module("nodes.load_dataset").store_images
    pixels = torch.rand(1, 16, 16, 3).expand(1001, -1, -1, -1)
    with pytest.raises(ValueError, match="image 1 occurs 1001 times with the same text, and at most 1000 are allowed"):
        store([pixels], ["one"] * 1001)


# -- names and texts ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text there")
def test_names_that_are_no_text_are_shown_and_read(comfyui, folder) -> None:
    odd = os.fsencode(folder) + b"/d\xe9sert"
    os.mkdir(odd)
    for name in ("a.png", "a.txt"):
        os.rename(folder / name, odd + b"/caf\xe9" + name[1:].encode())
    choice = os.fsdecode(b"data/" + os.fsencode(folder.name) + b"/d\xe9sert")
    assert choice in json.loads(json.dumps(comfyui.module("nodes.comfy_host.paths").dataset_choices()))
    done = comfyui.execute(graph(choice, trigger="ohwx"))
    assert done.status == "success", done.error
    assert "d\\xe9sert: 1 usable image" in done.texts("1")[-1]
    os.remove(odd + b"/caf\xe9.txt")
    done = comfyui.execute(graph(choice))
    assert done.status == "error" and done.error.startswith("error: caf\\xe9.png: no caption: write it to caf\\xe9.txt")
    assert "caf\\xe9.png: no caption" in done.texts("1")[-1]
    json.dumps([done.error, *done.texts()]).encode()
    (done.error + done.texts("1")[-1]).encode()


def test_a_trigger_that_is_no_text(folder, run) -> None:
    done = run(folder, trigger="\ud83d")
    assert done.status == "error" and "the trigger '\\ud83d' cannot be used" in done.error


def test_prompts_share_the_rule_of_captions(comfyui) -> None:
    small = graphs.training("placeholder", steps=1, preview_every=0, probe_every=0, warmup=0)
    small["data"]["inputs"]["trigger"] = "ohwx"
    small["conditions"]["inputs"] |= {
        "preview_prompts": "a [v] badge, top\na [ V ] badge, left",
        "anchor_prompts": "a badge, top\nan [V] badge, left",
    }
    done = comfyui.execute(small)
    assert done.status == "success", done.error
    conditions = done.value("conditions")
    assert [prompt.text for prompt in conditions.previews] == ["a ohwx badge, top", "a [ V ] badge, left"]
    assert done.texts("conditions")[-1].splitlines()[1:] == [
        "warning: preview prompt 2: '[ V ]' is not read as the concept: write [V]",
        "warning: anchor prompt 2: it names the concept, so training would suppress it: remove the name",
    ]
    small["conditions"]["inputs"]["preview_prompts"] = "fine\n\ud83d"
    done = comfyui.execute(small)
    assert done.status == "error" and "preview prompt 2: the text contains half a character" in done.error


def test_cancelling_stops_at_the_next_image(comfyui, folder, monkeypatch) -> None:
    for number in range(8):
        write_pair(folder, f"more{number}", "a [V] cat", colour=number)
    core, decoded = comfyui.core("data.checks"), []
    decode = core.decode
    monkeypatch.setattr(core, "decode", lambda path: decoded.append(path) or decode(path))

    def cancel(event) -> None:
        if event.kind == "progress":
            comfyui.interrupt()

    run = comfyui.execute(graph(f"data/{folder.name}"), on_event=cancel)
    assert run.status == "interrupted" and len(decoded) == 2
