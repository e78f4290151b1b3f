"""An error that all processes of a launch have is reported by one of them; one process's error by that process."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from dopsd_core.__main__ import main
from dopsd_core.standalone import one_voice
from dopsd_core.standalone.one_voice import announce, reports
from dopsd_core.training.world import LostPeer, PeerError
from tests.ranks import free_port

DAMAGED = ValueError("a.png is damaged")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is each of two that a launcher started, whose store is here."""
    store = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    yield
    del store


@pytest.mark.usefixtures("launched")
def test_each_error_is_reported_once() -> None:
    assert [reports(error) for error in (DAMAGED, DAMAGED, ValueError("b.png is damaged"))] == [True, False, True]
    assert not reports(PeerError("process 0 of 2 failed: a.png is damaged"))


@pytest.mark.usefixtures("launched")
def test_a_lost_process_is_reported_if_it_could_not_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = LostPeer("another process of this run was lost")
    announce(lost)
    assert [reports(lost), reports(lost)] == [True, False]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the launcher started all of them again
    announce(DAMAGED)
    assert [reports(lost), reports(DAMAGED)] == [False, True]


def test_without_a_store_all_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_voice, "_WAIT", timedelta(seconds=0.1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert reports(DAMAGED) and reports(DAMAGED)


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("words", [["--stepz", "3"], ["--steps", "0"]])
def test_the_command_line_prints_it_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for _ in range(2):
        try:
            assert main(["train", "photos", "--output", "run", *words]) == 1
        except SystemExit as error:
            assert error.code == 2
        said.append(capsys.readouterr().err)
    assert ("--stepz" in said[0] or "steps is 0" in said[0]) and not said[1]
