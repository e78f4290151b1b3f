"""What `train` checks before it encodes anything, which may take hours: network, folder of the run, processes."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..config import ConfigError, TrainConfig
from ..data.dataset import Pair
from ..denoiser import Denoiser
from ..training.determinism import obstacle
from ..training.run_checks import check_network, check_saved_run, check_share
from ..training.world import Peers
from .hosts.model import HostModel, device_of
from .model_options import ModelOptions

_OWN = {
    "dataset",
    "output",
    "model",
    "base",
    "text_encoder",
    "vae",
    "vision",
    "root",
    "regularisation",
    "config",
    "initial_lora",
}
"""Paths, which may have other names on another machine."""

_FREE = {"device", "threads", "train_config", "trackers", "command"}
"""Arguments that may differ, or that are compared otherwise."""


def check_beforehand(
    args: argparse.Namespace, config: TrainConfig, model: HostModel, dataset: str, peers: Peers,
    pairs: Callable[[], str] = lambda: "",
) -> None:  # fmt: skip
    """Checks whatever does not need the encoded dataset.

    Args:
        args: of `train`.
        config: the configuration.
        model: the model, of which only names and sizes are read.
        dataset: a digest of the images and captions.
        peers: the processes of the run.
        pairs: gives a digest of the files, captions and encoder, if there is a run to compare it with; "" if unknown.

    Raises:
        ConfigError, ValueError: options do not fit the model, each other or the number of processes, or the processes
            have other options or another dataset.
        DiskError, StateError, FolderInUse: the run cannot be written to its folder.
    """
    check_share(config, peers.world)
    if config.deterministic and (problem := obstacle(device_of(ModelOptions.of(args)))):
        raise ConfigError((problem,))
    peers.require_equal({"the configuration": config.to_json(), "the dataset": dataset, **_options(args)})
    peers.first(lambda: _check_run(args, config, model, pairs))


def may_lack_anchors(args: argparse.Namespace, config: TrainConfig) -> bool:
    """Whether the run does without prior anchors if the dataset gives none, since nobody asked for them."""
    asked_for = any(name.endswith("anchor_probability") for name in vars(args))
    return bool(config.objective.anchor_share) and not asked_for


def digest_of_pairs(*groups: Sequence[Pair]) -> str:
    """A digest of the names of images, their captions and how they are trained; not of the folders that they are in."""
    digest = hashlib.sha256()
    for pairs in groups:
        for pair in pairs:
            names = [path.name for path in (pair.image_path, *pair.source_images)]
            facts = [names, pair.captions, pair.bucket.width, pair.bucket.height, pair.repeats, pair.mask is not None]
            digest.update(json.dumps(facts).encode())
        digest.update(b"|")
    return digest.hexdigest()


def _check_run(
    args: argparse.Namespace, config: TrainConfig, model: HostModel, pairs: Callable[[], str]
) -> None:  # fmt: skip
    check_network(config, outline := model.outline, args.output)
    _require_unpacked(config, outline, args.quantise)
    possible = [config]
    if may_lack_anchors(args, config):
        possible.append(config.replace(objective=config.objective.without_anchors()))
    check_saved_run(args.output, possible, lambda: model.fingerprint, not args.fresh, pairs)


def _require_unpacked(config: TrainConfig, outline: Denoiser, quantise: str) -> None:
    """Raises ValueError if the adapter needs the values of weights that will be packed; the targets were checked."""
    if quantise == "none":
        return
    try:
        config.adapter.require_sites([replace(site, weight=None) for site in outline.sites()])
    except ValueError as error:
        raise ValueError(
            f"adapter {config.adapter.name} needs the values of the weights, which --quantise {quantise} packs: leave "
            "out --quantise, or choose --adapter lora"
        ) from error


def _options(args: argparse.Namespace) -> Mapping[str, str]:
    given: Mapping[str, object] = vars(args)
    names = sorted(name for name in given.keys() - _OWN - _FREE if not isinstance(given[name], Path))
    return {f"--{name.replace('_', '-')}": repr(given[name]) for name in names}
