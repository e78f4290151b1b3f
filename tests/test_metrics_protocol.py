"""The protocol of the evaluation against cases made by hand: sizes, prompts, seeds, pairs, layouts, intervals."""

from __future__ import annotations

import json
import random

import pytest
import torch
from PIL import Image

from dopsd_core.metrics.intervals import bootstrap, paired_difference
from dopsd_core.metrics.layouts import BenchmarkPrompt, read_prompts, write_layout
from dopsd_core.metrics.pixels import resized_to
from dopsd_core.metrics.protocol import (
    Row,
    concept_shots,
    generation_size,
    ordinary_shots,
    seed_of,
    with_class_name,
)


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((1024, 1024), (1024, 1024)),
        ((500, 500), (1024, 1024)),
        ((1920, 1080), (1360, 768)),  # 1365.3 x 768
        ((1080, 1920), (768, 1360)),
        ((3, 2), (1248, 832)),  # 1254.1 x 836.1
    ],
)
def test_images_have_the_sources_aspect_at_a_megapixel(source, size) -> None:
    assert generation_size(*source) == size


def test_a_small_area_never_gives_an_empty_image() -> None:
    assert generation_size(1000, 1, area=64 * 64) == (2016, 16)  # 2023.9 x 2.02


@pytest.mark.parametrize(
    ("prompt", "name", "trigger", "wanted"),
    [
        ("[V] on a table", "dog", "", "dog on a table"),
        ("a photo of a [v] dog", "dog", "", "a photo of a dog"),
        ("a castle, [V] style", "watercolour", "", "a castle, watercolour style"),
        ("a photo of ohwx in the snow", "a cat", "ohwx", "a photo of a cat in the snow"),
        ("ohwxes and OHWX", "cat", "ohwx", "ohwxes and cat"),
        ("a [V] dog", "", "", "a dog"),
        ("a [V] dogs", "dog", "", "a dog dogs"),  # another word
    ],
)
def test_clip_reads_the_class_name(prompt, name, trigger, wanted) -> None:
    assert with_class_name(prompt, name, trigger) == wanted


def test_each_row_has_a_rewrite_and_its_tests() -> None:
    rows = [Row(100, 100, f"[V] {i}", (f"[V] in a boat {i}", f"[V] on Mars {i}")) for i in range(6)]
    shots = concept_shots(rows, "ohwx", "cat", seed=3)
    assert len(shots) == 4 * 3  # at most four rows
    assert [shot.kind for shot in shots[:3]] == ["rewrite", "test", "test"]
    assert [shot.row for shot in shots] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert shots[4].prompt == "ohwx in a boat 1" and shots[4].scored == "cat in a boat 1"
    assert {(shot.width, shot.height) for shot in shots} == {(1024, 1024)}


def test_noise_is_a_function_of_row_and_prompt() -> None:
    shots = concept_shots([Row(1, 1, "a", ("b",)), Row(1, 1, "a", ("b",))], "", "", seed=5)
    assert [shot.seed for shot in shots] == [seed_of(5, row, prompt) for row in (0, 1) for prompt in (0, 1)]
    assert len({shot.seed for shot in shots}) == 4
    again = concept_shots([Row(9, 9, "other words", ("b",)), Row(1, 1, "a", ("b",))], "", "", seed=5)
    assert [shot.seed for shot in again] == [shot.seed for shot in shots], "not of the words"
    assert all(0 <= shot.seed < 2**63 for shot in shots)
    ordinary = ordinary_shots(["a", "b"], 64, 64, seed=5)
    assert not {shot.seed for shot in ordinary} & {shot.seed for shot in shots}
    assert {shot.seed for shot in concept_shots([Row(1, 1, "a")], "", "", seed=6)}.isdisjoint({s.seed for s in shots})


def test_the_source_is_resized_to_the_generated_image() -> None:
    source = torch.rand(3, 20, 30)
    assert resized_to(source, torch.zeros(3, 20, 30)) is source
    small = resized_to(source, torch.zeros(3, 5, 6))
    assert small.shape == (3, 5, 6) and small.min() >= 0 and small.max() <= 1
    as_pillow = Image.fromarray((source.permute(1, 2, 0) * 255).byte().numpy()).resize((6, 5), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(as_pillow.tobytes()), dtype=torch.uint8).view(5, 6, 3).permute(2, 0, 1) / 255
    assert (small - pixels).abs().max() < 0.02


# -- layouts -----------------------------------------------------------------------------------------------------------


def flat(prompt: str, seeds) -> list[torch.Tensor]:
    """An image per seed, of one grey that its seed determines."""
    return [torch.full((3, 8, 12), random.Random(seed).random()) for seed in seeds]


def test_geneval_finds_its_images(tmp_path) -> None:
    records = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
               {"tag": "colors", "prompt": "a photo of a red cup"}]  # fmt: skip
    source = tmp_path / "evaluation_metadata.jsonl"
    source.write_text("\n".join(map(json.dumps, records)) + "\n\n", encoding="utf-8")
    prompts = read_prompts("geneval", source)
    done = []
    write_layout("geneval", prompts, flat, tmp_path / "out", on_prompt=lambda *numbers: done.append(numbers))
    assert done == [(1, 2), (2, 2)]
    for number, record in enumerate(records):
        folder = tmp_path / "out" / f"{number:05}"
        assert json.loads((folder / "metadata.jsonl").read_text(encoding="utf-8")) == record
        assert sorted(path.name for path in (folder / "samples").iterdir()) == [f"{i:05}.png" for i in range(4)]
    seeds = [seed_of(0, number, index) for number in range(2) for index in range(4)]
    for seed, file in zip(seeds, sorted((tmp_path / "out").rglob("*.png")), strict=True):
        pixel = Image.open(file).getpixel((0, 0))
        assert isinstance(pixel, tuple) and abs(pixel[0] - random.Random(seed).random() * 255) <= 1
    assert len(set(seeds)) == 8, "each image has its own noise"


def test_dpg_finds_its_grids(tmp_path) -> None:
    (tmp_path / "prompts").mkdir()
    for name, text in (("drawbench_1", "A red cup.\n"), ("coco_7", "A bench")):
        (tmp_path / "prompts" / f"{name}.txt").write_text(text, encoding="utf-8")
    prompts = read_prompts("dpg", tmp_path / "prompts")
    assert prompts == [BenchmarkPrompt("A bench", "coco_7"), BenchmarkPrompt("A red cup.", "drawbench_1")]
    write_layout("dpg", prompts, flat, tmp_path / "out", seed=4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["coco_7.png", "drawbench_1.png"]
    grid = Image.open(tmp_path / "out" / "drawbench_1.png")
    assert grid.size == (24, 16)
    seeds = [seed_of(4, 1, index) for index in range(4)]
    for index, place in enumerate([(0, 0), (12, 0), (0, 8), (12, 8)]):  # row by row, as its scorer cuts it
        pixel = grid.getpixel(place)
        assert isinstance(pixel, tuple) and abs(pixel[0] - random.Random(seeds[index]).random() * 255) <= 1


def test_an_interrupted_benchmark_resumes(tmp_path) -> None:
    prompts = [BenchmarkPrompt("a", "00000", '{"prompt": "a"}'), BenchmarkPrompt("b", "00001", '{"prompt": "b"}')]
    write_layout("geneval", prompts[:1], flat, tmp_path)
    drawn = []
    write_layout("geneval", prompts, lambda prompt, seeds: drawn.append(prompt) or flat(prompt, seeds), tmp_path)
    assert drawn == ["b"]


@pytest.mark.parametrize("text", ["not json", '{"tag": "x"}', "[1]"])
def test_another_file_is_not_geneval(tmp_path, text) -> None:
    (tmp_path / "file.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="file.jsonl, line 1: not a JSON object with a prompt"):
        read_prompts("geneval", tmp_path / "file.jsonl")


def test_what_holds_no_prompts_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="has no prompts; give the prompts folder of DPG-Bench"):
        read_prompts("dpg", tmp_path)
    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        read_prompts("dpg", tmp_path / "x")


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_normal_mean_is_known() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 5
    found = bootstrap(values.tolist())
    half = 1.96 * float(values.std()) / 20
    assert found.mean == pytest.approx(float(values.mean())) and found.count == 400
    assert found.high - found.mean == pytest.approx(half, rel=0.15)
    assert found.mean - found.low == pytest.approx(half, rel=0.15)


def test_pairs_remove_what_both_share() -> None:
    shared = [random.Random(i).gauss(0, 10) for i in range(40)]
    ours = [value + 0.5 + 0.1 * random.Random(100 + i).gauss(0, 1) for i, value in enumerate(shared)]
    found = paired_difference(ours, shared)
    assert found.excludes_zero and found.low < 0.5 < found.high and found.high - found.low < 0.1
    assert not paired_difference(shared[::-1], shared).excludes_zero
    assert not paired_difference([3.7e-9, 3.7e-9], [0.0, 0.0]).excludes_zero  # rounding


def test_equal_seeds_give_equal_intervals() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, seed=1) != bootstrap(values)
    assert bootstrap([3.0]).low == bootstrap([3.0]).high == 3.0


def test_groups_are_resampled_whole() -> None:
    values = [0.0] * 50 + [1.0] * 50
    alone, grouped = bootstrap(values), bootstrap(values, [0] * 50 + [1] * 50)
    assert alone.mean == grouped.mean == 0.5
    assert (grouped.low, grouped.high) == (0.0, 1.0) and alone.high < 0.65


def test_unreadable_answers_are_left_out() -> None:
    found = bootstrap([1.0, float("nan"), 3.0])
    assert found.mean == 2 and found.count == 2


@pytest.mark.parametrize("call", [lambda: bootstrap([]), lambda: bootstrap([float("nan")])])
def test_nothing_has_no_mean(call) -> None:
    with pytest.raises(ValueError, match="there are no values to average"):
        call()


def test_pairs_are_of_equal_length() -> None:
    with pytest.raises(ValueError, match="there are 2 and 1 values"):
        paired_difference([1, 2], [1])
    with pytest.raises(ValueError, match="there are 2 values and 1 groups"):
        bootstrap([1, 2], ["a"])
