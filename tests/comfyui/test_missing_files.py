"""A ComfyUI without the models' files: it names them when a workflow shall run; its page says where to get them."""

from __future__ import annotations

import json
import re

import pytest
from browser import ComfyPage
from graphs import shipped
from inprocess import ROOT
from live import Server
from templates import MODELS

ON_FILES = [
    path.stem for path in sorted((ROOT / "workflows" / "api").glob("*.json")) if "UNETLoader" in path.read_text()
]


def named_files(workflow: str) -> set[str]:
    """The models' files that it asks for."""
    return {value for node in shipped(workflow).values() for value in node["inputs"].values() if str(value) in MODELS}


@pytest.mark.parametrize("workflow", ON_FILES)
def test_nothing_runs_and_each_file_is_named(server: Server, workflow: str) -> None:
    status, answer = server.send("/prompt", {"prompt": shipped(workflow)})
    assert status == 400 and len(named_files(workflow)) >= 3
    reported = {
        error["extra_info"]["received_value"]
        for node in answer["node_errors"].values()
        for error in node["errors"]
        if error["type"] == "value_not_in_list" and error["extra_info"]["received_value"] in error["details"]
    }
    assert named_files(workflow) <= reported


def test_the_page_says_where_they_are_had(page: ComfyPage) -> None:
    workflow = json.loads((ROOT / "workflows" / "z_image_turbo_train.json").read_text(encoding="utf-8"))
    page.load_workflow(workflow)
    page.page.get_by_text(re.compile("Show missing models|View details")).first.click()  # ComfyUI 0.28, 0.33
    copies = page.page.locator('[data-testid="missing-model-copy-url"], [aria-label="Copy URL"]')
    copies.first.wait_for()
    page.screenshot("missing_models")
    page.page.evaluate("() => { window.copied = []; navigator.clipboard.writeText = async text => copied.push(text); }")
    for button in copies.all():
        button.click()
    files = named_files("z_image_turbo_train")
    assert len(files) == 4
    # what is copied is the page of the file; the button beside it takes the link itself
    places = [MODELS[file]["url"].replace("/resolve/", "/blob/") for file in files]
    assert sorted(page.page.evaluate("() => window.copied")) == sorted(places)
    text = page.page.locator("body").inner_text()
    assert all(file in text and MODELS[file]["directory"] in text for file in files)
    assert page.page.get_by_test_id("missing-model-download").count() == len(files)
