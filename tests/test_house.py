"""Code standards that can be checked by reading the source: docstrings, sizes, words.

They are checked in the folders of `ROOTS`, the words in the tests too.
"""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
ROOTS = ("benchmarks", "dopsd_core", "nodes", "tools")

MAX_FILE, MAX_FUNCTION, MAX_P90 = 350, 60, 30

BANNED = {
    r"pictures?(?!:[A-Z])": "image",  # pictures:INT is an input of saved workflows
    r"told": "message, reports, says",
    r"data sets?": "dataset",
    r"by heart": "overfitting",
    r"eyes?": "vision tower, vision encoder",
    r"dearer": "costs more",
    r"by itself": "on its own, automatically",
    r"for the time of": "during",
    r"(?:go|goes|going|gone|went) on": "resumes, continues",
    r"in small": "scaled-down version of",
    r"recomput(?:e|es) in": "gradient checkpointing",
}
"""Pattern of a word that the field does not use -> what it says instead."""

_BANNED = re.compile(rf"\b(?:{'|'.join(BANNED)})\b", re.IGNORECASE)
_SHAPE = re.compile(r"\[[^\]]+\]|\bshapes?\b|\bscalar\b", re.IGNORECASE)

FILES = sorted(path for root in ROOTS for path in (HERE / root).rglob("*.py"))
TESTS = sorted(path for path in (HERE / "tests").rglob("*.py") if path != Path(__file__))
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def name_of(path: Path) -> str:
    return path.relative_to(HERE).as_posix()


@functools.cache
def source_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def public(parent: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """The public definitions of a module or class, those of its classes too; no setters of properties."""
    for node in parent.body:
        if isinstance(node, ast.If):  # definitions under TYPE_CHECKING and the like
            yield from public(ast.Module(body=[*node.body, *node.orelse], type_ignores=[]))
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        if any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in node.decorator_list):
            continue
        yield node
        if isinstance(node, ast.ClassDef):
            yield from public(node)


def is_dataclass(node: Definition) -> bool:
    return isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list)


def takes_tensors(node: Definition) -> bool:
    """Whether a tensor goes in or out of a function, or is a field of a dataclass."""
    if isinstance(node, ast.ClassDef):
        fields = [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
        annotations = fields if is_dataclass(node) else []
    else:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        annotations = [argument.annotation for argument in arguments] + [node.returns]
    return any(
        annotation is not None and re.search(r"\bTensor\b", ast.unparse(annotation)) for annotation in annotations
    )


def fields_of(node: ast.ClassDef) -> list[str]:
    targets = [field.target for field in node.body if isinstance(field, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith("_")]


def unlisted(node: ast.ClassDef) -> list[str]:
    """The fields that are not under `Attributes:` in a class's docstring."""
    _, _, listing = (ast.get_docstring(node) or "").partition("Attributes:\n")
    listed = re.findall(r"^    (\w+): ", listing, flags=re.MULTILINE)
    return [name for name in fields_of(node) if name not in listed]


def prose(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment, docstring and string of several words."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def names(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every function and class."""
    for node in ast.walk(parsed(source)):
        if isinstance(node, Definition):
            yield node.lineno, node.name


def spaced(name: str) -> str:
    """The words of a name: "test_goes_on" -> "test goes on", "PictureOf" -> "Picture Of"."""
    return re.sub(r"_+|(?<=[a-z])(?=[A-Z])", " ", name)


def faults(files: Iterable[Path], found: Callable[[str], Sequence]) -> dict[str, Sequence]:
    """File -> what `found` finds in its source, of the files where it finds anything."""
    of_all = {name_of(path): found(source_of(path)) for path in files}
    return {name: of_one for name, of_one in of_all.items() if of_one}


def undocumented(source: str) -> list[str]:
    tree = parsed(source)
    missing = [] if ast.get_docstring(tree) else ["the module"]
    return missing + [f"{node.name}, line {node.lineno}" for node in public(tree) if not ast.get_docstring(node)]


def with_unlisted_fields(source: str) -> list[str]:
    nodes = [node for node in public(parsed(source)) if isinstance(node, ast.ClassDef) and is_dataclass(node)]
    return [f"{node.name}, line {node.lineno}: {missing}" for node in nodes if (missing := unlisted(node))]


def without_shapes(source: str) -> list[str]:
    nodes = [node for node in public(parsed(source)) if takes_tensors(node)]
    return [f"{n.name}, line {n.lineno}" for n in nodes if not _SHAPE.search(ast.get_docstring(n) or "")]


def banned_words(source: str) -> list[tuple[int, str]]:
    return [(line, match.group()) for line, text in prose(source) for match in _BANNED.finditer(text)]


def banned_names(source: str) -> list[tuple[int, str]]:
    """Of functions and classes; values may have names of files and of saved workflows."""
    return [(line, name) for line, name in names(source) if _BANNED.search(spaced(name))]


@pytest.mark.parametrize("found", [undocumented, with_unlisted_fields, without_shapes])
def test_docstrings_are_complete(found: Callable[[str], Sequence]):
    assert not faults(FILES, found)


@pytest.mark.parametrize("found", [banned_words, banned_names])
def test_words_are_the_fields(found: Callable[[str], Sequence]):
    assert not faults([*FILES, *TESTS], found)


def test_all_code_is_checked():
    folders = {path.name for path in HERE.iterdir() if path.name[0] != "." and any(path.glob("*.py"))}
    assert folders == {*ROOTS, "tests"}
    assert {path.relative_to(HERE).parts[0] for path in FILES} == set(ROOTS) and len(TESTS) > 100


def test_files_are_short():
    lengths = {name_of(path): len(source_of(path).splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE}


def test_functions_are_short():
    functions = [(path, n) for path in FILES for n in ast.walk(parsed(source_of(path))) if isinstance(n, Function)]
    lengths = {f"{name_of(path)}:{n.name}": (n.end_lineno or n.lineno) - n.lineno + 1 for path, n in functions}
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION}
    assert sorted(lengths.values())[len(lengths) * 9 // 10] <= MAX_P90


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("# a picture", ["picture"]),
        ('"""The data set."""', ["data set"]),
        ('raise ValueError(f"{name} was told")', ["told"]),
        ('facts["pictures"] = told', []),
        ("x = 'an image and its dataset'  # eyewitness", []),
    ],
)
def test_banned_words_are_found_in_prose_alone(source: str, words: list[str]):
    assert [word for _, word in banned_words(source)] == words


def test_banned_words_are_found_in_names():
    source = "class PictureOf:\n    def it_goes_on(self): ...\ndef dataset(): ...\ndef _told_apart(): ...\n"
    assert sorted(name for _, name in banned_names(source)) == ["PictureOf", "_told_apart", "it_goes_on"]


def test_what_is_missing_is_found():
    source = (
        "class A:\n    def b(self, x: Tensor): ...\n    def _c(self): ...\n    @b.setter\n    def b(self, x): ...\n"
        "def d() -> Tensor: ...\ndef e(*, y: list[Tensor]): ...\n"
    )
    nodes = list(public(parsed(source)))
    assert undocumented(source) == ["the module", "A, line 1", "b, line 2", "d, line 6", "e, line 7"]
    assert [node.name for node in nodes] == ["A", "b", "d", "e"]
    assert [takes_tensors(node) for node in nodes] == [False, True, True, True]
    assert without_shapes(source) == ["b, line 2", "d, line 6", "e, line 7"]


def test_fields_without_a_line_are_found():
    docstring = "A class.\n\n    Attributes:\n        one: listed.\n    "
    source = f"@dataclass\nclass A:\n    {docstring!r}\n    one: Tensor\n    two: int\n    _three: int\n"
    (node,) = public(parsed(source))
    assert isinstance(node, ast.ClassDef) and is_dataclass(node) and takes_tensors(node)
    assert fields_of(node) == ["one", "two"] and unlisted(node) == ["two"]
