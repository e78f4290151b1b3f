"""Runs of release 0.2 load, resume and end in the same bits, and the same seeds still give the same weights.

tests/legacy/README.md says what the data is and how it was made.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dopsd_core.adapters import Lora
from dopsd_core.config import ConfigError, TrainConfig
from dopsd_core.objectives import DOPSD, SFT
from dopsd_core.old_config import former_identity
from dopsd_core.optimizers import AdamW, Constant, Cosine
from dopsd_core.teachers import EmaTeacher, FrozenTeacher
from dopsd_core.training.checkpoint import load_checkpoint
from dopsd_core.training.log import read_log
from dopsd_core.training.trainer import TrainingSet, train
from tests.tiny import TinyDenoiser, killable_data

LEGACY = Path(__file__).parent / "legacy"
DIGESTS = json.loads((LEGACY / "digests.json").read_text(encoding="utf-8"))


def old_config(name: str) -> str:
    return (LEGACY / "configs" / f"{name}.json").read_text(encoding="utf-8")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes, sorted by name."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def rounds_as_then() -> bool:
    """Whether torch computes on this machine the bits that it computed where the data was written."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(16, 8, generator=generator))
    x = torch.randn(5, 8, generator=generator)
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(torch.tanh(F.linear(x, weight)) @ torch.ones(16, 3), torch.ones(5, 3)).backward()
        optimizer.step()
    return hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest() == DIGESTS["rounding"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_configurations_mean_what_they_meant() -> None:
    demo = TrainConfig.from_json(old_config("demo"))
    assert demo == TrainConfig(
        steps=120,
        batch_size=4,
        checkpoint_every=50,
        probe_every=10,
        objective=DOPSD(anchor_probability=0.5),
        adapter=Lora(rank=16, alpha=16.0),
        optimizer=AdamW(lr=2e-3),
        schedule=Constant(warmup=10),
        teacher=EmaTeacher(decay=0.999),
    )
    sft = TrainConfig.from_json(old_config("sft"))
    assert (sft.objective, sft.teacher) == (SFT(sigmas="uniform", shift=2.5), FrozenTeacher())
    assert (sft.optimizer, sft.schedule) == (AdamW(lr=3e-4, weight_decay=0.01), Cosine(warmup=5))
    assert sft.adapter == Lora(rank=8, alpha=8.0, targets=("attention.to_q", "layers.*.feed_forward.w1"))
    assert (sft.max_grad_norm, sft.caption_dropout, sft.preview_every, sft.seed) == (0.0, 0.1, 30, 7)
    node = TrainConfig.from_json(old_config("node"))
    assert node == TrainConfig(steps=2, adapter=Lora(rank=32, alpha=64.0))


@pytest.mark.parametrize("name", ["demo", "sft", "node"])
def test_every_option_arrives(name: str) -> None:
    """Each one changed alone changes the configuration, unless it belongs to what was not chosen."""
    fields = json.loads(old_config(name))
    whole = TrainConfig.from_json(json.dumps(fields))
    others = {"dopsd": ("sft_sigmas", "sft_shift"), "sft": ("grad_steps", "loss", "anchor_probability")}
    idle = {*others[fields["objective"]], *(() if fields["teacher"] == "ema" else ("ema_decay",))}
    new: dict[str, Any] = {
        "lora": {"rank": 3, "alpha": 1.0, "targets": ["a"]}, "family": "flux2_klein", "steps": 77, "lr": 0.05,
        "schedule": "constant" if fields["schedule"] == "cosine" else "cosine", "warmup": 1, "batch_size": 9,
        "objective": "sft" if fields["objective"] == "dopsd" else "dopsd", "grad_accumulation": 9, "clip": 9.0,
        "rollout_steps": 9, "grad_steps": 1, "loss": "velocity", "teacher": "same", "ema_decay": 0.5,
        "anchor_probability": 0.9, "caption_dropout": 0.9, "optimizer": "adamw8bit", "weight_decay": 0.9,
        "sft_sigmas": "grid", "sft_shift": 9.0, "seed": 9, "checkpoint_every": 9, "keep_checkpoints": 9,
        "probe_every": 9, "probe_pairs": 9, "preview_every": 9,
    }  # fmt: skip
    assert new.keys() == fields.keys()
    fields["warmup"], fields["steps"] = 0, 60
    whole = TrainConfig.from_json(json.dumps(fields))
    same = {key for key in fields if TrainConfig.from_json(json.dumps(fields | {key: new[key]})) == whole}
    assert same == idle


def test_mistakes_in_an_old_file_are_all_named() -> None:
    fields = json.loads(old_config("demo"))
    bad = fields | {"stpes": 3, "batch_size": 0, "ema_decay": 2, "lora": fields["lora"] | {"rank": 0, "alhpa": 1}}
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_json(json.dumps(bad))
    assert len(caught.value.problems) == 5
    for words in ("did you mean steps?", "did you mean alpha?", "rank is 0", "batch_size is 0", "ema_decay is 2"):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="adapter is None"):
        TrainConfig.from_json(json.dumps(fields | {"lora": None}))


@pytest.mark.parametrize("name", DIGESTS["runs"])
def test_the_same_seeds_give_the_same_weights(name: str, tmp_path: Path) -> None:
    if not rounds_as_then():
        pytest.skip("torch rounds otherwise on this machine than where the digests were written")
    run = DIGESTS["runs"][name]
    train(TrainConfig.from_json(json.dumps(run["config"])), TinyDenoiser(), killable_data(), tmp_path)
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 12
    assert (digest(checkpoint.lora), digest(checkpoint.teacher)) == (run["student"], run["teacher"])
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert set(run["log_keys"]) <= {key for row in rows for key in row}


@pytest.mark.parametrize("name", ["tiny_run", "flat_run"])
def test_an_old_run_is_resumed_and_ends_in_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_checkpoint(LEGACY / name / "checkpoints")
    assert before is not None and before.step == 7
    # how the data is identified may change from release to release; that is not what is tested here
    monkeypatch.setattr(TrainingSet, "fingerprint", lambda self: before.facts["data"])
    config = TrainConfig.from_json((LEGACY / name / "config.json").read_text(encoding="utf-8"))
    shutil.copytree(LEGACY / name, tmp_path / "old")
    result = train(config, TinyDenoiser(), killable_data(), tmp_path / "old")
    train(config, TinyDenoiser(), killable_data(), tmp_path / "new")
    resumed, whole = (load_checkpoint(tmp_path / run / "checkpoints") for run in ("old", "new"))
    assert result.step == 12 and resumed is not None and whole is not None
    torch.testing.assert_close(dict(resumed.lora), dict(whole.lora), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(resumed.teacher), dict(whole.teacher), rtol=1e-4, atol=1e-6)
    if rounds_as_then():
        assert digest(resumed.lora) == DIGESTS["runs"]["dopsd with everything that draws"]["student"]
    assert [report.step for report in read_log(tmp_path / "old" / "train.jsonl")] == list(range(13))
    written = json.loads((tmp_path / "old" / "config.json").read_text(encoding="utf-8"))
    assert written["objective"]["name"] == "dopsd" and written["deterministic"] == (name == "flat_run")


@pytest.mark.parametrize("name", ["configs/demo.json", "configs/sft.json", "configs/node.json", "flat_run/config.json"])
def test_a_run_is_named_by_what_it_was_named_by(name: str) -> None:
    """Release 0.2 counted every field that forbids resuming, also those of what was not chosen."""
    text = (LEGACY / name).read_text(encoding="utf-8")
    fields = json.loads(text)
    may_change = {"steps", "checkpoint_every", "keep_checkpoints", "probe_every", "preview_every"}
    wanted = {key: value for key, value in fields.items() if key not in may_change}
    assert former_identity(TrainConfig.from_json(text).identity(), fields) == wanted
    fields["seed"] += 1
    assert former_identity(TrainConfig.from_json(json.dumps(fields)).identity(), fields) != wanted


def test_what_is_not_chosen_counts_as_it_was_set() -> None:
    fields = json.loads(old_config("sft"))
    names = ("grad_steps", "loss", "anchor_probability", "ema_decay")
    set_otherwise = {"grad_steps": 3, "loss": "velocity", "anchor_probability": 0.25, "ema_decay": 0.125}
    identity = TrainConfig.from_json(json.dumps(fields)).identity()
    found = former_identity(identity, set_otherwise)
    assert {key: found[key] for key in names} == set_otherwise
    defaults = {"grad_steps": None, "loss": "x0", "anchor_probability": 0.5, "ema_decay": 0.9999}
    assert {key: former_identity(identity, {})[key] for key in names} == defaults
