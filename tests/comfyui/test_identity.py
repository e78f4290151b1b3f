"""Identity by content: all that decides what a MODEL, CLIP, VAE or vision tower computes counts, and nothing else does.

The tests walk the tables in nodes/comfy_host/identity_table.py: each row has a change here, each attribute of ComfyUI's
objects a row. What weights, patches and options may be made of is in test_identity_contents.py.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from inprocess import ComfyUI
from loaded import FILES, identities, load, off_device, to_device
from torch import nn

Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def identity(comfyui: ComfyUI) -> Any:
    return comfyui.module("nodes.comfy_host.identity")


@pytest.fixture(scope="module")
def who(comfyui: ComfyUI) -> Callable[..., str]:
    return identities(comfyui)


@pytest.fixture(scope="module")
def fresh(comfyui: ComfyUI, stock: Callable[..., None]) -> Callable[[str], Any]:
    stock(*FILES)
    return lambda kind: load(comfyui, kind)


@pytest.fixture(scope="module")
def shared(fresh: Callable[[str], Any]) -> Callable[[str], Any]:
    """shared(kind): loaded once for the module; to be left as it is."""
    return functools.cache(fresh)


# -- what holds which attributes --------------------------------------------------------------------------------------


HOLDERS: Mapping[str, tuple[str, Change | None, Change]] = {
    # by table: what to load, how it is copied (loaded anew where a copy would share), and what holds the attributes
    "patcher": ("MODEL", lambda model: model.clone(), lambda model: model),
    "network": ("MODEL", None, lambda model: model.model),
    "config": ("MODEL", None, lambda model: model.model.model_config),
    "CLIP": ("CLIP", lambda clip: clip.clone(), lambda clip: clip),
    "VAE": ("VAE", copy.copy, lambda vae: vae),
    "vision": ("vision", copy.copy, lambda vision: vision),
}


def put(value: Any) -> Change:
    """The attribute becomes `value`."""
    return lambda before: value


def with_entry(value: Any) -> Change:
    return lambda before: {**before, "an entry": value}


def set_attribute(name: str, value: Any) -> Change:
    def change(before: Any) -> Any:
        after = object.__new__(type(before))
        vars(after).update(vars(before) | {name: value})
        return after

    return change


def patched(patcher: Any) -> Any:
    after = patcher.clone()
    name = next(iter(after.model.state_dict()))
    assert after.add_patches({name: ("diff", (torch.ones(1),))})
    return after


def a_function(x: Any) -> Any:
    return x


def with_template(tokenizer: Any) -> Any:
    after = copy.copy(tokenizer)
    after.llama_template = "{} in another template"
    return after


CHANGES: Mapping[str, Mapping[str, Change]] = {
    "patcher": {
        "patches": with_entry([(1.0, ("diff", ()), 1.0, None, None)]),
        "object_patches": with_entry(torch.float16),
        "weight_wrapper_patches": with_entry([a_function]),
        "model_options": with_entry(1.5),
        "injections": with_entry([a_function]),
        "wrappers": lambda before: {"apply_model": {None: [a_function]}},
        "callbacks": lambda before: {"on_cleanup": {"a key": [a_function]}},
        "additional_models": with_entry(["another model"]),
        "attachments": with_entry("an object"),
        "hook_patches": with_entry({"a weight": [(1.0, (), 1.0, None, None)]}),
        "forced_hooks": put(["a hook"]),
        "model": lambda before: before,
        "backup": with_entry(None),
        "backup_buffers": with_entry(None),
        "object_patches_backup": with_entry(None),
        "hook_backup": with_entry(None),
        "hook_patches_backup": put({}),
        "cached_hook_patches": with_entry(1),
        "cached_patcher_init": put((a_function, ("another file",))),
        "pinned": put({"a weight"}),
        "size": put(1),
        "load_device": put(torch.device("meta")),
        "offload_device": put(torch.device("meta")),
    },
    "network": {
        "model_config": set_attribute("sampling_settings", {"shift": 7.0}),
        "model_type": lambda before: other_of_its_kind(before),
        "model_sampling": lambda before: shifted(before),
        "latent_format": set_attribute("scale_factor", 2.0),
        "manual_cast_dtype": put(torch.float64),
    },
    "config": {
        "unet_config": with_entry(2),
        "sampling_settings": with_entry(2),
        "latent_format": set_attribute("shift_factor", 2.0),
        "manual_cast_dtype": put(torch.float64),
        "optimizations": with_entry(True),
    },
    "CLIP": {
        "patcher": patched,
        "tokenizer": with_template,
        "tokenizer_options": with_entry(3),
        "layer_idx": put(-3),
    },
    "VAE": {
        "patcher": patched,
        "vae_dtype": put(torch.float64),
        "process_input": put(a_function),
    },
    "vision": {
        "patcher": patched,
        "lm_config": lambda before: dataclasses.replace(before, rope_theta=3.0),
        "min_pixels": put(1),
        "max_pixels": put(2),
    },
}
"""By table and row; rows that are not here become an object that nothing else is."""


def shifted(sampling: Any) -> Any:
    after = copy.deepcopy(sampling)
    after.set_parameters(shift=7.0)
    return after


def other_of_its_kind(member: Any) -> Any:
    kinds: Any = type(member)
    return next(kind for kind in kinds if kind is not member)


def rows_of(pack: str) -> list[tuple[str, str, bool]]:
    """(table, row, whether it counts), read where ComfyUI does not run."""
    import ast

    from inprocess import ROOT

    tree = ast.parse((ROOT / pack).read_text(encoding="utf-8"))
    tables = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    names = {"_PATCHER": "patcher", "_NETWORK": "network", "_CONFIG": "config", "_CLIP": "CLIP", "_VAE": "VAE"}
    found = []
    for name, title in {**names, "_VISION": "vision"}.items():
        for call in (node for node in ast.walk(tables[name]) if isinstance(node, ast.Call)):
            counts = getattr(call.func, "id", "") == "_counts"
            found += [(title, keyword.arg or "", counts) for keyword in call.keywords]
    return found


ROWS = rows_of("nodes/comfy_host/identity_table.py")


def test_the_rows_here_are_the_tables(identity: Any) -> None:
    tables = [(title, row.what, row.counts) for title, rows in identity.TABLE.items() for row in rows if title != "run"]
    assert sorted(tables) == sorted(ROWS) and len(ROWS) == len({row[:2] for row in ROWS}) > 90
    assert all(row.why for rows in identity.TABLE.values() for row in rows)
    assert {(title, name) for title, changes in CHANGES.items() for name in changes} <= {row[:2] for row in ROWS}


@pytest.mark.parametrize(("table", "row", "counts"), ROWS, ids=[f"{table}-{row}" for table, row, _ in ROWS])
def test_a_change_of_a_row_alone(fresh: Any, shared: Any, who: Any, table: str, row: str, counts: bool) -> None:
    kind, copied, holder = HOLDERS[table]
    before = shared(kind)
    value = copied(before) if copied else fresh(kind)
    assert who(value) == who(before)
    there = holder(value)
    now = getattr(there, row, None)
    after = CHANGES[table].get(row, put(object()))(now)
    if isinstance(there, nn.Module):
        setattr(there, row, after)
    else:
        object.__setattr__(there, row, after)
    assert (who(value) != who(before)) == counts


@pytest.mark.parametrize("kind", ["MODEL", "klein", "CLIP", "VAE", "vision"])
def test_every_attribute_has_a_row(comfyui: ComfyUI, identity: Any, fresh: Any, kind: str) -> None:
    """Before and after loading, so that a new ComfyUI's attribute is noticed."""
    value = fresh(kind)
    patcher = getattr(value, "patcher", value)
    to_device(comfyui, value)
    holders = {"patcher": patcher}
    if kind in ("MODEL", "klein"):
        holders |= {"network": patcher.model, "config": patcher.model.model_config}
    else:
        holders[kind] = value
    for table, holder in holders.items():
        known = {row.what for row in identity.TABLE[table]} | vars(nn.Module()).keys()
        assert vars(holder).keys() <= known, table
    off_device(comfyui)


def test_what_is_not_in_the_table_counts(fresh: Any, who: Any) -> None:
    model = fresh("MODEL")
    other = model.clone()
    other.an_attribute_of_a_later_release = 1
    assert who(other) != who(model)
    vae = fresh("VAE")
    other = copy.copy(vae)
    other.an_attribute_of_a_later_release = 1
    assert who(other) != who(vae)


@pytest.mark.parametrize("kind", ["CLIP", "VAE"])
def test_another_packs_class_is_read_by_the_same_table(comfyui: ComfyUI, fresh: Any, who: Any, kind: str) -> None:
    """It need not be made of ComfyUI's; loading still changes nothing."""
    value = fresh(kind)
    own = types.new_class(f"Own{kind}")()
    vars(own).update(vars(value))
    before = who(own)
    assert before == who(value)
    to_device(comfyui, own)
    assert who(own) == before
    off_device(comfyui)


def test_all_of_a_kind_are_distinguished_and_loading_again_gives_the_same(fresh: Any, who: Any) -> None:
    kinds = ("MODEL", "klein", "CLIP", "VAE", "vision")
    digests = [who(fresh(kind)) for kind in kinds]
    assert len(set(digests)) == len(kinds)
    assert digests == [who(fresh(kind)) for kind in kinds]
