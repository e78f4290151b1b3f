"""The pack in a real server, driven headless: previews, cancel and resume, bad input, memory, an untouched base."""

from __future__ import annotations

import io
import itertools
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from graphs import drawing, training
from live import Server
from PIL import Image
from runs import Event, Run

PROMPT = "a [V] badge, left, on a white background"
LONG = {"steps": 400, "probe_every": 0, "preview_every": 0, "rank": 4}


draws = itertools.count()


def drawn_pixels(server: Server) -> bytes:
    """An image of the untouched MODEL that the server holds, computed anew: no cached result fits this shift, which
    is Z-Image's own to the last bit of the noise levels."""
    graph = {"models": training()["models"], **drawing(PROMPT, model=("shifted", 0))}
    inputs = {"model": ["models", 0], "shift": 3.0 + next(draws) * 1e-12}
    graph["shifted"] = {"class_type": "ModelSamplingAuraFlow", "inputs": inputs}
    run = server.run(graph)
    assert run.status == "success", run.error
    assert "sample" not in run.message("execution_cached")["nodes"]
    (image,) = run.outputs["show"]["images"]
    data = server.get_bytes(f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}")
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()  # the file itself also holds the graph


def cancel_at_step(server: Server, step: int, ended: dict[str, float]) -> Any:
    def on_event(event: Event) -> None:
        if event.kind == "progress" and event.data["node"] == "train" and event.data["value"] >= step and not ended:
            ended["asked"] = time.monotonic()
            threading.Thread(target=server.interrupt).start()
        if event.kind == "execution_interrupted":
            ended["stopped"] = time.monotonic()

    return on_event


def test_progress_text_and_previews_reach_the_client(server: Server) -> None:
    run = server.run(training("live"))
    assert run.status == "success", run.error
    states = [event.data["nodes"].get("train") for event in run.of("progress_state")]
    values = [state["value"] for state in states if state]
    assert values == sorted(values) and values[-1] == 6
    assert any("gap to the teacher" in text for text in run.texts("train"))
    assert len(run.previews("train")) == 3


def test_cancel_stops_within_a_rollout_step_and_the_next_run_resumes(server: Server) -> None:
    ended: dict[str, float] = {}
    graph = training("live-cancel", **LONG)
    cut = server.run(graph, on_event=cancel_at_step(server, 4, ended))
    assert cut.status == "interrupted"
    (folder,) = (server.output / "dopsd").glob("live-cancel-*")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    # K rollout steps, each with a forward of student and teacher and a backward; saving comes on top
    one_step = sorted(row["seconds"] for row in rows if "seconds" in row)[len(rows) // 2]
    assert ended["stopped"] - ended["asked"] < one_step + 0.5
    (checkpoint,) = (folder / "checkpoints").iterdir()
    reached = int(checkpoint.name.removeprefix("step-"))
    assert reached >= 4 and (folder / "lora.safetensors").exists()
    graph["train"]["inputs"]["steps"] = reached + 2
    again = server.run(graph)
    assert again.status == "success", again.error
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows][-3:] == [reached, reached + 1, reached + 2]


@pytest.mark.long
def test_base_output_is_the_same_to_the_bit(server: Server) -> None:
    before = drawn_pixels(server)
    assert server.run(training("live-base", steps=2)).status == "success"
    assert drawn_pixels(server) == before
    assert server.run(training("live-base", steps=2, learning_rate=0.1, warmup=0, seed=3)).status in (
        "success",
        "error",
    )
    assert drawn_pixels(server) == before
    ended: dict[str, float] = {}
    run = server.run(training("live-base-2", **LONG), on_event=cancel_at_step(server, 2, ended))
    assert run.status == "interrupted"
    assert drawn_pixels(server) == before


@pytest.mark.long
def test_memory_does_not_grow_from_run_to_run(server: Server) -> None:
    def trained(seed: int) -> int:
        run = server.run(training("live-memory", seed=seed, steps=2, preview_every=2))
        assert run.status == "success", run.error
        return server.rss()

    warm = [trained(seed) for seed in range(2)][-1]
    later = [trained(seed) for seed in range(2, 5)]
    # what leaks grows in every run; the allocator's own arenas grow in some and then stay
    growth = [after - before for before, after in zip([warm, *later], later, strict=False)]
    assert min(growth) < 8 * 2**20, growth


# -- bad input ---------------------------------------------------------------------------------------------------------


def changed(node: str, **inputs: Any) -> dict:
    graph = training("bad", steps=1, preview_every=0)
    graph[node]["inputs"].update(inputs)
    return graph


def without_captions(server: Server) -> dict:
    folder = server.input / "no_captions"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(folder / "one.png")
    return changed("data", folder="no_captions")


def broken_image(server: Server) -> dict:
    folder = server.input / "broken"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(folder / "one.png")
    data = (folder / "one.png").read_bytes()
    (folder / "one.png").write_bytes(data[: len(data) // 2])
    (folder / "one.txt").write_text("a [V] thing")
    return changed("data", folder="broken")


def no_vision(server: Server) -> dict:
    graph = changed("conditions")
    del graph["conditions"]["inputs"]["vision"]
    return graph


def folder_run_by_others(server: Server) -> dict:
    assert server.run(changed("train", run_name="full", steps=3)).status == "success"
    return changed("train", run_name="full", steps=2)


BAD: dict[str, tuple[Any, str]] = {
    "no such folder": (
        lambda _: changed("data", folder="nowhere"),
        "there is no dataset 'nowhere'; put it into its own folder in ",
    ),
    "a folder outside": (
        lambda _: changed("data", folder="../../etc"),
        "the dataset '../../etc' is outside of the folders that D-OPSD may read; put it into",
    ),
    "no captions": (without_captions, "one.png: no caption: write it to one.txt beside it"),
    "a broken image": (broken_image, "one.png: truncated or damaged"),
    "no vision": (no_vision, "the teacher needs a vision tower: connect `vision` of Load Teacher Vision (Qwen3-VL-4B)"),
    "a run name that is a path": (
        lambda _: changed("train", run_name="../out"),
        "the run name '../out' may not contain '/'; use letters, digits, - and _",
    ),
    "an empty run name": (lambda _: changed("train", run_name=" "), "the run name is empty"),
    "fewer steps than were trained": (folder_run_by_others, "is already at step 3; raise steps (2)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_reported_in_words(server: Server, case: str) -> None:
    make, sentence = BAD[case]
    run: Run = server.run(make(server))
    assert run.status in ("refused", "error") or run.refusal
    assert sentence in run.error or sentence in json.dumps(run.refusal, ensure_ascii=False), run.error or run.refusal
    assert not list((server.output / "dopsd").glob("bad-*")), "nothing may be written for input that is refused"


def test_the_log_holds_no_traceback_of_ours_and_no_warning_of_lora_keys(server: Server) -> None:
    text = Path(server.log).read_text(encoding="utf-8", errors="replace")
    assert not re.search(r"IMPORT FAILED.*DOPSD", text)
    assert "lora key not loaded" not in text
