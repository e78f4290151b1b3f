"""The adversarial stage of the demo model's making."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dopsd_core.demo.model_files import MODEL_FILE, PARENT_FILE, VAE_FILE, WEIGHTS
from dopsd_core.sigmas import z_image_turbo_sigmas
from dopsd_core.standalone.hosts.demo_weight_files import load_transformer
from dopsd_core.standalone.making.batched import BatchedTransformer
from dopsd_core.standalone.making.captions import DISTILLATION
from dopsd_core.standalone.making.data import RowMaker, load_autoencoder
from dopsd_core.standalone.making.gate import Sampler
from dopsd_core.standalone.making.pretrain import Parent, load_parent, load_student
from dopsd_core.standalone.making.sharpen import (
    MANY_ANSWERS,
    Discriminator,
    Game,
    discriminator_loss,
    mean_features,
    train,
)
from dopsd_core.standalone.making.twins import Twins

ALONE = Twins(0, 1)
TOLERANCE = 0.05 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 1e-4  # bf16 there


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Parent:
    return load_parent(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def game(parent: Parent, tmp_path_factory) -> Game:
    distilled = load_student(tmp_path_factory.mktemp("none"))
    learned = copy.deepcopy(distilled).requires_grad_(True)
    return Game(parent, BatchedTransformer(distilled), BatchedTransformer(learned), Discriminator(16), 0.3)


def maker(parent: Parent, mixture=MANY_ANSWERS) -> RowMaker:
    return RowMaker(load_autoencoder(WEIGHTS / VAE_FILE), parent.token_ids, mixture)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arguments(folder: Path, **changed) -> SimpleNamespace:
    values = {"steps": 2, "alone": 1, "batch": 3, "lr": 1e-3, "discriminator_lr": 1e-3, "weight": 0.05}
    return SimpleNamespace(folder=folder, keep_open=0.3, **(values | changed))


def test_the_discriminator_pays_for_scores_within_the_margin_only() -> None:
    real, drawn = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.5]])
    assert discriminator_loss(real, drawn).item() == pytest.approx((0 + 0.5) / 2 + (0 + 1.5) / 2)


def test_the_mean_of_a_caption_ignores_its_padding() -> None:
    features = torch.randn(3, 5, 4, generator=seeded(0))
    lengths = torch.tensor([5, 2, 1])
    wanted = torch.stack([row[:n].mean(0) for row, n in zip(features, lengths.tolist(), strict=True)])
    assert torch.allclose(mean_features(features, lengths), wanted, atol=1e-6)


def test_an_unchanged_student_has_nothing_to_keep(game: Game, parent: Parent) -> None:
    rows = maker(parent, DISTILLATION).draw(6, 2, seeded(1))
    assert game.keep_loss(rows, seeded(2)).item() == 0
    changed = copy.deepcopy(game.student.model)
    with torch.no_grad():
        next(iter(changed.layers)).attention.to_q.weight.add_(0.1)
    other = Game(parent, game.distilled, BatchedTransformer(changed), game.discriminator, 0.3)
    assert other.keep_loss(rows, seeded(2)).item() > 0


def test_the_student_draws_as_the_gate_does_with_gradients_through_every_step(game: Game, parent: Parent) -> None:
    rows = maker(parent).draw(3, 0, seeded(3))
    features, noise = game.features(rows), torch.randn(3, 16, 8, 8, generator=seeded(4))
    drawn = game.draw(rows, features, noise)
    wanted = Sampler(game.student, 2)(features, rows.lengths, noise, parent.empty_features(), is_open=True)
    assert torch.allclose(drawn, wanted, atol=TOLERANCE)
    first, second, end = z_image_turbo_sigmas(2)
    weight = game.student.model.layers[0].attention.to_q.weight
    middle = noise + (second - first) * game.student(noise, torch.full((3,), first), features, rows.lengths)
    last = middle + (end - second) * game.student(middle, torch.full((3,), second), features, rows.lengths)
    got, wanted = (torch.autograd.grad(x.square().sum(), weight)[0] for x in (drawn, last))
    assert torch.allclose(got, wanted, atol=TOLERANCE * float(wanted.abs().max()))


def test_the_student_waits_for_the_discriminator_and_the_result_is_what_gate_and_export_read(tmp_path: Path) -> None:
    before = load_student(tmp_path).state_dict()
    waiting, playing = tmp_path / "waiting", tmp_path / "playing"
    for folder, alone in ((waiting, 2), (playing, 1)):
        folder.mkdir()
        train(ALONE, arguments(folder, alone=alone))  # type: ignore[arg-type]
    assert all(torch.equal(v, before[k]) for k, v in load_file(waiting / "sharpened.safetensors").items())
    made = load_student(playing).state_dict()
    assert all(torch.equal(made[k], v) for k, v in load_file(playing / "sharpened.safetensors").items())
    assert not torch.equal(made["layers.0.attention.to_q.weight"], before["layers.0.attention.to_q.weight"])


def test_what_was_not_made_is_what_ships(tmp_path: Path, parent: Parent) -> None:
    for name, loaded in ((PARENT_FILE, parent.transformer), (MODEL_FILE, load_student(tmp_path))):
        wanted = load_transformer(WEIGHTS / name).state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in loaded.state_dict().items()), name
    save_file({k: v + 1 for k, v in wanted.items()}, tmp_path / "distilled.safetensors")
    assert all(torch.equal(v, wanted[k] + 1) for k, v in load_student(tmp_path).state_dict().items())


def test_a_folder_that_is_not_there_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    for load in (load_parent, load_student):
        with pytest.raises(FileNotFoundError, match=r"mistyped is no folder"):
            load(tmp_path / "mistyped")


def test_a_student_sharpened_before_it_was_distilled_again_is_refused(tmp_path: Path) -> None:
    weights = load_student(tmp_path).state_dict()
    for name, at in (("distilled", 2_000), ("sharpened", 1_000)):
        save_file({k: v.clone() for k, v in weights.items()}, path := tmp_path / f"{name}.safetensors")
        os.utime(path, (at, at))
    with pytest.raises(ValueError, match=r"sharpened.safetensors was made before distilled.safetensors"):
        load_student(tmp_path)
    os.utime(path, (3_000, 3_000))
    load_student(tmp_path)


def test_which_weights_are_used_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_student(tmp_path).state_dict()
    save_file({k: v.clone() for k, v in weights.items()}, tmp_path / "distilled.safetensors")
    load_student(tmp_path)
    shipped, own = capsys.readouterr().out.splitlines()
    assert "the file that ships" in shipped and own == f"taking {tmp_path / 'distilled.safetensors'}"
