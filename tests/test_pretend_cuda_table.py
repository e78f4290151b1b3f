"""The table of the pretend device says what ran, what failed and what has not run."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from benchmarks.pretend_cuda_table import Count, Result, everything, forms_section, modes_section, parts, read

REPORT = """<testsuite>
<testcase classname="a" name="test_trainings[bf16]"/>
<testcase classname="a" name="test_gradients[some-bf16]"><failure/></testcase>
<testcase classname="a" name="test_two_waits_per_optimizer_step_and_none_in_the_backward[bf16]">
<properties><property name="waits" value="2"/></properties></testcase>
<testcase classname="a" name="test_other"><skipped/></testcase>
<testcase classname="a" name="test_broken[bf16]"><error/></testcase>
</testsuite>"""


def rows(results: dict) -> list[tuple[str, ...]]:
    return [row for row in modes_section(results).table.rows if row[4] != "not run"]


def all_parts_passed() -> dict[tuple[str, ...], Result]:
    return {tuple(part.key): Result(Count(passed=3), date="2026-01-02", cpu_seconds=120) for part in parts()}


def test_a_report_is_counted_by_how_tests_ended_and_by_form() -> None:
    result = read(ElementTree.fromstring(REPORT))
    assert result.tests == Count(2, 2, 1)
    assert result.failures == ["a::test_gradients[some-bf16]", "a::test_broken[bf16]"]
    form = result.forms["bf16"]
    assert (form.tests, form.waits, form.trains) == (Count(2, 1), "2", "yes")


def test_what_has_not_run_says_so_and_is_no_success() -> None:
    section = modes_section({})
    assert not section.passed
    assert {row[4] for row in section.table.rows} == {"not run"} and len(section.table.rows) == len(parts()) + 10


def test_every_part_without_a_failure_is_a_success() -> None:
    results = all_parts_passed()
    assert modes_section(results).passed and len(rows(results)) == len(parts())
    assert rows(results)[0][3:] == ("2026-01-02", "3 passed", "2")
    results.popitem()
    assert not modes_section(results).passed


def test_one_failure_anywhere_fails_the_section_and_is_named() -> None:
    other = {tuple(everything()[0].key): Result(Count(5, 1), failures=["test_x"])}
    section = modes_section({**all_parts_passed(), **other})
    assert not section.passed and "test_x" in section.notes[-1]


def test_a_mode_that_ran_in_part_says_which() -> None:
    first, second, *_ = everything()
    (row,) = rows({tuple(w.key): Result(Count(5)) for w in (first, second)})
    assert row[4] == f"10 passed ({first.group}, {second.group} alone; the rest has not run)"


def test_a_base_that_failed_fails_its_section() -> None:
    result = read(ElementTree.fromstring(REPORT))
    section = forms_section({tuple(everything()[0].key): result})
    assert not section.passed and section.table.rows[0][2:] == ("bf16", "2 passed, 1 failed", "2", "yes")
    assert not forms_section({}).passed
