"""Any name and any text can be shown, sent and hashed."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dopsd_core.conditioning.cache import ConditionCache
from dopsd_core.data.dataset import DatasetError
from dopsd_core.text import escape_unencodable, hashable, printable

from .written import read

ANY = st.text(st.characters(codec=None))  # lone surrogates too


def test_bytes_of_names_are_written_out() -> None:
    assert printable(os.fsdecode(b"caf\xe9.png") if os.name != "nt" else "caf\udce9.png") == "caf\\xe9.png"
    assert printable("a \ud83d b\udc7f 写真 🎉\n") == "a \\ud83d b\\udc7f 写真 🎉\n"


@given(ANY, ANY)
def test_every_text_can_be_sent_and_distinguished(first: str, second: str) -> None:
    printable(first).encode()
    assert printable(printable(first)) == printable(first)
    assert (hashable(first) == hashable(second)) == (first == second)


@given(st.text())
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text and hashable(text) == text.encode()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_streams_write_what_they_lack_as_escapes(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    escape_unencodable(stream, io.StringIO())
    stream.write("写 é")
    stream.flush()
    written = stream.buffer.getvalue()  # type: ignore[attr-defined]
    assert written == {"ascii": rb"\u5199 \xe9", "cp1252": b"\\u5199 \xe9", "utf-8": "写 é".encode()}[encoding]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text there")
def test_reports_of_names_that_are_no_text(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9sert"))
    folder.mkdir()
    Image.new("RGB", (64, 64), (1, 2, 3)).save(folder / "a.png")
    os.rename(folder / "a.png", os.fsencode(folder) + b"/caf\xe9.png")
    report = read(folder)
    for text in (report.describe(), *map(str, report.problems), str(DatasetError(report))):
        assert "caf\\xe9.png: no caption: write it to caf\\xe9.txt beside it" in text.encode().decode()
        assert "d\\xe9sert" in text


@pytest.mark.long
def test_the_command_line_on_a_console_that_is_not_utf8(tmp_path: Path) -> None:
    def inspect(encoding: str, *more: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "dopsd_core", "inspect-dataset", str(tmp_path), "--resolution", "128", *more]
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
        return subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True)

    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "猫.png")
    (tmp_path / "猫.txt").write_text("a [V] cat", encoding="utf-8")
    done = inspect("ascii")
    assert done.returncode == 0 and b"\\u732b.png: is 64x64, smaller than" in done.stdout, done.stderr
    done = inspect("cp1252", "--trigger", "写\x07")
    assert done.returncode == 1 and b"error: the trigger '\\u5199\\x07' cannot be used" in done.stderr, done.stderr


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text there")
def test_every_line_of_the_log_can_be_written(tmp_path: Path) -> None:
    """A folder's name that is no text, on a console in UTF-8: the line stands there, with the name written out."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    handler = logging.StreamHandler(console)
    log = logging.getLogger("dopsd")
    log.addHandler(handler)
    try:
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9sert"))
        (folder / "key.safetensors").mkdir(parents=True)
        assert ConditionCache(folder).load("key") is None
        log.warning("%s is %d%% of %r", folder.name, 100, "nothing")
    finally:
        log.removeHandler(handler)
    console.flush()
    first, second = console.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]
    assert "a cached condition cannot be read" in first and "key.safetensors" in first
    assert second == "d\\xe9sert is 100% of 'nothing'"
