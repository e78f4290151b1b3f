"""A user's folder in memory, with files, links and other entries: written, inspected and mutated."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.reliability_mutators import NONSENSE, Chance, mutate_bytes, mutate_text

LONGEST_NAME = 240


@dataclass
class Tree:
    """What a folder holds, by path below it with `/` between the parts.

    Attributes:
        files: path -> content.
        links: path -> target, as text.
        pipes: paths of named pipes.
        dirs: paths of empty folders.
    """

    files: dict[bytes, bytes] = field(default_factory=dict)
    links: dict[bytes, bytes] = field(default_factory=dict)
    pipes: set[bytes] = field(default_factory=set)
    dirs: set[bytes] = field(default_factory=set)

    def write(self, folder: Path) -> None:
        """Makes all of it below `folder`; what the file system does not take is left out."""
        root = os.fsencode(folder)
        makers: Sequence[tuple[Callable[[bytes, bytes], None], dict[bytes, bytes]]] = (
            (_write_file, self.files),
            (lambda path, target: os.symlink(target, path), self.links),
            (lambda path, _: os.mkfifo(path), dict.fromkeys(self.pipes, b"")),
            (lambda path, _: os.makedirs(path, exist_ok=True), dict.fromkeys(self.dirs, b"")),
        )
        for make, items in makers:
            for name, content in items.items():
                path = os.path.join(root, name)
                try:
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    make(path, content)
                except (OSError, ValueError):
                    continue


def _write_file(path: bytes, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)


def snapshot(folder: Path) -> dict[bytes, str]:
    """Every path below a folder with what is there: a digest, a link's target, or the kind of thing; times left out."""
    found: dict[bytes, str] = {}
    for parent, folders, names in os.walk(os.fsencode(folder)):
        for name in [*folders, *names]:
            path = os.path.join(parent, name)
            found[path] = _what(path)
    return found


def _what(path: bytes) -> str:
    if os.path.islink(path):
        return f"link {os.readlink(path)!r}"
    if os.path.isfile(path):
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    return "folder" if os.path.isdir(path) else "other"


# -- mutations ---------------------------------------------------------------------------------------------------------


def change_contents(tree: Tree, chance: Chance) -> None:
    """Some file's bytes."""
    if tree.files:
        name = chance.choice(sorted(tree.files))
        tree.files[name] = mutate_bytes(tree.files[name], chance, list(tree.files.values()))


def rename(tree: Tree, chance: Chance) -> None:
    """One part of some file's path: nonsense, other letters, bytes that are no UTF-8, a near miss of a known name."""
    if not tree.files:
        return
    old = chance.choice(sorted(tree.files))
    parts = old.split(b"/")
    at = chance.randrange(len(parts))
    parts[at] = _renamed(parts[at], chance)
    tree.files[b"/".join(parts)] = tree.files.pop(old)


def copy_file(tree: Tree, chance: Chance) -> None:
    """Some file once more, under a name that is nearly its own."""
    if tree.files:
        old = chance.choice(sorted(tree.files))
        parent, slash, name = old.rpartition(b"/")
        tree.files[parent + slash + _renamed(name, chance)] = tree.files[old]


def remove_file(tree: Tree, chance: Chance) -> None:
    """Some file less."""
    if tree.files:
        tree.files.pop(chance.choice(sorted(tree.files)))


def put_link(tree: Tree, chance: Chance) -> None:
    """A link in place of a file or beside it: to itself, to nothing, outside, to a folder above, to a device."""
    names = sorted(tree.files) or [b"a.png"]
    name = chance.choice(names)
    targets = (
        b".", b"..", b"/etc/hostname", b"/etc", b"nowhere", name.rpartition(b"/")[2], b"../outside/secret.png",
        b"/dev/zero", b"/proc/self/environ", chance.choice(names), b"/",
    )  # fmt: skip
    if chance.random() < 0.5:
        tree.files.pop(name, None)
    else:
        name = name.rpartition(b".")[0] + chance.choice((b".jpg", b".txt", b"", b"_link"))
    tree.links[name] = chance.choice(targets)


def put_odd_thing(tree: Tree, chance: Chance) -> None:
    """A named pipe or a folder where a file is expected."""
    name = chance.choice(sorted(tree.files) or [b"a.png"])
    tree.files.pop(name, None)
    (tree.pipes if chance.random() < 0.5 else tree.dirs).add(name)


def move_into_folder(tree: Tree, chance: Chance) -> None:
    """A file into a sub-folder, with a number of repeats before its name perhaps."""
    if not tree.files:
        return
    old = chance.choice(sorted(tree.files))
    number = chance.choice(
        ("3_", "0_", "00_", "20240512_", "9" * 12 + "_", "9" * 5000 + "_", "-1_", "\u0663_", "\u00b2_", "1e3_", "")
    )
    folder = f"{number}{chance.choice(('walk', 'source', 'target', 'Target', '.hidden', 'x'))}"[:LONGEST_NAME]
    depth = chance.choice((1, 1, 1, 30))
    tree.files[b"/".join([folder.encode()] * depth) + b"/" + old.rpartition(b"/")[2]] = tree.files.pop(old)


TREE_MUTATIONS = (
    change_contents, change_contents, rename, rename, copy_file, remove_file, put_link, put_odd_thing, move_into_folder
)  # fmt: skip


def _renamed(name: bytes, chance: Chance) -> bytes:
    stem, dot, suffix = name.rpartition(b".")
    text = name.decode("utf-8", "surrogateescape")
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: mutate_text(text, chance).encode("utf-8", "surrogatepass"),
        lambda: stem + dot + suffix.swapcase(),
        lambda: stem.swapcase() + dot + suffix,
        lambda: stem + dot + chance.choice((b"png", b"jpg", b"webp", b"txt", b"caption", b"gif", b"jsonl", b"")),
        lambda: name + chance.choice((b".txt", b" ", b".", b"~", b".bak")),
        lambda: stem + b"\xff\xfe" + dot + suffix,
        lambda: chance.choice(NONSENSE).encode("utf-8", "surrogatepass") + dot + suffix,
        lambda: b"." + name,
        lambda: b"a" * 251 + dot + suffix,
    )
    made = chance.choice(ways)().replace(b"\0", b"").replace(b"/", b"")[:LONGEST_NAME]
    return made or b"_"
