"""The chart of loss and gaps on the training node: with previews and measurements, after a resume, in the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import SHORT, node_of, shipped, training
from inprocess import ComfyUI
from PIL import Image
from runs import Run

TRAINED = (31, 119, 180)  # the colour of the gap on trained captions


def has_curve(image: Image.Image) -> bool:
    """Whether the lowest part of an image, a JPEG, has the curve of the gap."""
    lowest = image.convert("RGB").crop((0, image.height - 190, image.width, image.height))
    colours = lowest.getcolors(1 << 24) or []
    found: Any = colours  # (count, colour)
    return sum(n for n, colour in found if all(abs(a - b) < 40 for a, b in zip(colour, TRAINED, strict=True))) > 20


@pytest.mark.long
def test_previews_have_the_chart_below_and_files_do_not(comfyui: ComfyUI, artefacts: Path) -> None:
    run = comfyui.execute(training("chart"))
    assert run.status == "success", run.error
    shown, sheets = run.previews("train"), run.value("train", 3)
    assert len(shown) == 3 == len(sheets)
    assert all(image.height == sheets.shape[1] + 190 and has_curve(image) for image in shown)
    shown[-1].save(artefacts / "training_preview.png")
    (wanted,) = comfyui.core("image_grid").to_images(sheets[-1:].permute(0, 3, 1, 2))
    assert not has_curve(wanted)


def test_the_chart_stays_on_the_node_and_comes_back_when_nothing_is_left_to_train(comfyui: ComfyUI) -> None:
    graph = training("chart-stays")
    runs = [comfyui.execute(graph), comfyui.execute(graph)]
    assert all(run.status == "success" for run in runs), runs
    assert any("nothing was trained" in str(event.data) for event in runs[1].events)
    first, again = (shown_at_the_end(comfyui, run) for run in runs)
    assert first.size == runs[0].previews("train")[-1].size and has_curve(first)
    assert again.tobytes() == first.tobytes()


def shown_at_the_end(comfyui: ComfyUI, run: Run) -> Image.Image:
    (image,) = run.outputs["train"]["images"]
    assert image["type"] == "temp"
    return Image.open(comfyui.temp / image["subfolder"] / image["filename"]).convert("RGB")


def test_without_a_preview_the_chart_is_alone(comfyui: ComfyUI, tmp_path: Path) -> None:
    report = comfyui.core("training.log").StepReport(step=1, loss=1.0, relative_gap=1.0)
    (tmp_path / "train.jsonl").write_text(report.to_row(), encoding="utf-8")
    draw = comfyui.module("nodes.comfy_host.watcher").chart_of_run
    alone = draw(tmp_path, 20, torch.zeros(1, 1, 1, 3))
    below = draw(tmp_path, 20, torch.ones(2, 64, 600, 3))
    assert alone.size == (560, 190) and below.size == (600, 64 + 190)
    assert below.getpixel((300, 10)) == (255, 255, 255)


def test_a_finished_run_does_not_fail_for_its_chart(
    comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = comfyui.module("nodes.train_lora")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node.ui, "PreviewImage", full)
    assert node.shown_on(None, Image.new("RGB", (8, 8))) is None
    assert "the chart is not shown on the node" in caplog.text and "No space left" in caplog.text


@pytest.mark.long
def test_without_previews_each_measurement_has_a_chart(comfyui: ComfyUI) -> None:
    run = comfyui.execute(training("chart-alone", preview_every=0, probe_every=2))
    shown = run.previews("train")
    assert len(shown) == 4 and {image.size for image in shown} == {(560, 190)}  # at 0, 2, 4 and 6
    assert has_curve(shown[-1])


def chart_of(comfyui: ComfyUI, log: Path, *, has_previews: bool = True, **options: Any) -> Any:
    config = comfyui.core("config").TrainConfig(steps=20, **options)
    return comfyui.module("nodes.comfy_host.watcher").LiveChart(config, log, has_previews)


def test_a_resumed_run_shows_its_earlier_steps(comfyui: ComfyUI, tmp_path: Path) -> None:
    report = comfyui.core("training.log").StepReport
    rows = [report(step=step, loss=1 / step, relative_gap=1 / step) for step in range(1, 6)]
    log = tmp_path / "train.jsonl"
    log.write_text("".join(row.to_row() for row in rows), encoding="utf-8")  # 5 is there when it is reported, or not
    whole, resumed = chart_of(comfyui, tmp_path / "none"), chart_of(comfyui, log)
    for row in rows:
        whole.add(row, 0.0)
    resumed.add(rows[-1], 0.0)
    assert resumed.draw(0.0).tobytes() == whole.draw(0.0).tobytes()
    other = chart_of(comfyui, tmp_path / "none")
    other.add(rows[-1], 0.0)
    assert other.draw(0.0).tobytes() != whole.draw(0.0).tobytes()


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({"preview_every": 3, "probe_every": 2}, [2, 4, 8]),  # 6 comes with a preview
        ({"preview_every": 0, "probe_every": 3}, [3, 6]),
        ({"preview_every": 0, "probe_every": 0}, [1]),  # then only once in a while
    ],
)
def test_when_a_chart_is_due(comfyui: ComfyUI, tmp_path: Path, options: dict[str, Any], due: list[int]) -> None:
    report = comfyui.core("training.log").StepReport
    chart, found = chart_of(comfyui, tmp_path / "none", **options), []
    for step in range(1, 9):
        every = options["probe_every"]
        gap = 1.0 if every and step % every == 0 else None
        if chart.add(report(step=step, loss=1.0, relative_gap=gap), 100.0 + step / 10):
            found.append(step)
            chart.draw(100.0 + step / 10)
    assert found == due
    without = chart_of(comfyui, tmp_path / "none", has_previews=False, **options)
    assert without.add(report(step=6, loss=1.0, relative_gap=1.0), 100.0)  # no VAE: no preview comes


@pytest.mark.browser
def test_the_page_draws_it_on_the_node(page: Any) -> None:
    graph = shipped("quickstart")
    train = node_of(graph, "DOPSD_TrainLoRA")
    graph[train]["inputs"].update({"steps": SHORT["steps"], "preview_every": 2, "run_name": "page_chart"})
    page.load_api({key: node for key, node in graph.items() if key in upstream(graph, train)})
    assert page.run(timeout=300) == "execution_success"
    page.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.page.wait_for_timeout(1500)
    page.screenshot("chart_on_the_node")
    assert points_of_the_curve(page) > 20
    page.load_api({key: node for key, node in graph.items() if key in upstream(graph, train)})  # a page without images
    assert page.run(timeout=60) == "execution_success"  # from the cache
    page.page.wait_for_timeout(500)
    assert points_of_the_curve(page) > 20


def points_of_the_curve(page: Any) -> int:
    """Pixels of the chart on the node that have the colour of the gap."""
    return page.page.evaluate(
        """([red, green, blue]) => {
            const image = window.app.graph.nodes.find(n => n.type === 'DOPSD_TrainLoRA').imgs[0];
            const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext('2d');
            canvas.drawImage(image, 0, 0);
            const data = canvas.getImageData(0, image.naturalHeight - 190, image.naturalWidth, 190).data;
            let found = 0;
            for (let i = 0; i < data.length; i += 4)
                found += Math.max(Math.abs(data[i] - red), Math.abs(data[i + 1] - green),
                                  Math.abs(data[i + 2] - blue)) < 40;
            return found;
        }""",
        list(TRAINED),
    )


def upstream(graph: dict, node: str) -> set[str]:
    """The node and all nodes that it needs."""
    links = [value[0] for value in graph[node]["inputs"].values() if isinstance(value, list)]
    return {node}.union(*(upstream(graph, other) for other in links))
