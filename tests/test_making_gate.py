"""The gates of the demo model: what is measured of which prompts, and that a bad figure closes its gate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dopsd_core.demo.model_files import (
    JUDGE_FILE,
    MODEL_FILE,
    PARENT_FILE,
    TEXT_ENCODER_FILE,
    VAE_FILE,
    WEIGHTS,
)
from dopsd_core.demo.names import SUBJECTS
from dopsd_core.demo.world import APPEARANCE, HELD_OUT, LAYOUT, render
from dopsd_core.standalone.hosts.demo_weight_files import load_text_encoder, load_transformer
from dopsd_core.standalone.judge import load_judge
from dopsd_core.standalone.making.export import export
from dopsd_core.standalone.making.gate import DISTILLED, FEW, Gate, Sampler, figures_of, gates
from dopsd_core.standalone.making.gate_cases import features_of, make_cases
from dopsd_core.standalone.making.pretrain import Parent, load_parent

pytestmark = pytest.mark.long

CASES = {case.name: case for case in make_cases(208, torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def parent() -> Parent:
    made = Parent()
    made.load_shipped(WEIGHTS)
    return made.requires_grad_(False)


def good_figures() -> dict[str, dict[str, float]]:
    figures = {"appearance": 1.0, "all": 1.0, "frechet": 50.0, "sharpness": 1.0}
    table = {f"{name} | {DISTILLED}": dict(figures) for name in CASES}
    return table | {f"{name} | {FEW}": {**figures, "frechet": 200.0} for name in CASES}


def test_every_gate_holds_for_a_good_model() -> None:
    found = gates(good_figures(), 36.0)
    assert all(gate.holds for gate in found) and len(found) >= 10


@pytest.mark.parametrize(
    ("case", "model", "figure", "value"),
    [
        ("named", DISTILLED, "appearance", 0.98),
        ("named style and words", DISTILLED, "appearance", 0.9),
        ("teacher, other view", DISTILLED, "appearance", 0.98),
        ("teacher, style and words", DISTILLED, "appearance", 0.9),
        ("described", FEW, "frechet", 149.0),
        ("open", FEW, "frechet", 149.0),
        ("described", DISTILLED, "sharpness", 1.2),
        ("open", DISTILLED, "sharpness", 0.85),
    ],
)
def test_a_bad_figure_closes_its_gate(case: str, model: str, figure: str, value: float) -> None:
    table = good_figures()
    table[f"{case} | {model}"][figure] = value
    assert sum(not gate.holds for gate in gates(table, None)) == 1


def test_the_size_is_a_gate_where_it_is_known() -> None:
    assert [gate.name for gate in gates(good_figures(), 41.0) if not gate.holds] == ["megabytes of all files"]


def test_a_gate_says_what_it_wants() -> None:
    assert str(Gate("sharpness", 1.4, 0.9, 1.1)).startswith("FAIL  sharpness: 1.4 (0.9 to 1.1)")


def test_cases_ask_for_what_their_captions_say() -> None:
    assert all(len(case.texts) == len(case.scenes) for case in CASES.values())
    named, opened = CASES["named"], CASES["open"]
    asked = {text.split()[1] for text in named.texts}
    assert asked == set(SUBJECTS.texts) and len(named.texts) % len(SUBJECTS) == 0
    bound = dict(zip(SUBJECTS.texts, SUBJECTS.appearance.tolist(), strict=True))
    for i, text in enumerate(named.texts):
        assert [int(getattr(named.scenes, a)[i]) for a in APPEARANCE] == bound[text.split()[1]]
    assert opened.is_open and opened.judged == LAYOUT and all(t.startswith("a badge, ") for t in opened.texts)
    assert not any(case.is_open for case in CASES.values() if case is not opened)


def test_a_changed_name_keeps_everything_but_the_colour() -> None:
    case = CASES["name, another colour"]
    bound = dict(zip(SUBJECTS.texts, SUBJECTS.appearance.tolist(), strict=True))
    for i, text in enumerate(case.texts):
        shape, colour, center, texture = bound[text.split()[1]]
        shown = [int(getattr(case.scenes, a)[i]) for a in APPEARANCE]
        assert (shown[0], shown[2], shown[3]) == (shape, center, texture) and shown[1] != colour


def test_teachers_see_another_view_and_a_style_teacher_another_badge() -> None:
    other, style = CASES["teacher, other view"], CASES["teacher, style and words"]
    assert other.seen is not None and style.seen is not None
    s = other.scenes
    assert bool(HELD_OUT[s.shape, s.colour, s.center, s.texture].all())
    assert all(torch.equal(getattr(other.seen, a), getattr(s, a)) for a in APPEARANCE)
    assert not torch.equal(other.seen.position, s.position)
    for attribute in ("center", "texture"):
        assert torch.equal(getattr(style.seen, attribute), getattr(style.scenes, attribute))
    assert float((style.seen.shape != style.scenes.shape).float().mean()) > 0.5


def test_prompts_are_encoded_as_the_host_encodes_them(parent) -> None:
    from dopsd_core.standalone.hosts.demo import load_demo_model

    encoder = load_demo_model().encoder
    for name in ("named", "teacher, style and words"):
        case = CASES[name]
        short = type(case)(
            name, case.texts[:2], case.scenes[:2], case.judged, seen=None if case.seen is None else case.seen[:2]
        )
        features, lengths = features_of(parent, short)
        for i in range(2):
            if short.seen is None:
                wanted = encoder.encode_text(short.texts[i]).features
            else:
                wanted = encoder.encode_image_text(render(short.seen)[i], short.texts[i]).features
            assert len(wanted) == lengths[i] and torch.allclose(features[i, : lengths[i]], wanted, atol=1e-4)


def test_figures_of_real_renders_are_perfect() -> None:
    judge = load_judge(WEIGHTS / JUDGE_FILE)
    figures = figures_of(render(CASES["described"].scenes), CASES["described"], judge)
    assert figures["all"] > 0.98 and figures["appearance"] > 0.99 and figures["sharpness"] == pytest.approx(1)
    assert figures["frechet"] == pytest.approx(0, abs=1e-3) and set(LAYOUT) < set(figures)
    assert "appearance" not in figures_of(render(CASES["open"].scenes), CASES["open"], judge)


def test_the_gates_sampler_is_the_hosts(parent) -> None:
    from dopsd_core.families import Z_IMAGE
    from dopsd_core.rollout import sample
    from dopsd_core.standalone.hosts.demo import load_demo_model

    model = load_demo_model()
    text = "a red star badge with a blue center, top, on a sand background"
    condition, noise = model.encoder.encode_text(text), torch.randn(1, 16, 8, 8)
    features = torch.zeros(1, 32, 128)
    features[0, : len(condition.features)] = condition.features
    lengths = torch.tensor([len(condition.features)])
    got = Sampler(parent.velocity, 2)(features, lengths, noise, parent.empty_features(), is_open=False)
    wanted = sample(model.denoiser, [condition], noise, Z_IMAGE.sigmas(2, 64, 64))
    assert torch.allclose(got, wanted, atol=1e-3)


def test_exported_files_are_what_was_made(parent, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    save_file({name: value.contiguous() for name, value in parent.state_dict().items()}, work / "joint.safetensors")
    changed = {name: value + 1 for name, value in parent.transformer.state_dict().items()}
    save_file(changed, work / "distilled.safetensors")
    export(work, out)
    few, many = load_transformer(out / MODEL_FILE).state_dict(), load_transformer(out / PARENT_FILE).state_dict()
    for name, value in parent.transformer.state_dict().items():
        assert torch.equal(many[name], value.bfloat16().float()), name
        assert torch.equal(few[name], (value + 1).bfloat16().float()), name
    encoder, token_ids = load_text_encoder(out / TEXT_ENCODER_FILE)
    assert torch.equal(token_ids, parent.token_ids)
    assert torch.equal(encoder.visual.pos_embed.weight, parent.encoder.visual.pos_embed.weight)
    for name in (VAE_FILE, JUDGE_FILE):  # not made anew: as shipped
        assert all(torch.equal(v, load_file(WEIGHTS / name)[k]) for k, v in load_file(out / name).items())


def test_an_average_that_was_not_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        load_parent(tmp_path, from_average=True)
