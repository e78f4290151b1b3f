"""What is said twice in the repository's own files says the same."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import dopsd_core

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PYPROJECT["project"]["version"]


def requirements(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_one_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION), "the Comfy Registry takes three numbers"
    assert dopsd_core.__version__ == VERSION


def test_the_changelog_is_headed_by_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == VERSION


def test_comfyui_installs_what_the_package_depends_on():
    assert requirements("requirements.txt") == PYPROJECT["project"]["dependencies"]
    assert not any(re.match(r"torch\b", line) for line in requirements("requirements.txt")), "torch is the user's"


@pytest.mark.parametrize("line", requirements("requirements.txt"))
def test_what_is_required_is_used(line):
    """Somewhere in the core or in the nodes; ComfyUI installs it into the user's environment."""
    name = re.split(r"[^\w-]", line)[0]
    module = {"pillow": "PIL"}.get(name, name)
    sources = [
        path.read_text(encoding="utf-8") for room in ("dopsd_core", "nodes") for path in (ROOT / room).rglob("*.py")
    ]
    assert any(re.search(rf"^\s*(from|import) {module}\b", source, re.MULTILINE) for source in sources)


@pytest.mark.parametrize("kind", ["standalone", "dev", "comfyui", "metrics"])
def test_every_version_is_fixed(kind):
    lines = requirements(f"requirements-{kind}.txt")
    assert all(re.match(r"[\w.-]+==[\w.]+($|; )", line) for line in lines)


def test_metrics_and_comfyui_share_their_versions():
    """Both are installed without dependencies, one after the other."""
    comfyui = {line.partition("==")[0]: [] for line in requirements("requirements-comfyui.txt")}
    for line in requirements("requirements-comfyui.txt"):
        comfyui[line.partition("==")[0]].append(line)
    metrics = requirements("requirements-metrics.txt")
    assert all(line in comfyui.get(line.partition("==")[0], [line]) for line in metrics)


def test_the_registry_gets_what_it_asks_for():
    comfy, urls = PYPROJECT["tool"]["comfy"], PYPROJECT["project"]["urls"]
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"]), "comfy-cli drops a version of two numbers"
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    _, image = comfy["Icon"].rsplit("/main/", 1)
    assert (ROOT / image).exists()


DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
OUR_FOLDERS = ("dopsd_core", "nodes", "tests", "tools", "benchmarks")
NOT_OURS = {"comfy/supported_models.py", "comfy/utils.py", "dopsd_core/families/my_model.py"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_module_that_a_document_names_is_there(name):
    """By its path from the root, from the core, from the nodes or, alone, by its name."""
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w.]+/)*\w+\.py)`", text)) - NOT_OURS
    ours = [path for folder in OUR_FOLDERS for path in (ROOT / folder).rglob("*.py")]
    there = ["/" + path.relative_to(ROOT).as_posix() for path in ours]
    assert [path for path in sorted(named) if not any(known.endswith("/" + path) for known in there)] == []


def test_the_map_has_every_module_of_core_and_pack():
    """CONTRIBUTING names it, a pattern of its name, or one of its folders; nodes are named as they are."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("## The path of a training image")
    spots = set(re.findall(r"`([\w./*]+(?:\.py|/))`", rest.partition("\n## A new")[0]))
    folders = {spot for spot in spots if spot.endswith("/")} - {"dopsd_core/", "nodes/", "nodes/comfy_host/"}
    folders -= {"dopsd_core/standalone/"}
    patterns = [spot.rsplit("/", 1)[-1] for spot in spots if spot.endswith(".py")]

    def is_there(path: Path) -> bool:
        inside = any(f"/{folder}" in f"/{path.parent.as_posix()}/" for folder in folders)
        return inside or path.parent.as_posix() == "nodes" or any(fnmatch(path.name, pattern) for pattern in patterns)

    ours = [path.relative_to(ROOT) for root in ("dopsd_core", "nodes") for path in (ROOT / root).rglob("*.py")]
    assert [str(path) for path in ours if path.name != "__init__.py" and not is_there(path)] == []
