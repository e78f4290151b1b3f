"""The evaluation of a LoRA on images made by hand, its report card, and the command on the demo model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dopsd_core.__main__ import main
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.lora_file import save_lora
from dopsd_core.data.dataset import read_dataset
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.demo.model_files import JUDGE_FILE, WEIGHTS
from dopsd_core.demo.world import render
from dopsd_core.families import Z_IMAGE
from dopsd_core.metrics.evaluation import (
    Case,
    Evaluation,
    Measured,
    count_scores,
    evaluate,
    with_other_noise,
)
from dopsd_core.metrics.measures import Metrics, measures_of, pixel_distance
from dopsd_core.metrics.protocol import Row, Shot, all_shots, concept_shots, ordinary_shots, rows_of, split_prompts
from dopsd_core.metrics.report_card import _number, draw_report_card, summary_lines, to_json
from dopsd_core.standalone.evaluate import judge_measures
from dopsd_core.standalone.hosts.demo import load_demo_model
from dopsd_core.standalone.judge import load_judge

SOURCES = [torch.full((3, 16, 16), 0.25), torch.full((3, 16, 16), 0.75)]
SHOTS = [
    *concept_shots([Row(16, 16, "[V] one", ("[V] two",)), Row(16, 16, "[V] three")], "", "cup", area=256),
    *ordinary_shots(["a dog", "a cat"], 16, 16),
]


def noise_of(shot: Shot) -> Tensor:
    return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(shot.seed))


def draw(strength: float, shots) -> list[Tensor]:
    """Noise, moved towards the source by the LoRA where the prompt has the trigger, slightly everywhere else."""
    images = []
    for shot in shots:
        if shot.row is None:
            images.append(noise_of(shot) + 0.01 * strength)
        else:
            images.append(torch.lerp(noise_of(shot), SOURCES[shot.row], strength))
    return images


def evaluated(metrics: Metrics | None = None, strengths=(0.5, 1.0), draw=draw, **options) -> Evaluation:
    found = Metrics(dino=pixel_distance, clip=lambda image, prompt: float(len(prompt))) if metrics is None else metrics
    return evaluate("mine", SHOTS, SOURCES, strengths, draw, measures_of(found), **options)


def of(evaluation: Evaluation, name: str) -> Measured:
    (found,) = [measured for measured in evaluation.measured if measured.name == name]
    return found


def test_each_image_is_compared_with_its_own_source() -> None:
    found = of(evaluated(), "dino_d")
    assert found.prompts == ("[V] one", "[V] three")  # not the test prompt
    shots = [SHOTS[0], SHOTS[2]]
    for strength, values in {0.0: found.untouched, **found.strengths}.items():
        wanted = [
            pixel_distance(torch.lerp(noise_of(s), SOURCES[i], strength), SOURCES[i]) for i, s in enumerate(shots)
        ]
        assert values == pytest.approx(wanted, abs=1e-6)
    assert found.strengths[1.0] == pytest.approx((0, 0), abs=1e-6)


def test_retention_is_the_distance_to_the_same_noise_over_that_of_two_noises() -> None:
    found = of(evaluated(), "pixel_retention")
    assert found.prompts == ("a dog", "a cat") and found.untouched == (0, 0)
    assert found.strengths[1.0] == pytest.approx((0.01, 0.01), abs=1e-6)
    shots = SHOTS[3:]
    apart = [pixel_distance(noise_of(a), noise_of(b)) for a, b in zip(shots, with_other_noise(shots), strict=True)]
    assert found.other_noise == pytest.approx(apart) and found.floor == pytest.approx(sum(apart) / 2)
    verdict = found.verdict(1.0)
    assert verdict.word == "kept" and verdict.share_of_floor == pytest.approx(0.01 / (sum(apart) / 2), rel=1e-4)


def test_the_prompt_that_clip_reads_has_the_class_name() -> None:
    assert of(evaluated(), "clip_s").untouched == (len("cup one"), len("cup two"), len("cup three"))


def test_every_variant_has_the_same_noise_and_the_floor_another() -> None:
    asked: list[tuple[float, tuple[int, ...]]] = []

    def listening(strength, shots):
        asked.append((strength, tuple(shot.seed for shot in shots)))
        return draw(strength, shots)

    evaluated(draw=listening)
    assert [strength for strength, _ in asked] == [0, 0, 0.5, 1.0]
    seeds = [seeds for _, seeds in asked]
    assert seeds[0] == seeds[2] == seeds[3] and not set(seeds[0]) & set(seeds[1])


def test_scores_can_be_counted_and_cancelled() -> None:
    calls = []
    evaluated(on_score=lambda: calls.append(1))
    measures = measures_of(Metrics(dino=pixel_distance, clip=lambda image, prompt: 0.0))
    assert len(calls) == count_scores(SHOTS, 2, measures)

    class Cancelled(Exception):
        pass

    def cancel() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        evaluated(on_score=cancel)


def measured(better, untouched, other, ours) -> Measured:
    prompts = tuple(f"prompt {i}" for i in range(len(untouched)))
    return Measured("x", "x", "concept", better, prompts, tuple(untouched), tuple(other), {1.0: tuple(ours)})


@pytest.mark.parametrize(
    ("better", "shift", "word"),
    [
        ("lower", -0.5, "better"),
        ("lower", 0.5, "worse"),
        ("higher", 0.5, "better"),
        ("higher", -0.5, "worse"),
        ("lower", -0.05, "no clear change"),  # in every pair, but less than other noise alone changes
        ("lower", 0.0, "no clear change"),
    ],
)
def test_a_change_is_clear_outside_its_interval_and_above_the_floor(better, shift, word) -> None:
    base = [0.1 * i for i in range(8)]
    found = measured(better, base, [value + 0.1 for value in base], [value + shift for value in base])
    assert found.floor == pytest.approx(0.1)
    assert found.verdict(1.0).word == word


def test_a_change_that_is_not_in_every_pair_is_not_clear() -> None:
    swings = [1.0, -1.0, 1.2, -0.7] * 2
    assert measured("lower", [0.0] * 8, [0.0] * 8, swings).verdict(1.0).word == "no clear change"


@pytest.mark.parametrize(("distance", "word"), [(0.1, "kept"), (0.5, "partly kept"), (1.1, "changed")])
def test_retention_is_judged_by_the_floor(distance, word) -> None:
    assert measured("unchanged", [0, 0], [1.0, 1.0], [distance, distance]).verdict(1.0).word == word


@pytest.mark.parametrize(("value", "word"), [(1.05, "sharp"), (0.7, "blurry"), (1.4, "over-sharp")])
def test_sharpness_is_judged_by_one(value, word) -> None:
    assert measured("near 1", [1.0, 1.0], [], [value, value]).verdict(1.0).word == word


def test_what_is_not_known_is_not_claimed() -> None:
    assert measured("near 1", [1.0] * 4, [], [0.3, 1.4, 0.2, 1.3]).verdict(1.0).word == "no clear change"
    assert measured("unchanged", [0, 0], [], [0.5, 0.5]).verdict(1.0).word == "no clear change"  # without a floor
    assert measured("unchanged", [0, 0], [0, 0], [0, 0]).verdict(1.0).word == "kept"


def test_a_blurred_lora_is_called_blurry() -> None:
    def blurring(strength, shots):
        flat = torch.nn.functional.avg_pool2d
        return [flat(noise_of(s)[None], 3, 1, 1)[0] if strength else noise_of(s) for s in shots]

    found = of(evaluated(Metrics(), draw=blurring), "sharpness_prior")
    assert found.untouched == pytest.approx((1, 1)) and found.verdict(1.0).word == "blurry"


def test_without_weights_there_is_still_a_report() -> None:
    names = [one.name for one in evaluated(Metrics()).measured]
    assert names == ["sharpness", "sharpness_prior", "pixel_retention"]
    everything = Metrics(pixel_distance, pixel_distance, lambda i, p: 0.0, pixel_distance, lambda i, p: 0.0)
    assert {one.name for one in evaluated(everything).measured} > {"dino_d", "lpips_d", "vlm_j", "clip_s", "hpsv3"}


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="there is nothing to evaluate: give prompts and strengths"):
        evaluate("x", [], SOURCES, [1.0], draw, [])


# -- prompts of a dataset ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def badge(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "badge"
    write_dataset(make_concept(0), folder)
    return folder


def test_prompts_with_the_trigger_are_tests_and_the_rest_ordinary(badge) -> None:
    assert split_prompts(["a [V] cup", "ohwx", "a dog"], "ohwx") == (["a [V] cup", "ohwx"], ["a dog"])
    assert split_prompts(["ohwx"]) == ([], ["ohwx"])
    pairs = read_dataset(badge, pixel_budget=64 * 64, multiple=16).pairs
    rows = rows_of(pairs, ["t0", "t1", "t2", "t3", "t4"])
    assert [row.rewrite for row in rows] == [pair.captions[0] for pair in pairs]
    assert [row.tests for row in rows] == [("t0", "t4"), ("t1",), ("t2",), ("t3",)]
    shots = all_shots(pairs, ["[V] x", "a dog"], "", num_seeds=3, area=64 * 64)
    assert len(shots) == 3 * (4 + 1 + 1) and len({shot.seed for shot in shots}) == len(shots)
    assert {(shot.width, shot.height) for shot in shots} == {(64, 64)}


def test_images_of_one_prompt_are_resampled_together() -> None:
    values = (0.0,) * 4 + (1.0,) * 4
    alone = Measured("x", "x", "concept", "higher", tuple("abcdefgh"), (0.0,) * 8, (), {1.0: values})
    grouped = Measured("x", "x", "concept", "higher", ("a",) * 4 + ("b",) * 4, (0.0,) * 8, (), {1.0: values})
    assert alone.verdict(1.0).word == "better"
    assert grouped.verdict(1.0).word == "no clear change"  # two prompts, of which one changed


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_json_has_every_value_and_no_nan() -> None:
    half_silent = Measured(
        "x",
        "x",
        "concept",
        "higher",
        ("a", "b"),
        (1.0, float("nan")),
        (float("nan"),) * 2,
        {0.5: (2.0,) * 2, 1.0: (3.0,) * 2},
    )
    whole = evaluated(Metrics(), notes=["a note"])
    found = replace(whole, measured=(*whole.measured, half_silent))
    report = json.loads(to_json(found), parse_constant=lambda word: pytest.fail(word))
    assert report["title"] == "mine" and report["strengths"] == [0.5, 1.0] and report["notes"] == ["a note"]
    assert len(report["images"]) == len(SHOTS) and report["images"][0]["seed"] == SHOTS[0].seed
    one = report["measures"]["pixel_retention"]["strengths"]["1"]
    assert one["values"] == pytest.approx([0.01, 0.01], abs=1e-6) and one["conclusion"] == "kept"
    silent = report["measures"]["x"]
    assert silent["untouched"]["values"] == [1.0, None] and silent["noise_floor"] is None
    assert silent["strengths"]["1"]["change"]["count"] == 1
    assert one["mean"]["low"] <= one["mean"]["mean"] <= one["mean"]["high"]


def test_a_measure_without_any_answer_is_left_out_and_named() -> None:
    found = evaluated(Metrics(vlm=lambda source, image: float("nan")))
    assert "vlm_j" not in [one.name for one in found.measured]
    assert found.notes == ("VLM-J, 1 to 4: not one image could be scored, so it is left out",)
    assert summary_lines(found)[-1] == found.notes[0]


def test_strengths_that_differ_in_the_last_digit_are_two() -> None:
    found = evaluated(strengths=(0.1, 0.10000001))
    assert list(json.loads(to_json(found))["measures"]["sharpness"]["strengths"]) == ["0.1", "0.10000001"]


def test_the_card_shows_images_and_a_line_per_measure() -> None:
    few, many = evaluated(), evaluated(strengths=(0.5, 1.0, 1.5))
    card = draw_report_card(few)
    assert card.mode == "RGB" and 500 < card.width < 2000
    assert draw_report_card(many).width > card.width
    lines = summary_lines(few)
    assert len(lines) == 2 * len(few.measured)
    assert "retention: pixel distance to untouched, strength 1: 0.0100, " in "\n".join(lines)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.8231, "0.823"), (12.34, "12.3"), (1234.5, "1234"), (0.00001, "0.0000")]
)
def test_numbers_are_short(value, text) -> None:
    assert _number(value) == text
    assert _number(math.nan) == "?"


# -- on the demo model -------------------------------------------------------------------------------------------------


def test_the_judge_knows_the_concept_from_the_images() -> None:
    concept = make_concept(1, num_unseen=8, num_prior=8)
    judge = load_judge(WEIGHTS / JUDGE_FILE)
    error, following, retention, leak = judge_measures(judge, list(render(concept.targets)))
    perfect, described = render(concept.unseen.scenes), render(concept.described.scenes)
    for i, prompt in enumerate(concept.unseen.texts):
        case = Case(Shot("test", prompt, prompt, 0, 64, 64, 0), perfect[i], described[i], None)
        assert error.score(case) <= 0.25 and following.score(case) == 1
        assert 0 < retention.score(case) <= 2
    other = Case(Shot("ordinary", "a dog", "a dog", 0, 64, 64), described[0], described[0], None)
    assert math.isnan(following.score(other)) and leak.score(other) < 0.6
    assert retention.score(other) == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    config = Z_IMAGE.lora_config(rank=2)
    adapters = AdapterSet(load_demo_model().denoiser.sites(), config, seed=1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    path = tmp_path_factory.mktemp("lora") / "random.safetensors"
    save_lora(path, adapters.state(), config, dtype=torch.float32)
    return path


def test_the_command_writes_the_card_and_its_json(badge, lora, tmp_path, capsys) -> None:
    words = ["--lora", str(lora), "--strengths", "1", "0.5", "--output", str(tmp_path), "--seeds", "1", "--steps", "1"]
    prompts = ["--prompts", "a [V] badge, left, on a white background", "a badge, top, on a sky background"]
    assert main(["evaluate", str(badge), *words, *prompts]) == 0
    report = json.loads((tmp_path / "report_card.json").read_text(encoding="utf-8"))
    assert list(report["measures"]) == [
        "judge_concept", "judge_following", "judge_retention", "judge_leak", "sharpness", "sharpness_prior",
        "pixel_retention",
    ]  # fmt: skip
    assert len(report["measures"]["judge_concept"]["prompts"]) == 5  # four captions, one other scene
    assert report["measures"]["pixel_retention"]["strengths"]["1"]["values"][0] > 0.005
    assert report["measures"]["pixel_retention"]["strengths"]["0.5"]["values"][0] > 0.001
    assert Image.open(tmp_path / "report_card.png").width > 500
    assert "concept: concept error, strength 1: " in capsys.readouterr().out


def test_the_command_writes_a_benchmark_with_and_without_the_lora(lora, tmp_path) -> None:
    source = tmp_path / "evaluation_metadata.jsonl"
    source.write_text('{"prompt": "a red star badge, left, on a white background"}\n', encoding="utf-8")
    for name, words in (("base", []), ("lora", ["--lora", str(lora)])):
        out = ["--output", str(tmp_path / name), "--steps", "1", "--resolution", "32"]
        assert main(["evaluate", str(source), "--layout", "geneval", *out, *words]) == 0
    base, ours = (Image.open(tmp_path / name / "00000" / "samples" / "00003.png") for name in ("base", "lora"))
    assert base.size == (32, 32) and base.tobytes() != ours.tobytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is no LoRA to evaluate: give --lora"),
        (["--lora", "nowhere"], "nowhere does not exist; give a LoRA file that training wrote"),
        (["--lora", "LORA", "--strengths", "0"], "--strengths: 0 is not above 0"),
        (["--lora", "LORA", "--dino", "nowhere"], "DINO-D: there are no weights at nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_drawn(badge, lora, tmp_path, capsys, words, sentence) -> None:
    given = [str(lora) if word == "LORA" else word for word in words]
    assert main(["evaluate", str(badge), "--output", str(tmp_path / "out"), *given]) == 1
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()
