"""The commands of the documents are accepted by the command line, scripts by bash, and jobs by a reader of YAML."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dopsd_core.arguments import parse_args

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """(page, arguments) of each command of this package in blocks of code, its lines joined."""
    found = []
    for page in PAGES:
        for line in [line for _, block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]:
            _, launcher, words = line.partition("-m dopsd_core ")
            if launcher and not {"...", "|"} & set(words.split()):
                found.append((page.name, words))
    return found


COMMANDS = commands()


def test_there_are_some() -> None:
    assert len(COMMANDS) >= 12 and "scaling.md" in {page for page, _ in COMMANDS}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page} {words[:60]}" for page, words in COMMANDS])
def test_it_is_accepted(page: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        parse_args(shlex.split(words, comments=True))
    except SystemExit as error:
        assert error.code == 0, capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash")
def test_scripts_are_bash() -> None:
    scripts = [text for page in PAGES for _, text in blocks(page) if text.startswith("#!/bin/bash")]
    assert len(scripts) >= 2
    for script in scripts:
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert checked.returncode == 0 and not checked.stderr, checked.stderr


def test_the_job_is_yaml_whose_command_is_accepted() -> None:
    yaml = pytest.importorskip("yaml")
    (job,) = [text for page in PAGES for language, text in blocks(page) if language == "yaml" and "kind: Job" in text]
    (container,) = yaml.safe_load(job)["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    assert parse_args(words[words.index("dopsd_core") + 1 :]).command == "encode"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in yaml.safe_load(job)["spec"]["template"]["spec"]["volumes"]}
