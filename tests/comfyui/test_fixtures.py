"""The fixtures themselves, with ComfyUI's own nodes: what they say happened did happen."""

from __future__ import annotations

IMAGE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 1, "color": 0xFF8000}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "fixture"}},
}


def test_in_process(comfyui):
    run = comfyui.execute(IMAGE)
    assert run.status == "success" and not run.error
    (image,) = run.outputs["2"]["images"]
    assert (comfyui.output / image["filename"]).exists()
    assert run.value("1").shape == (1, 32, 32, 3)
    assert "execution_success" in [e.kind for e in run.events]


def test_in_process_refusal(comfyui):
    bad = {**IMAGE, "1": {"class_type": "EmptyImage", "inputs": {**IMAGE["1"]["inputs"], "width": -1}}}
    run = comfyui.execute(bad)
    assert run.status == "refused" and "width" in run.error


def test_server(server):
    run = server.run(IMAGE)
    assert run.status == "success", run.messages
    (image,) = run.outputs["2"]["images"]
    assert (server.output / image["filename"]).exists()
    assert server.rss() > 100e6


def test_page(page):
    page.load_api(IMAGE)
    page.set_widget("EmptyImage", "color", 0x0080FF)
    assert page.run(60) == "execution_success"
    assert page.saved()["output"]["1"]["inputs"]["color"] == 0x0080FF
    assert page.screenshot("fixture").stat().st_size > 10_000
