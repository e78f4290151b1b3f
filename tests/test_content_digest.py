"""Any value is distinguished by its contents: the same in another process, never by where it lies."""

import ast
import collections
import dataclasses
import datetime
import enum
import functools
import io
import random
import subprocess
import sys
import threading
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dopsd_core.identity.content_digest import Digester, name_of


def digest(value: Any) -> str:
    return Digester().digest(value)


class Colour(enum.Enum):
    RED, GREEN = 1, 2


@dataclasses.dataclass
class Options:
    scale: float
    names: list[str]


class Slots:
    __slots__ = ("__hidden", "open")

    def __init__(self, hidden: int, open: int) -> None:
        self.__hidden, self.open = hidden, open


class Child(Options):
    pass


class OwnDict(dict):
    pass


class OwnText(str):
    pass


def scaled(x: float, by: float = 2.0) -> float:
    return x * by


def closing_over(value: Any) -> Callable[..., Any]:
    def inner(x: Any, *, power: int = 2) -> Any:
        return x, value, power

    return inner


def counting() -> Callable[[], int]:
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    return step


def of_a_class_made_here(base: type, factor: int) -> type:
    class Made(base):
        factor_of_class = factor

        def forward(self, x: Any) -> Any:
            return super().forward(x) * factor

    return Made


def network(seed: int, slope: float = 0.1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(slope))


def bound(scale: float) -> Any:
    return Options(scale, []).__repr__


def written(source: str, *defaults: Any) -> Any:
    """The function that the source of a lambda makes."""
    inner = compile(source, "<test>", "eval").co_consts
    code = next(const for const in inner if isinstance(const, types.CodeType))
    return types.FunctionType(code, globals(), "<lambda>", defaults or None)


PAIRS: dict[str, Callable[[int], Any]] = {
    # name: of a number, which is all that differs
    "number": lambda n: n,
    "float": lambda n: n / 7,
    "text": lambda n: f"text {n}",
    "bytes": lambda n: bytes([n]),
    "enum": lambda n: [Colour.RED, Colour.GREEN][n],
    "list": lambda n: [1, [n]],
    "tuple": lambda n: (1, (n,)),
    "set": lambda n: {"a", "b", f"{n}"},
    "dict": lambda n: {"a": {"b": n}},
    "key": lambda n: {("a", n): 1},
    "deque": lambda n: collections.deque([n]),
    "named tuple": lambda n: collections.namedtuple("Point", "x y")(1, n),
    "own dict": lambda n: OwnDict(a=n),
    "own text": lambda n: OwnText(n),
    "dataclass": lambda n: Options(1.0, [str(n)]),
    "slots": lambda n: Slots(n, 1),
    "other slot": lambda n: Slots(1, n),
    "class": lambda n: [Options, Child][n],
    "path": lambda n: Path(f"a/{n}"),
    "dtype": lambda n: [torch.float16, torch.bfloat16][n],
    "namespace": lambda n: types.SimpleNamespace(a=n),
    "date": lambda n: datetime.datetime(2000, 1, 1 + n),
    "array": lambda n: np.array([1, n]),
    "numpy number": lambda n: np.float32(n),
    "tensor": lambda n: torch.tensor([1.0, n]),
    "parameter": lambda n: nn.Parameter(torch.tensor([1.0, n])),
    "generator": lambda n: torch.Generator().manual_seed(n),
    "network": network,
    "attribute of a network": lambda n: network(0, slope=n + 1.0),
    "function": lambda n: [scaled, closing_over][n],
    "closure": lambda n: closing_over({"a": [n]}),
    "tensor in a closure": lambda n: closing_over(torch.tensor(n)),
    "default": lambda n: written("lambda x, y=0: x", n),
    "constant in code": lambda n: written(f"lambda x: x + {n}"),
    "name in code": lambda n: written(f"lambda x: x.attribute_{n}"),
    "code": lambda n: written(f"lambda x: x {'+-'[n]} 1"),
    "inner code": lambda n: written(f"lambda: (lambda: {n})"),
    "bound method": lambda n: bound(float(n)),
    "bound builtin": lambda n: [n].append,
    "builtin": lambda n: [max, min][n],
    "partial": lambda n: functools.partial(scaled, by=n),
    "cached function": lambda n: functools.lru_cache(closing_over(n)),
    "property": lambda n: property(closing_over(n)),
    "class made in a function": lambda n: of_a_class_made_here(nn.Linear, n),
    "base of a class made in a function": lambda n: of_a_class_made_here([nn.Linear, nn.ReLU][n], 1),
    "attribute of a function": lambda n: _with_attribute(n),
    "hook of a network": lambda n: _with_hook(n),
}


def _with_attribute(n: int) -> Any:
    function = closing_over(1)
    function.note = n  # type: ignore[attr-defined]
    return function


def _with_hook(n: int) -> nn.Module:
    module = network(0)
    module[0].register_forward_hook(closing_over(n))
    return module


@pytest.mark.parametrize("kind", PAIRS)
def test_the_same_is_the_same_and_another_is_another(kind: str) -> None:
    make = PAIRS[kind]
    zero, one = Digester(), Digester()
    assert zero.digest(make(0)) == digest(make(0)) != one.digest(make(1))
    assert not zero.unknown and not one.unknown


def test_kinds_are_distinguished() -> None:
    values = [1, 1.0, True, "1", b"1", None, [], (), {}, set(), frozenset(), "", 0, -0.0, 0.0, [[]], [()], OwnDict()]
    values += [torch.tensor(1), np.int64(1), OwnText("1"), Options, Options(1.0, []), Child(1.0, []), ["a", "b"]]
    values += [["ab"], {"a": "b"}, [("a", "b")], float("nan"), float("inf"), ...]
    assert len({digest(value) for value in values}) == len(values)


def test_where_a_thing_lies_does_not_count() -> None:
    assert digest(torch.device("cpu")) == digest(torch.device("cuda:1"))
    assert digest(uuid.uuid4()) == digest(uuid.uuid4())
    shared = Options(1.0, ["a"])
    assert digest([shared, shared]) == digest([Options(1.0, ["a"]), Options(1.0, ["a"])])
    assert digest({"a", "b", "c"}) == digest({"c", "b", "a"})
    late, early = Options(1.0, []), Options(1.0, [])
    del late.scale
    late.scale = 1.0
    assert digest(late) == digest(early)


def test_cycles_end() -> None:
    def ring(value: int) -> list[Any]:
        made: list[Any] = [value]
        made.append({"back": made})
        return made

    assert digest(ring(1)) == digest(ring(1)) != digest(ring(2))
    recursive = closing_over(None)
    recursive.itself = recursive  # type: ignore[attr-defined]
    assert digest(recursive) == digest(recursive)


def test_what_a_function_counts_up_is_part_of_it() -> None:
    step = counting()
    before = digest(step)
    assert before == digest(counting())
    step()
    assert digest(step) != before


def test_deep_nesting_is_another_each_time_and_no_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert digest(deep) != digest(deep)


class Failing:
    __slots__ = ("value",)

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("not now")


UNREADABLE: dict[str, Callable[[], Any]] = {
    "_thread.lock": threading.Lock,
    "random.Random": lambda: random.Random(0),
    "builtins.list_iterator": lambda: iter([1]),
    "_io.StringIO": io.StringIO,
    "_thread._local": threading.local,
    "Failing": Failing,
    "Own": lambda: {"a": [type("Own", (random.Random,), {})(0)]},
    "_thread.RLock": lambda: closing_over(threading.RLock()),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_another_each_time_and_named(kind: str) -> None:
    value, one = UNREADABLE[kind](), Digester()
    assert one.digest(value) != digest(value)
    assert any(kind in name for name in one.unknown)


def test_a_host_says_what_counts_of_its_own_objects() -> None:
    def substitute(value: Any) -> Any:
        return ("model", value.names) if isinstance(value, Options) else value

    one, other = Digester(substitute), Digester(substitute)
    assert one.digest([Options(1.0, ["a"])]) == other.digest([Options(2.0, ["a"])])
    assert one.digest(Options(1.0, ["a"])) != other.digest(Options(1.0, ["b"]))


def test_a_host_says_which_attributes_are_state() -> None:
    module = network(0)
    before = Digester(is_state=lambda name: name == "loaded").digest(module)
    vars(module)["loaded"] = True
    assert Digester(is_state=lambda name: name == "loaded").digest(module) == before != digest(module)


SCRIPT = """
import sys; sys.path.insert(0, {root!r})
from tests.test_content_digest import PAIRS, digest
print({{kind: digest(make(0)) for kind, make in PAIRS.items()}})
"""


def test_another_process_gives_the_same() -> None:
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", SCRIPT.format(root=root)]
    for seed in ("1", "2"):
        run = subprocess.run(command, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        assert ast.literal_eval(run.stdout) == {kind: digest(make(0)) for kind, make in PAIRS.items()}


def test_a_class_of_ours_keeps_the_name_that_saved_runs_know():
    from dopsd_core.demo.autoencoder import DemoAutoencoder

    assert name_of(DemoAutoencoder) == "dopsd_core.standalone.autoencoder.DemoAutoencoder"
    loaded = type("DemoLatents", (), {"__module__": "/its/folder/ComfyUI-DOPSD.nodes.comfy_host.demo_models"})
    assert name_of(loaded) == "ComfyUI-DOPSD.nodes.demo_models.DemoLatents"
    other = type("DemoLatents", (), {"__module__": "their_nodes.comfy_host.demo_models"})
    assert name_of(other) == "their_nodes.comfy_host.demo_models.DemoLatents"


def in_a_module(function: Any, **values: Any) -> Any:
    """The function as if it were in a module of another pack with these global values."""
    patch = types.FunctionType(function.__code__, {"__builtins__": __builtins__, **values})
    patch.__module__ = "another_pack.patches"
    return patch


def reads_scale(x: Any) -> Any:
    return [x * SCALE for _ in range(2)]  # type: ignore # noqa: F821  a global of that module


def counts_calls(x: Any) -> Any:
    global calls
    calls += 1  # type: ignore # noqa: F821
    return cache.setdefault(x, calls)  # type: ignore # noqa: F821


@pytest.mark.parametrize("values", [(1.0, 2.0), ("a", "b"), ((1, 2), (1, 3)), (torch.ones(2), torch.zeros(2))])
def test_a_global_value_that_a_function_reads_counts(values: tuple[Any, Any]) -> None:
    """Packs keep settings in their modules, which a patch on a MODEL reads when it is called."""
    one, same, other = (digest(in_a_module(reads_scale, SCALE=value)) for value in (values[0], *values))
    assert one == same != other
    unread = digest(in_a_module(reads_scale, SCALE=values[0], OTHER=values[1]))
    assert unread == one


def test_a_counter_and_a_cache_do_not_count() -> None:
    patch = in_a_module(counts_calls, calls=0, cache={})
    before = digest(patch)
    patch(3)
    assert digest(patch) == before
