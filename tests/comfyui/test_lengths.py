"""Captions that are longer than their readers: the node names file and length, also where all is in the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import training
from inprocess import ComfyUI
from PIL import Image
from runs import Run

WORDS = "a [V] badge , left , on a navy background "
LONG = WORDS * 200
LIMIT, IMAGE = 1024, 9  # the demo's vision tower sees at 96 x 96 pixels


def write(folder: Path, **captions: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, caption) in enumerate(captions.items()):
        Image.new("RGB", (64, 64), (9 * number, 90, 255 - 9 * number)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder.name


def encode(comfyui: ComfyUI, folder: str, **inputs: Any) -> Run:
    graph = training()
    del graph["train"]
    graph["data"]["inputs"] |= {"folder": folder, "trigger": ""}
    graph["conditions"]["inputs"].update(inputs)
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["conditions", 0]}}
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    return run


def tokens(run: Run, text: str) -> int:
    """Of the text in the CLIP's template, counted by the tokenizer of the model itself."""
    clip = run.value("models", 1)
    whole = clip.tokenizer.llama_template.format(text)
    return len(clip.tokenizer.qwen3_4b.tokenizer(whole)["input_ids"])


def test_a_warning_names_the_file_and_the_tokens_over(comfyui: ComfyUI) -> None:
    run = encode(comfyui, write(comfyui.input / "long-a", a=LONG, b=WORDS))
    conditions = run.value("conditions")
    length = tokens(run, conditions.data.pairs[0].caption)
    over = length + 2 + IMAGE - LIMIT  # two marks stand round the image
    expected = [
        f"a.txt: {over:,} tokens more than the teacher reads (1,024, of which its image takes {IMAGE})",
        f"a.txt: {length:,} tokens, and Z-Image-Turbo was made for prompts of up to 512",
    ]
    captions = [note for note in conditions.notes if not note.startswith("preview prompt")]
    assert len(captions) == len(expected) and all(
        note.startswith(start) for note, start in zip(captions, expected, strict=True)
    )
    assert run.texts("conditions")[-1].split("\n")[1:] == list(conditions.notes)
    long, short = conditions.data.pairs[:2]
    assert len(long.teacher.features) == LIMIT and len(long.student.features) == length
    assert len(short.teacher.features) == tokens(run, short.caption) + 2 + IMAGE


def test_conditions_out_of_the_cache_are_reported_too(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(comfyui.input / "long-b", a=LONG, b=WORDS)
    first = encode(comfyui, folder).value("conditions").notes
    encoder = comfyui.module("nodes.comfy_host.encoder").ComfyEncoder
    for name in ("encode_text", "encode_image_text", "encode_latent"):
        monkeypatch.setattr(encoder, name, lambda *_: pytest.fail("something was encoded anew"))
    assert first and encode(comfyui, folder).value("conditions").notes == first


def test_what_fits_is_not_reported(comfyui: ComfyUI) -> None:
    """Up to the last token."""
    run = encode(comfyui, write(comfyui.input / "fitting", a=WORDS))
    assert run.value("conditions").notes == ()
    assert "\n" not in run.texts("conditions")[-1]
    limits = comfyui.module("nodes.comfy_host.families").in_comfyui(comfyui.core("families").Z_IMAGE)
    star = tokens(run, "star star") - tokens(run, "star")
    assert star == 1
    fitting = "star" + " star" * (limits.text_tokens - tokens(run, "star"))
    folder = write(comfyui.input / "fitting-2", a=fitting, b=f"{fitting} star")
    notes = encode(comfyui, folder, preview_prompts="a badge").value("conditions").notes
    assert [note.partition(":")[0] for note in notes] == ["b.txt"] and "513 tokens" in notes[0]


def test_preview_prompts_are_reported_by_their_number(comfyui: ComfyUI) -> None:
    folder = write(comfyui.input / "long-prompts", a=WORDS)
    notes = encode(comfyui, folder, preview_prompts=f"a badge\n{LONG}").value("conditions").notes
    assert [note.partition(":")[0] for note in notes] == ["preview prompt 2", "preview prompt 2"]


def test_a_row_of_a_jsonl_is_named_by_its_line(comfyui: ComfyUI) -> None:
    folder = comfyui.input / "long-rows"
    write(folder, a=WORDS, b=WORDS)
    rows = [{"path": f"{name}.png", "caption": text} for name, text in (("a", WORDS), ("b", LONG))]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    report = comfyui.core("data.dataset").read_dataset(folder / "rows.jsonl", pixel_budget=64 * 64, multiple=16)
    report.raise_for_errors()
    lengths, pair = comfyui.module("nodes.comfy_host.lengths"), report.pairs[1]
    assert lengths._place(pair, pair.captions[0], folder / "rows.jsonl") == "rows.jsonl:2"


@pytest.mark.long
def test_a_thousand_long_captions_are_counted_and_not_listed(comfyui: ComfyUI) -> None:
    lengths = comfyui.module("nodes.comfy_host.lengths")
    captions = {f"n{number:02d}": f"{LONG} {number}" for number in range(lengths.MOST_NOTES)}
    notes = encode(comfyui, write(comfyui.input / "many", **captions)).value("conditions").notes
    assert len(notes) == lengths.MOST_NOTES + 1
    assert notes[-1].endswith(" more texts are too long")


def test_features_are_ordinary_tensors(comfyui: ComfyUI) -> None:
    """Encoded or out of the cache: autograd can save them."""
    folder = write(comfyui.input / "ordinary", a=WORDS)
    for _ in range(2):
        conditions = encode(comfyui, folder).value("conditions")
        for pair in (*conditions.data.pairs, conditions.data.heldout):
            if pair is not None:
                for tensor in (pair.student.features, pair.teacher.features, pair.target_latent):
                    assert not tensor.is_inference() and tensor.device == torch.device("cpu")
        assert not any(anchor.features.is_inference() for anchor in conditions.data.anchors)
