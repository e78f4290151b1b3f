"""Prompts that work against a training, or show nothing of it, are reported in one sentence each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dopsd_core.__main__ import main
from dopsd_core.adapters.lora_file import read_safetensors
from dopsd_core.conditioning.teachers import EDIT, EDIT_TARGET, VLM, WORDS
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.sharing.model_card import model_card
from dopsd_core.sharing.model_spec import Description, spec_header
from dopsd_core.training.prompt_remarks import anchor_remarks, equal_rows_remarks, slider_remarks

SMILE = WORDS.with_sentence("face -> smiling face")


def test_an_anchor_that_names_the_concept_or_is_a_training_caption_is_pulled_both_ways() -> None:
    prompts = ["a sks dog", "a dog", "a [V] cat", "a cat in a hat", "a tok cat"]
    remarks = anchor_remarks(prompts, ["sks", "TOK"], {"a dog"})
    assert [remark.split(":")[0] for remark in remarks] == [f"anchor prompt {number}" for number in (1, 2, 3, 5)]
    assert ["names the concept" in remark for remark in remarks] == [True, False, True, True]
    assert "it is a training caption too" in remarks[1]
    with pytest.raises(ValueError, match="anchor prompt 1: the text contains half a character"):
        anchor_remarks(["\ud83d"], [])


def test_an_anchor_with_the_sliders_word_holds_it_as_it_is() -> None:
    (remark,) = slider_remarks(["a face", "a house", "a surface", "the face of a man"], SMILE)
    assert remark.startswith("2 anchor prompts contain 'face'") and "(such as for 'a face')" in remark
    assert slider_remarks(["a house", "a surface"], SMILE) == []
    for other in (VLM, EDIT, EDIT_TARGET, WORDS.with_sentence("in winter")):  # the last adds words, replaces none
        assert slider_remarks(["a face"], other) == []


def test_a_sliders_own_captions_without_the_trigger_hold_its_word_too() -> None:
    (remark,) = slider_remarks([], SMILE, ["a face, left", "a face, right", "a house"])
    assert remark.startswith("2 anchor captions without the trigger contain 'face'")
    assert remark.endswith(
        "(such as for 'a face, left'): write the captions without it and [V], and leave the trigger empty"
    )
    (remark,) = slider_remarks(["a face"], SMILE, ["a house"])
    assert remark.startswith("1 anchor prompt contains 'face'")


def test_prompts_for_which_the_teacher_reads_the_same_are_counted() -> None:
    (remark,) = equal_rows_remarks(["a face", "a house", "a garden"], SMILE)
    assert remark.startswith("2 of 3 prompts do not contain 'face'") and "(such as 'a house')" in remark
    assert equal_rows_remarks(["a face"], SMILE) == [] == equal_rows_remarks(["a house"], VLM)
    assert equal_rows_remarks(["a house"], SMILE)[0].startswith("the only prompt does not contain")


# -- a header that says which words ------------------------------------------------------------------------------------


def test_the_header_says_what_the_teacher_sees_and_reads_if_that_is_not_the_usual() -> None:
    assert VLM.facts == {"dopsd_teacher_sees": "vlm"}
    assert EDIT.with_sentence("", others=True).facts == {"dopsd_teacher_sees": "edit"}
    assert EDIT.with_background("grey").with_sentence("-").facts == {
        "dopsd_teacher_sees": "edit", "dopsd_teacher_background": "grey", "dopsd_teacher_sentence": "-"
    }  # fmt: skip
    assert SMILE.facts == {"dopsd_teacher_sees": "words", "dopsd_teacher_sentence": "face -> smiling face"}


def test_managers_and_the_card_show_the_words_of_a_slider() -> None:
    header = spec_header(SMILE.facts, Description(), "smile", is_diffusers=True)
    hint = "Slider: face -> smiling face; the LoRA's strength is how much, below 0 the opposite"
    assert header["modelspec.usage_hint"] == hint
    assert "**Slider:** `face -> smiling face`." in model_card(header, "smile.safetensors")
    other = spec_header(EDIT.with_sentence("x").facts, Description(), "x", is_diffusers=True)
    assert "modelspec.usage_hint" not in other and "**Slider" not in model_card(other, "x.safetensors")


# -- the command line --------------------------------------------------------------------------------------------------

SLIDER = ("--teacher-view", "words", "--teacher-sentence")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("photos")
    write_dataset(make_concept(0), folder)
    return folder


def test_teacher_preview_says_that_rows_are_equal(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["teacher-preview", str(photos), "--output", str(tmp_path / "a.png"), "--steps", "1", *SLIDER]
    assert main([*words, "face -> smiling face"]) == 0
    assert "4 of 4 prompts do not contain 'face'" in capsys.readouterr().out
    assert main([*words, "badge -> red badge"]) == 0
    assert "do not contain" not in capsys.readouterr().out


def test_train_says_which_anchors_work_against_it_and_writes_the_words(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", str(photos), "--output", str(tmp_path / "run"), "--trigger", "[V7]", "--steps", "1", "--warmup"]
    run += ["0", "--batch-size", "1", "--probe-every", "0", "--preview-every", "0", "--track", "none"]
    anchors = ("--anchor-prompts", "a red badge, top, on a sand background", "a [V] house")
    anchors += ("--heldout-caption", "a [V] badge, right, on a brown background")
    assert main([*run, *SLIDER, "badge -> red badge", *anchors]) == 0
    said = capsys.readouterr().out
    assert "anchor prompt 2: it names the concept" in said and "anchor prompt 1:" not in said
    assert "1 anchor prompt contains 'badge', which the slider is to change" in said
    assert "the held-out caption is not measured: probe_every is 0" in said
    header = read_safetensors(tmp_path / "run" / "lora.safetensors")[1]
    assert header["dopsd_teacher_sentence"] == "badge -> red badge"
