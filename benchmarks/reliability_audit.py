"""Records every file that the measured server opens, lists, creates, renames or removes.

Copied into the probe's custom node as prestartup_script.py, so that it is there before torch and the pack; does nothing
unless $DOPSD_AUDIT names the file to write to.
"""

import os
import sys

EVENTS = {
    "open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink",
    "os.truncate", "os.chmod", "os.utime", "shutil.rmtree", "shutil.copyfile", "shutil.move", "shutil.copytree",
}  # fmt: skip
FOLDERS = {"os.remove": (1,), "os.rmdir": (1,), "os.mkdir": (2,), "os.rename": (2, 3), "os.link": (2, 3)}
"""Where among an event's arguments the descriptors are that its relative paths begin at; -1 is the working folder."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def start(log: str) -> None:
    """Adds the hook; lines are "event<TAB>path", "write" for an open that may write."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, path: object, folder: int = -1) -> None:
        text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else repr(path)
        if folder >= 0:
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
        line = f"{event}\t{os.path.abspath(text)}\n" if "\0" not in text else f"{event}\t{text!r}\n"
        os.write(descriptor, line.encode("utf-8", "surrogateescape"))

    def hook(event: str, args: tuple) -> None:
        if event not in EVENTS or not args or isinstance(args[0], int):
            return
        if event == "open":
            path, mode, flags = args
            writes = (isinstance(mode, str) and not set(mode).isdisjoint("wax+")) or (flags or 0) & WRITING
            note("write" if writes else "open", path)
            return
        paths = args[: 2 if event in ("os.rename", "os.link", "shutil.copyfile", "shutil.move") else 1]
        folders = [args[place] for place in FOLDERS.get(event, ())] or [-1, -1]
        for path, folder in zip(paths, folders):  # noqa: B905  the longer ends are of no path
            note(event, path, folder)

    sys.addaudithook(hook)
    _watch_safetensors(note)


def _watch_safetensors(note) -> None:
    """safetensors opens files in Rust, which no hook of Python sees."""
    import safetensors

    real = safetensors.safe_open

    def safe_open(filename, *args, **kwargs):
        note("open", filename)
        return real(filename, *args, **kwargs)

    safetensors.safe_open = safe_open


if os.environ.get("DOPSD_AUDIT"):
    start(os.environ["DOPSD_AUDIT"])
