"""Where the benchmarks leave what they measured: a JSON file per page of docs/, and the page written from it.

    record(Section(key="kills", title="...", ...), RELIABILITY)
    record(Section(key="demo", title="...", ...), RESULTS)

The JSON holds one section per measurement; the page beside it (the same name, .md) is written from the JSON alone.
A measurement of hours keeps a journal, so that the same command continues after a stop.

    python -m benchmarks.report        both pages anew, from their JSON
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dopsd_core.demo.model_files import MODEL_FILE, WEIGHTS
from dopsd_core.files.atomic import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results.json"
RELIABILITY = ROOT / "docs" / "reliability.json"
_CODE = ("dopsd_core", "nodes", "benchmarks", "tests")
_EARLIER = "Measured on earlier weights of the demo model; those that ship now have not been measured here yet."
WORK = ROOT / "build" / "reliability"
"""Journals and files of measurements in progress; not under version control."""


@dataclass(frozen=True)
class Page:
    """What a page says before its sections.

    Attributes:
        order: keys of its sections, in order; others follow by name.
        intro: Markdown with the page's heading.
        on_demo_model: whether its sections are measured on the demo model; those of earlier weights are marked.
    """

    order: tuple[str, ...]
    intro: str
    on_demo_model: bool = False


PAGES = {
    "reliability": Page(
        ("kills", "server-kills", "fuzz", "trainings", "moments", "paths", "pretend-cuda"),
        """# Reliability

Written by `python -m benchmarks.reliability render` from reliability.json; every section says which command measured it, when, and on what machine. A section is marked PASSED only by the script that measured it.
""",  # noqa: E501
    ),
    "results": Page(
        (
            "demo",
            "demo-concepts",
            "full-weights",
            "quickstart",
            "step-cost",
            "step-cost-4",
            "learning-curves",
            "learning-curves-differences",
        ),
        """# Results

Written by the scripts in `benchmarks/` into results.json, and from there by `python -m benchmarks.report`; every section says which command measured it, when, and on what machine. All of it is measured on the embedded demo model. None of it says anything about Z-Image-Turbo, FLUX.2-klein or Krea 2 Turbo with their real weights, on which nobody has run the pack yet.

What to keep in mind:

- The demo's world is tiny: badges, a hundred names, two steps ([demo-model.md](demo-model.md)). FLUX.2-klein's teacher is another than the demo's.
- *Untouched* is the model before training; *its teacher* is the same model when it sees a target. Columns that a section does not explain are explained below the first table.
- *Aims*: D-OPSD has prior anchors on half of the batches, and its teacher sees the image that is trained.
- *Speed*: K is the number of the student's steps, m how many of them are learned from, drawn evenly or *by gap*: the more often, the larger the gap to the teacher there has been.
- *Masks*: all training images have one background and one position. The columns are shares of images with that background or position, for prompts that name others and for a prompt that names none; *grey or white* is the share with such a background, as *grey* and *remove* show it to the teacher.
""",  # noqa: E501
        on_demo_model=True,
    ),
}


@dataclass(frozen=True)
class Table:
    """Text in rows under column titles.

    Attributes:
        columns: the titles.
        rows: as many cells each.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_markdown(self) -> str:
        """As Markdown; the bars and line breaks of a cell are escaped."""
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


@dataclass(frozen=True)
class Section:
    """One measurement.

    Attributes:
        key: name of the measurement, unique.
        title: heading on the page.
        command: the command that measured it.
        passed: whether everything was as it must be; None for a measurement that cannot fail.
        table: the figures.
        notes: sentences below the table.
        date: when it was measured; filled in by `measured_here`.
        machine: where it was measured; filled in by `measured_here`.
        model: digest of the demo model that ships; filled in by `measured_here`.
    """

    key: str
    title: str
    command: str
    passed: bool | None
    table: Table
    notes: tuple[str, ...] = ()
    date: str = ""
    machine: str = ""
    model: str = ""

    def to_markdown(self, *remarks: str) -> str:
        """Heading, verdict, figures and notes; remarks: more notes."""
        verdict = {True: "PASSED. ", False: "FAILED. ", None: ""}[self.passed]
        parts = [
            f"## {self.title}",
            f"{verdict}`{self.command}`, {self.date}, {self.machine}",
            self.table.to_markdown(),
            *self.notes,
            *remarks,
        ]
        return "\n\n".join(parts) + "\n"


def measured_here(section: Section, *facts: str) -> Section:
    """The section with today's date and this machine; facts: versions besides Python's and torch's."""
    machine = ", ".join([machine_facts(), *facts])
    return dataclasses.replace(
        section, date=datetime.date.today().isoformat(), machine=machine, model=demo_model_digest()
    )


def demo_model_digest() -> str:
    """8 hex digits: other for another demo model."""
    return hashlib.sha256((WEIGHTS / MODEL_FILE).read_bytes()).hexdigest()[:8]


def on_this_model(folder: Path) -> Path:
    """The part of a work folder that is of the demo model that ships: what another one did is not measured."""
    return folder / f"model-{demo_model_digest()}"


def record(section: Section, results: Path) -> None:
    """Puts the section in place of an older one of its key, and writes the page anew."""
    sections = {**load_sections(results), section.key: section}
    ordered = {key: dataclasses.asdict(sections[key]) for key in _ordered(sections, results)}
    results.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(results, (json.dumps(ordered, indent=2, ensure_ascii=False) + "\n").encode())
    render(results)


def render(results: Path) -> Path:
    """Writes the page from the JSON; gives the page's path."""
    sections, about = load_sections(results), page_of(results)
    parts = [about.intro]
    for section in (sections[key] for key in _ordered(sections, results)):
        other = about.on_demo_model and section.model != demo_model_digest()
        parts.append(section.to_markdown(*([_EARLIER] if other else [])))
    page = results.with_suffix(".md")
    write_atomic(page, "\n".join(parts).encode())
    return page


def load_sections(results: Path) -> dict[str, Section]:
    """The sections of a results file by key; none where there is no file."""
    if not results.exists():
        return {}
    found = json.loads(results.read_text(encoding="utf-8"))
    return {key: _section_from(fields) for key, fields in found.items()}


def machine_facts() -> str:
    """Processor, cores, memory, Python, torch and the commit, in words."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    return (
        f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {memory:.0f} GB, "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, commit {_commit()}"
    )


def comfyui_version() -> str:
    """Of the checkout that is measured, in words."""
    checkout = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    try:
        found = re.search(r'"([\d.]+)"', (checkout / "comfyui_version.py").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return f"ComfyUI {found[1]}" if found else "no ComfyUI"


def code_digest() -> str:
    """16 hex digits: other for other code of the pack."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("dopsd_core", "nodes") for path in (ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}|".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write_scaling_table(key: str, text: str) -> None:
    """Puts a table between its marks in docs/scaling.md, and prints it."""
    marked = f"<!-- results:{key} -->\n{text}\n<!-- /results -->"
    old = re.compile(f"<!-- results:{key} -->\n.*?<!-- /results -->", re.DOTALL)
    page = ROOT / "docs" / "scaling.md"
    page.write_text(old.sub(lambda match: marked, page.read_text(encoding="utf-8")), encoding="utf-8")
    print(marked)


def record_scaling(key: str, facts: Mapping[str, object], runs: Sequence[Any], text: str) -> None:
    """Writes docs/<key>.json with the facts and the runs, which are dataclasses, and the table of docs/scaling.md."""
    data = {**facts, "runs": [dataclasses.asdict(run) for run in runs]}
    (ROOT / "docs" / f"{key}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    where = "{date}, {cores} cores, load {load:.1f} before, {machine}.".format(**facts)
    write_scaling_table(key, f"{text}\n\n{where}")


def facts_of_machine() -> dict[str, object]:
    """Date, cores, load and architecture."""
    date, machine = str(datetime.date.today()), platform.machine()
    return {"date": date, "cores": os.cpu_count(), "load": os.getloadavg()[0], "machine": machine}


def counts_table(rows: Sequence[tuple[str, object]]) -> Table:
    """A table of two columns."""
    return Table(("what", "figure"), tuple((name, str(value)) for name, value in rows))


def page_of(results: Path) -> Page:
    """The page that is written from this JSON file, by the file's name; one without an order for another name."""
    return PAGES.get(results.stem, Page((), f"# {results.stem}\n"))


def _ordered(sections: Mapping[str, Section], results: Path) -> list[str]:
    order = page_of(results).order
    return sorted(sections, key=lambda key: (order.index(key) if key in order else len(order), key))


def _section_from(fields: Mapping[str, Any]) -> Section:
    table = fields["table"]
    rows = tuple(tuple(row) for row in table["rows"])
    known = {**fields, "table": Table(tuple(table["columns"]), rows), "notes": tuple(fields["notes"])}
    return Section(**known)


def _cell(text: str) -> str:
    lines = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in text.split("\n"))
    return "<br>".join(lines).replace("|", "\\|")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's, "-dirty" where the code is another; the page itself changes with every measurement."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "--", *_CODE) else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    for page in (RESULTS, RELIABILITY):
        render(page)
