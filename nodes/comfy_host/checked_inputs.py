"""Checks a node's inputs when it runs: complete and within bounds, wherever they come from.

ComfyUI checks constants before a run, but no value that comes over a link, and an older graph lacks newer inputs. So a
missing input gets its default from the schema here, and all others are checked again.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from comfy_api.latest import io

from .denoiser import send_text
from .sent_values import unread_inputs
from .whole_graph import require_whole_graph

_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


_MARKS = {
    "MODEL": "model_options",
    "CLIP": "tokenizer",
    "VAE": "decode",
    "DOPSD_DATASET": "report",
    "DOPSD_CONDITIONS": "previews",
    "DOPSD_VISION": "lm_config",
    "DOPSD_SETTINGS": "preset",
}
"""An attribute of what travels over each kind of link. A node with an output of any kind may give something else."""


class InputError(ValueError):
    """Inputs are invalid; the message names each of them."""


def checked(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Decorates `execute` of our nodes, which then only gets inputs that its schema and `validate_inputs` allow.

    Raises (when called):
        LeftOutError: another node of ours in the graph is invalid and was dropped.
        InputError: an input has the wrong type, is out of bounds or is not one of the choices.
    """
    names = list(inspect.signature(execute).parameters)[1:]

    @functools.wraps(execute)
    def checking(cls: Any, *args: Any, **given: Any) -> io.NodeOutput:
        require_whole_graph(cls)
        if unread_inputs(cls):
            send_text(cls, "")  # for nodes that show no text; that of others has it too
        return execute(cls, **completed(cls, {**dict(zip(names, args, strict=False)), **given}))

    return checking


def completed(node: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with defaults for missing inputs and without those that the node does not have.

    ComfyUI leaves out unknown constants, but passes on unknown links.

    Raises:
        InputError: with one sentence for each invalid input.
    """
    schema, own = node.define_schema(), _checked_by_the_node(node)
    known = {declared.id for declared in schema.inputs}
    whole, problems = {name: value for name, value in given.items() if name in known}, []
    for declared in schema.inputs:
        default = getattr(declared, "default", None)
        if declared.id not in given:
            if default is not None:
                whole[declared.id] = [default] if schema.is_input_list else default
            continue
        values = given[declared.id] if schema.is_input_list else [given[declared.id]]
        problems += [problem for value in values or () if (problem := _problem(declared, value, own))]
    if own and not problems and (answer := node.validate_inputs(**{name: whole.get(name) for name in own})) is not True:
        problems.append(str(answer))
    if problems:
        raise InputError(f"{schema.display_name}: {'; '.join(problems)}")
    return whole


def _checked_by_the_node(node: Any) -> tuple[str, ...]:
    """The inputs that the node's own `validate_inputs` names."""
    parameters = inspect.signature(node.validate_inputs).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD)


def _problem(declared: Any, value: Any, own: tuple[str, ...]) -> str | None:
    kind = declared.get_io_type()
    if kind in ("INT", "FLOAT"):
        return _number_problem(declared, value, kind == "INT")
    if kind == "STRING" and not isinstance(value, str):
        return f"{declared.id} is {value!r}; it must be text"
    if kind == "BOOLEAN" and not isinstance(value, bool):
        return f"{declared.id} is {value!r}; it must be true or false"
    if kind == "COMBO" and declared.id not in own and value not in declared.options:
        return f"{declared.id} is {value!r}; choose one of {', '.join(map(str, declared.options))}"
    if kind not in _WIDGETS and not (value is None and declared.optional) and _is_constant(value, kind):
        return f"{declared.id} is {repr(value)[:60]}; connect it to a node that gives {kind}"
    if value is not None and kind in _MARKS and not _is_of(value, kind):
        return f"{declared.id} is connected to a {type(value).__name__}; connect it to a node that gives {kind}"
    return None


def _is_of(value: Any, kind: str) -> bool:
    """Whether a value may travel over this kind of link; other packs have classes of their own for MODEL, CLIP, VAE."""
    return hasattr(value, _MARKS[kind]) and (kind != "VAE" or not hasattr(value, "tokenizer"))  # a CLIP decodes too


def _is_constant(value: Any, kind: str) -> bool:
    """Whether a value was written into the graph where a link belongs, which ComfyUI lets pass.

    It consists of nothing but what JSON knows, as no object of a socket does but a LoRA without tensors.
    """
    if kind == "LORA_MODEL" and value == {}:
        return False
    nested = [value]
    while nested:
        part = nested.pop()
        if isinstance(part, list | dict):
            nested += part.values() if isinstance(part, dict) else part
        elif not (part is None or isinstance(part, str | int | float)):
            return False
    return True


def _number_problem(declared: Any, value: Any, whole: bool) -> str | None:
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
        return f"{declared.id} is {value!r}; it must be a {'whole ' * whole}number"
    if not declared.min <= value <= declared.max:
        return f"{declared.id} is {value}; it must be within {declared.min} and {declared.max}"
    return None
