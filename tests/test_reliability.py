"""The reliability scripts find what they are there to find: each is shown a fault that was planted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource", reason="the scripts use POSIX limits and signals")

from benchmarks import journal, reliability, reliability_fuzz, reliability_kills, report  # noqa: E402
from benchmarks.journal import Journal  # noqa: E402
from benchmarks.reliability_attempts import Attempt, Field  # noqa: E402
from benchmarks.reliability_case import Case, shrink, try_case  # noqa: E402
from benchmarks.reliability_fuzz import Fuzz, Task  # noqa: E402
from benchmarks.reliability_inputs import KINDS, Broken, Kind, Refused  # noqa: E402
from benchmarks.reliability_mutators import Chance, mutate_json, mutate_safetensors  # noqa: E402
from benchmarks.reliability_paths import Answer, Audit, summary  # noqa: E402
from benchmarks.reliability_trees import Tree, snapshot  # noqa: E402
from benchmarks.report import Section, Table, load_sections, measured_here, record  # noqa: E402
from dopsd_core.data.captions import CaptionError  # noqa: E402
from dopsd_core.training.run import Run  # noqa: E402


def section(key: str, **changes: Any) -> Section:
    fields = {"title": key, "command": "run", "passed": True, "table": Table(("a", "b"), (("1|2", "3\n4\0"),))}
    return Section(key=key, **(fields | changes))


# -- the damage --------------------------------------------------------------------------------------------------------


def test_what_was_damaged_before_can_be_damaged_again() -> None:
    """An integer beyond any float, and a tensor whose shape has become a number."""
    header = json.dumps({"x.lora_A": {"dtype": "F32", "shape": 7, "data_offsets": [0, 0]}}).encode()
    for seed in range(300):
        mutate_json({"size": 10**400, "other": -(10**400)}, Chance(seed))
        mutate_safetensors(len(header).to_bytes(8, "little") + header, Chance(seed))


# -- the page ----------------------------------------------------------------------------------------------------------


def test_a_section_is_kept_and_written_to_the_page_in_its_place(tmp_path: Path) -> None:
    results = tmp_path / "reliability.json"
    record(section("paths"), results)
    record(section("kills", passed=False), results)
    record(measured_here(section("paths", notes=("a note",)), "ComfyUI 1"), results)
    assert list(load_sections(results)) == ["kills", "paths"]
    page = results.with_suffix(".md").read_text(encoding="utf-8")
    assert page.index("## kills") < page.index("## paths")
    assert "FAILED. `run`" in page and "PASSED. `run`, 20" in page and "ComfyUI 1" in page and "a note" in page
    assert "| 1\\|2 | 3<br>4\\x00 |" in page


def test_what_was_measured_on_earlier_weights_of_the_demo_model_says_so(tmp_path: Path) -> None:
    results, other = tmp_path / "results.json", tmp_path / "reliability.json"
    for file in (results, other):
        record(section("old", model="01234567"), file)
        record(measured_here(section("quite new")), file)
    page = results.with_suffix(".md").read_text(encoding="utf-8")
    old, new = page[page.index("## old") :].split("## quite new")
    assert "earlier weights" in old and "earlier weights" not in new
    assert "earlier weights" not in other.with_suffix(".md").read_text(encoding="utf-8")


def test_a_journal_loses_the_line_that_a_kill_cut(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal.open(path)
    journal.append({"n": 1})
    journal.append({"n": 2})
    path.write_bytes(path.read_bytes()[:-3])
    assert Journal.open(path).rows == [{"n": 1}]
    Journal.open(path).append({"n": 3})
    assert Journal.open(path).rows == [{"n": 1}, {"n": 3}]
    assert Journal.open(path, fresh=True).rows == []


def test_a_journal_of_other_code_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    Journal.open(path).append({"n": 1})
    monkeypatch.setattr(journal, "code_digest", lambda: "other")
    assert Journal.open(path).rows == []


def test_what_another_demo_model_did_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    Journal.open(path).append({"n": 1})
    folder = report.on_this_model(tmp_path)
    for module in (journal, report):
        monkeypatch.setattr(module, "demo_model_digest", lambda: "another")
    assert Journal.open(path).rows == []
    assert report.on_this_model(tmp_path) != folder


def test_every_command_has_its_measurement() -> None:
    wanted = {"kills": 200, "server-kills": 10, "fuzz": 50_000, "trainings": 200, "moments": None, "paths": None}
    for command, count in wanted.items():
        args = reliability.make_parser().parse_args([command])
        assert callable(reliability.COMMANDS[args.command][0])
        assert getattr(args, "count", None) == count


# -- fuzzing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_good_inputs_are_accepted_and_inputs_are_the_same_each_time(kind: Kind, tmp_path: Path) -> None:
    outcomes = [try_case(Case(kind, 0, number, ()), tmp_path) for number in range(6)]
    assert not any(outcome.failure for outcome in outcomes)
    if kind.name not in ("configs", "datasets", "rows"):  # whose readers draw nonsense of their own
        assert {outcome.outcome for outcome in outcomes} == {"accepted"}
    assert sum(outcome.outcome == "accepted" for outcome in outcomes) >= 3
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        Case(kind, 0, 3).write(folder)
        written.append({path[len(os.fsencode(folder)) :]: what for path, what in snapshot(folder).items()})
    assert written[0] == written[1] and written[0]


def planted(read: Any, *documented: type[Exception]) -> Kind:
    """A kind whose input is one file, x, to which mutation n adds its number."""

    def add(tree: Tree, chance: Chance) -> None:
        tree.files[b"x"] += bytes([chance.randrange(256)])

    return Kind("planted", 1, lambda _: Tree({b"x": b"good"}), [add], read, documented)


def raising(error: Exception) -> Any:
    def read(folder: Path, _: Chance) -> None:
        raise error

    return read


def foreign(folder: Path, _: Chance) -> None:
    int("x")


def overwriting(folder: Path, _: Chance) -> None:
    (folder / "x").write_bytes(b"other")


def leaving(folder: Path, _: Chance) -> None:
    (folder / "y").touch()


@pytest.mark.parametrize(
    ("read", "documented", "outcome", "failure"),
    [
        (raising(KeyError("k")), (ValueError,), "KeyError", "undocumented KeyError in tests/test_reliability.py"),
        (raising(UnicodeError("k")), (ValueError,), "UnicodeError", "undocumented UnicodeError"),
        (foreign, (ValueError,), "ValueError", "ValueError that is not our own, in tests/test_reliability.py"),
        (raising(FileNotFoundError("x")), (FileNotFoundError,), "FileNotFoundError", ""),
        (raising(Refused("by hand")), (), "by hand", ""),
        (raising(Broken("it broke\nhere")), (), "broken", "it broke"),
        (overwriting, (), "accepted", "the user's data changed"),
        (leaving, (), "accepted", "the user's data changed"),
    ],
)
def test_a_planted_fault_is_found(read, documented, outcome: str, failure: str, tmp_path: Path) -> None:
    verdict = try_case(Case(planted(read, *documented), 0, 0), tmp_path)
    assert verdict.outcome == outcome
    assert verdict.failure.startswith(failure) if failure else not verdict.failure


def test_a_documented_exception_of_ours_is_no_fault(tmp_path: Path) -> None:
    (kind,) = (kind for kind in KINDS if kind.name == "captions")
    verdicts = [try_case(Case(kind, 0, number), tmp_path) for number in range(30)]
    assert {verdict.outcome for verdict in verdicts} == {"accepted", CaptionError.__name__}
    assert not any(verdict.failure for verdict in verdicts)


def test_a_failure_is_made_small(tmp_path: Path) -> None:
    def read(folder: Path, _: Chance) -> None:
        if (folder / "x").stat().st_size > len("good") + 1:
            raise Broken("too long")

    small = shrink(Case(planted(read), 0, 0, (0, 1, 2, 3, 4)), "too long", tmp_path)
    assert len(small.mutations()) == 2


def test_a_worker_reads_its_task_and_a_dead_one_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(tmp_path / "journal.jsonl")
    Fuzz(0, tmp_path, journal, 4).run(Task("captions", 0, 4))
    assert reliability_fuzz.inputs_in(journal) == 4 and journal.rows[-1]["stop"] == 4
    assert reliability_fuzz.open_tasks("captions", 4, journal) == []
    assert reliability_fuzz.open_tasks("captions", 150, journal) == [Task("captions", 100, 150)]
    codes = iter([-9, 0])

    def die(self: Fuzz, task: Task, start: int, skip: list[int]) -> tuple[int, int | None]:
        if next(codes) == 0:
            return task.stop, None
        self._note_death(task, 5, -9, "Timeout (0:00:10)!")
        return start, 5

    monkeypatch.setattr(Fuzz, "_run_worker", die)
    Fuzz(0, tmp_path, journal, 8).run(Task("captions", 4, 8))
    page = reliability_fuzz.summary(journal, {"captions": 5}, 0)
    assert not page.passed and "1 times: captions: a hang" in page.notes


# -- kills -------------------------------------------------------------------------------------------------------------


def test_two_kills_end_with_the_bits_of_the_uncut_run(tmp_path: Path) -> None:
    page = reliability_kills.measure(count=2, steps=9, seed=0, work=tmp_path, fresh=True)
    assert page.passed, page.to_markdown()
    assert page.table.rows[0] == ("SIGKILLs", "2")


def test_a_torn_file_is_seen(tmp_path: Path) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    mark.write_bytes(b"\0")
    before = Run.save
    reliability_kills.train_marked(reliability_kills.configurations(9)[0].to_json(), str(run), str(mark))
    assert Run.save is before, "the marks are taken off again"
    assert reliability_kills.torn_files(run) == [] == reliability_kills.leftovers_of(run)
    newest = max((run / "checkpoints").iterdir())
    for path in (run / "lora.safetensors", newest / "optimizer.safetensors", run / "config.json"):
        path.write_bytes(path.read_bytes()[:-3])
    (run / ".lora.safetensors.0.tmp").touch()
    assert set(reliability_kills.torn_files(run)) == {newest.name, "lora.safetensors", "config.json"}
    assert reliability_kills.leftovers_of(run) == [".lora.safetensors.0.tmp"]


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def field(tmp_path: Path) -> Field:
    for name in ("input", "models/text_encoders", "output"):
        (tmp_path / "home" / name).mkdir(parents=True)
    field = Field(tmp_path / "home", tmp_path / "secret", tmp_path / "sets")
    field.lay_out()
    return field


def test_there_are_a_hundred_attempts_and_no_two_are_equal(field: Field) -> None:
    attempts = field.attempts()
    assert len(attempts) >= 100
    assert len({(attempt.kind, attempt.what) for attempt in attempts}) == len(attempts)
    assert not any(str(field.secret) in attempt.what for attempt in attempts)
    assert any(str(field.secret) in json.dumps(attempt.graph) for attempt in attempts)


def test_the_audit_tells_a_leak_from_ordinary_work(field: Field, tmp_path: Path) -> None:
    log = tmp_path / "audit.log"
    inside, link = field.base / "output" / "x.safetensors", field.base / "input" / "link_out" / "a.png"
    fine = [f"write\t{inside}", f"open\t{field.base}/input/good/a.png", "open\t/etc/hosts", "write\t/x/__pycache__/y"]
    bad = [f"open\t{link}", f"os.listdir\t{field.secret}", "write\t/tmp/elsewhere", "open\t/etc/passwd"]
    log.write_text("\n".join([*fine, *bad]) + "\n")
    audit = Audit(log, field)
    assert audit.leaks() == bad and audit.leaks() == []


def test_the_audit_resolves_names_below_an_open_folder(tmp_path: Path) -> None:
    """A folder that is removed whole: its files are named below its descriptor, not below the working folder."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").touch()
    code = "import shutil; from benchmarks.reliability_audit import start; start('audit.log'); shutil.rmtree('a')"
    environment = {**os.environ, "PYTHONPATH": str(report.ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)
    lines = [line.partition("\t") for line in (tmp_path / "audit.log").read_text().splitlines()]
    removed = [path for event, _, path in lines if event in ("os.remove", "os.rmdir")]
    assert removed == [str(tmp_path / name) for name in ("a/b/c.txt", "a/b", "a")]


def test_a_leak_or_a_failed_control_fails_the_section() -> None:
    attempt, answer = Attempt("kind", "../x"), Answer("success", "")
    assert summary([(attempt, answer, [])], []).passed
    assert not summary([(attempt, answer, ["open\tx"])], []).passed
    assert not summary([(attempt, answer, [])], ["a folder in input/: error"]).passed


def test_what_is_left_of_a_run_is_no_concern_of_the_next(tmp_path: Path) -> None:
    """The folders that the scripts work in are made anew."""
    work = tmp_path / "input"
    work.mkdir()
    (work / "stale").touch()
    Tree({b"a/b.txt": b"x"}, links={b"l": b"a"}, pipes={b"p"}, dirs={b"d"}).write(work)
    assert {path.name for path in work.iterdir()} == {"stale", "a", "l", "p", "d"}
    shutil.rmtree(work)
