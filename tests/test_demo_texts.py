"""The demo's sheets and table: whole labels, one name for each method, and letters that the console has."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dopsd_core import image_grid
from dopsd_core.demo.concept import Concept, make_concept
from dopsd_core.demo.settings import demo_config
from dopsd_core.demo.world import BACKGROUNDS, POSITIONS, render
from dopsd_core.standalone import compare
from dopsd_core.standalone.compare import METHODS, SFT_RATES, plan, table
from dopsd_core.standalone.evaluate import TITLES, Samples
from dopsd_core.standalone.texts import for_console


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(text, what of it is on the sheet) of every text that a sheet draws."""
    wrap, found = image_grid._wrap, []

    def recording(text: str, *more: Any) -> Any:
        block = wrap(text, *more)
        found.append((text, " ".join(block.lines)))
        return block

    monkeypatch.setattr(image_grid, "_wrap", recording)
    return found


def samples(concept: Concept) -> Samples:
    return Samples(*(render(p.scenes) for p in (concept.unseen, concept.described, concept.generic, concept.named)))


@pytest.mark.parametrize("seed", range(3))
def test_no_label_is_cut(drawn: list[tuple[str, str]], seed: int) -> None:
    concept = make_concept(seed)
    images = samples(concept)
    result: Any = SimpleNamespace(shown=dict.fromkeys(METHODS, images))
    compare.draw_teacher_sheet(concept, images, images)
    compare.draw_sheet(concept, result)
    compare.draw_overview(concept, result)
    assert len(drawn) > 70
    assert [(text, shown) for text, shown in drawn if " ".join(text.split()) != shown] == []
    labels = {text for text, _ in drawn}
    layouts = zip(concept.unseen.scenes.position.tolist(), concept.unseen.scenes.background.tolist(), strict=True)
    whole = {f"{list(POSITIONS)[p]}, {list(BACKGROUNDS)[b]}" for p, b in layouts}
    assert len(labels & whole) >= 5, "an image's label is its position and background"
    assert {"untouched", "prior, untouched", "no words, untouched"} <= labels


def test_the_table_has_the_letters_of_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {name: {"mean": 0.5, "std": 0.25} for name in TITLES}
    report = {
        "methods": dict.fromkeys(METHODS, figures), "gap_closed": 0.5, "sft": {"rate": 1e-3}, "wall_seconds": 1.0,
        "peak_rss_mb": 1.0,
    }  # fmt: skip
    text = table(report)
    assert [line.split("  ")[0].strip() for line in text.splitlines()[2:7]] == list(METHODS.values())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert for_console(text) == text and "Fréchet, prior" in text and "leakage" in text
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    plain = for_console(text)
    assert plain.isascii() and "Frechet, prior" in plain and "0.500+-0.250" in plain
    assert [len(line) for line in plain.splitlines()] == [len(line) for line in text.splitlines()]
    one: Any = report | {"methods": dict.fromkeys(METHODS, {name: {"mean": 0.5} for name in TITLES})}
    assert "±" not in table(one) and len(table(one).splitlines()[3]) == len(text.splitlines()[3])


def test_every_training_has_its_curve() -> None:
    config = demo_config()
    result: Any = SimpleNamespace(config=config, sft_rate=SFT_RATES[1])
    runs = compare.curve_runs(result)
    _, dreambooth, dopsd, *sft = plan(config, 1)
    assert list(runs.values()) == [dopsd.name, sft[1].name, dreambooth.name]
    assert [title.split(",")[0] for title in runs] == [METHODS[name] for name in ("dopsd", "sft", "dreambooth")]
