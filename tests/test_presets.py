"""Presets by aim: what they set, their former name, the command line, and what does not fit an aim."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dopsd_core.__main__ import _default_config, main
from dopsd_core.arguments import config_from_args, parse_args
from dopsd_core.conditioning.teachers import EDIT_TARGET, VLM
from dopsd_core.families import FAMILIES, get_family
from dopsd_core.options import flattened
from dopsd_core.presets import ON_COMMAND_LINE, PRESETS, USUAL, Preset, preset_config
from dopsd_core.standalone.prepared import _aim_remarks
from dopsd_core.training.aims import aim_remarks

AIMS = ("subject", "style", "character", "edit")
IMAGE: Any = SimpleNamespace(source_images=())
AN_EDIT: Any = SimpleNamespace(source_images=(Path("before.png"),))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_whole_configuration_of_every_family(preset: str, family: str) -> None:
    known, made = get_family(family), preset_config(preset, get_family(family))
    values, wanted = flattened(made), {name: value for name, value in vars(PRESETS[preset]).items() if value}
    assert {name: values[name] for name in wanted} == wanted
    assert made.family == family and values["targets"] == known.lora_targets


def test_the_aims_are_first_and_the_former_name_has_the_former_settings() -> None:
    assert tuple(PRESETS)[:4] == AIMS and USUAL == "subject"
    assert PRESETS["standard"] == Preset(steps=1000, rank=32, alpha=64.0), "or runs of saved graphs are not found again"
    assert PRESETS["style"] == PRESETS["subject"] and PRESETS["edit"] == PRESETS["standard"]
    assert PRESETS["character"] == replace(
        PRESETS["subject"], steps=2 * PRESETS["subject"].steps, anchor_probability=0.75
    )
    assert {"quick look", "paper", "demo model"} < set(PRESETS)
    assert tuple(ON_COMMAND_LINE) == (*AIMS, "quick-look", "paper", "standard")


# -- the command line --------------------------------------------------------------------------------------------------


def config_of(monkeypatch: pytest.MonkeyPatch, *words: str, family: str = "flux2_klein") -> Any:
    found = SimpleNamespace(family=family)
    monkeypatch.setattr("dopsd_core.standalone.hosts.source.find_family", lambda options: found)
    args = parse_args(["train", "photos", "--output", "run", "--model", "a/model", *words])
    return config_from_args(args, _default_config(args))


def test_a_preset_on_the_command_line_and_options_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    klein = get_family("flux2_klein")
    assert config_of(monkeypatch) == preset_config("subject", klein)
    assert config_of(monkeypatch, "--preset", "paper") == preset_config("paper", klein)
    short = flattened(config_of(monkeypatch, "--preset", "quick-look", "--rank", "8"))
    assert (short["steps"], short["rank"], short["alpha"]) == (250, 8, 16.0), "alpha keeps its share of the rank"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "demo"), "--preset is for real models; the demo model has settings of its own: leave it out"),
        (("--model", "a/b", "--config", "c.json"), "--preset and --config both choose all settings: give one of them"),
    ],
)
def test_a_preset_that_cannot_count_is_refused(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "photos", "--output", "run", "--preset", "style", *words]) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_preset_lists_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["train", "photos", "--output", "run", "--preset", "person"])
    said = capsys.readouterr().err
    assert all(name in said for name in ON_COMMAND_LINE)


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "image", "view", "said"),  # anchors name others
    [
        ("edit", IMAGE, VLM, "this dataset has no source images: choose subject"),
        ("edit", AN_EDIT, EDIT_TARGET, ""),
        ("character", AN_EDIT, EDIT_TARGET, "the preset is character, and edit is the one for edits"),
        ("style", IMAGE, VLM.with_background("blur"), "teacher_background blur hides a part of it"),
        ("style", IMAGE, VLM, ""),
        ("subject", IMAGE, VLM.with_background("blur"), ""),
        ("paper", AN_EDIT, EDIT_TARGET, ""),
        ("standard", AN_EDIT, EDIT_TARGET, ""),
    ],
)
def test_what_does_not_fit_an_aim_is_one_sentence(preset: str, image: Any, view: Any, said: str) -> None:
    remarks = aim_remarks(preset, [image, image], view, "own", names_others=True)
    assert len(remarks) == bool(said) and said in "".join(remarks)


def test_a_character_wants_others_as_anchors_and_a_style_its_own_image() -> None:
    for preset in PRESETS:
        (alone, others) = (aim_remarks(preset, [IMAGE], VLM, "own", names_others=named) for named in (False, True))
        assert len(alone) - len(others) == (preset == "character"), preset
        (own, other) = (aim_remarks(preset, [IMAGE], VLM, image, names_others=True) for image in ("own", "other"))
        assert len(other) - len(own) == (preset == "style"), preset


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--preset", "character"), 1),
        (("--preset", "character", "--anchor-prompts", "a man"), 0),
        (("--preset", "character", "--regularisation", "ordinary"), 0),
        (("--preset", "character", "--anchor-probability", "0"), 0),
        (("--preset", "character", "--objective", "sft"), 0),
        (("--preset", "subject"), 0),
        ((), 0),
    ],
)
def test_whether_anchors_name_others_follows_from_the_arguments(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: int
) -> None:
    args = parse_args(["train", "photos", "--output", "run", "--model", "a/model", *words])
    assert len(_aim_remarks(args, config_of(monkeypatch, *words), [IMAGE], VLM)) == said
