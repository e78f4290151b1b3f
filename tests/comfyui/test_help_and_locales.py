"""What users read and see: help pages, names and tooltips in two languages, colours; as files, served, in the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from inprocess import PACK, ROOT
from make_locales import CONTROL, SETTINGS_HELP, options_table, places, read, schema_texts, with_table

LANGUAGES = ("en", "zh")
DOCS = ROOT / "web" / "docs"
LINK_TYPES = ("DOPSD_DATASET", "DOPSD_CONDITIONS", "DOPSD_VISION", "DOPSD_SETTINGS")
BODY = (0x26, 0x3E, 0x4F)  # of our nodes in dark themes, as in web/dopsd.js


def help_page(node: str, language: str) -> Path:
    return DOCS / f"{node}.md" if language == "en" else DOCS / node / f"{language}.md"


def table_rows(text: str) -> set[str]:
    """The words of the first column of every table: the id, behind its translation if there is one."""
    return {word for cell in re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE) for word in cell.split()}


# -- files -------------------------------------------------------------------------------------------------------------


def test_english_is_the_schema(comfyui):
    remedy = "run tools/make_locales.py, and check the Chinese of what it lists as changed"
    assert places(read("en")) == places(schema_texts(comfyui.pack_nodes)), remedy


def test_the_english_table_of_options_is_what_they_declare(comfyui):
    page = SETTINGS_HELP.read_text(encoding="utf-8")
    assert options_table(comfyui) in page, "run tools/make_locales.py, and check the Chinese page"
    assert with_table(page, options_table(comfyui)) == page
    (facts,) = re.findall(r"^\| rank \| (.+?) \|", page, re.MULTILINE)
    assert facts.endswith("; default 32")  # the preset's value, not the core's


def test_every_text_is_there_and_in_chinese():
    english, chinese = places(read("en")), places(read("zh"))
    assert chinese.keys() == english.keys()
    assert all(english.values()) and all(chinese.values())
    kept = {place for place, text in chinese.items() if not re.search(r"[\u4e00-\u9fff]", text)}
    assert all(place.endswith(".name") for place in kept), kept  # words such as VAE, LoRA, alpha


def test_both_languages_give_the_same_numbers():
    """Steps of each model, ranges, defaults: words differ, these cannot."""
    english, chinese = places(read("en")), places(read("zh"))
    numbers = {place: [sorted(re.findall(r"\d+(?:\.\d+)?", t[place])) for t in (english, chinese)] for place in english}
    assert not {place: both for place, both in numbers.items() if both[0] != both[1]}


def test_nothing_reads_as_markup_of_the_page():
    """Names and descriptions go through vue-i18n, to which { } @ and | are instructions."""
    for language in LANGUAGES:
        marked = {place for place, text in places(read(language)).items() if re.search(r"[{}@|]", text)}
        assert not marked


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_names_every_input_and_output(comfyui, language):
    for name, node in comfyui.pack_nodes.items():
        schema = node.GET_SCHEMA()
        rows = table_rows(help_page(name, language).read_text(encoding="utf-8"))
        shown = {given.id for given in schema.inputs if not (given.extra_dict or {}).get("hidden")}
        named = shown | {output.display_name for output in schema.outputs}
        assert named <= rows, f"{name}: {named - rows}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_names_the_presets_as_they_are(comfyui, language):
    text = help_page("DOPSD_TrainLoRA", language).read_text(encoding="utf-8")
    papers = comfyui.core("families").Z_IMAGE.paper_steps
    for name, preset in comfyui.module("nodes.comfy_host.presets").PRESETS.items():
        (row,) = re.findall(rf"^\| {re.escape(name)} \| (.+) \|$", text, re.MULTILINE)
        numbers = [float(number) for number in re.findall(r"\d+", row)[:3]]
        assert numbers == [preset.steps or papers, preset.rank, preset.alpha], name


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_quotes_the_teachers(comfyui, language):
    """Their sentences are to be read, so that users can write better ones."""
    text = " ".join(help_page("DOPSD_BuildTeacherCondition", language).read_text(encoding="utf-8").split())
    for name, teacher in comfyui.core("conditioning.teachers").TEACHER_VIEWS.items():
        assert f"| {name} |" in text and teacher.sentence in text and teacher.of_others in text, name


def test_no_help_without_a_node(comfyui):
    pages = {path.relative_to(DOCS) for path in DOCS.rglob("*.md")}
    assert pages == {help_page(name, lang).relative_to(DOCS) for name in comfyui.pack_nodes for lang in LANGUAGES}


# -- the server --------------------------------------------------------------------------------------------------------


def test_i18n_has_every_node_and_input(server):
    translated = server.get("/i18n")
    ours = {k: v for k, v in server.get("/object_info").items() if v["python_module"] == f"custom_nodes.{PACK}"}
    assert len(ours) == len(read("en"))
    for language in LANGUAGES:
        texts = translated[language]["nodeDefs"]
        for name, info in ours.items():
            inputs = {key for group in ("required", "optional") for key in info["input"].get(group, {})}
            assert texts[name]["display_name"] and texts[name]["description"]
            assert inputs == texts[name].get("inputs", {}).keys() - {CONTROL}
            assert all(texts[name]["inputs"][key]["tooltip"] for key in inputs)
            assert len(info["output"]) == len(texts[name]["outputs"])


def test_help_is_served(server):
    for name in read("en"):
        for language in LANGUAGES:
            path = help_page(name, language)
            served = server.get_bytes(f"/extensions/{PACK}/docs/{path.relative_to(DOCS).as_posix()}")
            assert served == path.read_bytes()


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_page(chromium, server, artefacts) -> Iterator[Callable[..., Any]]:
    """open_page({setting: value}): ComfyUI's page under these settings; they are as before afterwards."""
    import browser

    @contextmanager
    def opened(settings: dict[str, Any]) -> Iterator[Any]:
        file = server.base / "user" / "default" / "comfy.settings.json"
        before = file.read_text(encoding="utf-8")
        file.write_text(json.dumps({**json.loads(before), **settings}), encoding="utf-8")
        page = browser.ComfyPage(chromium, server.url, artefacts)
        try:
            yield page
        finally:
            page.close()
            file.write_text(before, encoding="utf-8")

    with ExitStack() as stack:
        yield lambda settings: stack.enter_context(opened(settings))


def show_help(page: Any, node: str) -> str:
    """Selects the node, presses its Node Info button, and reads the panel."""
    page.load_api({"1": {"class_type": node, "inputs": {}}})
    page.page.evaluate("() => window.app.canvas.selectNode(window.app.graph.nodes[0])")
    panel = page.page.locator(".node-help-content")
    if not panel.count():
        page.page.get_by_test_id("info-button").first.click()
    panel.locator("h1").first.wait_for()
    page.page.wait_for_timeout(300)
    return panel.inner_text()


@pytest.mark.long
@pytest.mark.browser
def test_help_in_english(open_page):
    page = open_page({"Comfy.VueNodes.Enabled": True, "Comfy.Locale": "en"})
    for node, texts in read("en").items():
        text = show_help(page, node)
        assert text.startswith(texts["display_name"]) and "What goes wrong" in text
        rows = table_rows(help_page(node, "en").read_text(encoding="utf-8"))
        assert all(name in text for name in texts.get("inputs", {}).keys() & rows)
    show_help(page, "DOPSD_TrainLoRA")
    page.screenshot("help_en")


@pytest.mark.long
@pytest.mark.browser
def test_the_page_in_chinese(open_page):
    page = open_page({"Comfy.VueNodes.Enabled": True, "Comfy.Locale": "zh"})
    chinese = read("zh")["DOPSD_FewStepSampler"]
    assert show_help(page, "DOPSD_FewStepSampler").startswith(chinese["display_name"])
    page.screenshot("page_zh")
    node = page.page.locator("[data-node-id]").first.inner_text()
    inputs = [text["name"] for key, text in chinese["inputs"].items() if key != CONTROL]
    assert all(name in node for name in (*inputs, chinese["outputs"]["0"]["name"]))
    title = page.page.evaluate("() => LiteGraph.createNode('DOPSD_FewStepSampler').title")
    assert title == chinese["display_name"]


@pytest.mark.long
@pytest.mark.browser
@pytest.mark.parametrize("vue", [True, False], ids=["nodes2", "classic"])
def test_colours(open_page, vue):
    page = open_page({"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": "dark", "Comfy.Locale": "en"})
    page.load_api(json.loads((ROOT / "workflows" / "api" / "quickstart.json").read_text(encoding="utf-8")))
    colours = link_colours(page)
    assert len({colour for row in colours for colour in row}) == len(LINK_TYPES)
    assert share_of(BODY, page.screenshot(f"colours_dark_{vue}")) > 0.02
    page.page.evaluate("() => window.app.extensionManager.setting.set('Comfy.ColorPalette', 'light')")
    page.page.wait_for_timeout(800)
    page.screenshot(f"colours_light_{vue}")
    assert link_colours(page) == colours  # another theme has not emptied them
    saved = page.saved()["workflow"]
    ours = [node for node in saved["nodes"] if node["type"].startswith("DOPSD_")]
    assert ours and all(node["bgcolor"] for node in ours)
    assert not any(node.get("bgcolor") for node in saved["nodes"] if node not in ours)
    for node in ours:  # the user takes them off
        del node["color"], node["bgcolor"]
    page.load_workflow(saved)
    assert not any(node.get("bgcolor") for node in page.saved()["workflow"]["nodes"])


def link_colours(page: Any) -> list[list[str]]:
    """Of each of our types: its slots in the classic canvas, its links, its slots in Nodes 2.0."""
    return page.page.evaluate(
        """types => types.map(type => [
            app.canvas.default_connection_color_byType[type],
            app.canvas.constructor.link_type_colors[type],
            getComputedStyle(document.documentElement).getPropertyValue(`--color-datatype-${type}`).trim(),
        ])""",
        LINK_TYPES,
    )


def share_of(colour: tuple[int, int, int], screenshot: Path) -> float:
    """Share of pixels that are of this colour."""
    from PIL import Image

    image = Image.open(screenshot).convert("RGB")
    counts = {value: count for count, value in image.getcolors(image.width * image.height) or []}
    return counts.get(colour, 0) / (image.width * image.height)
