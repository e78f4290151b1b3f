"""Files of DoRA and LoKr: diffusers and peft load them at equal strength, and a run starts from them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dopsd_core.adapters import Dora, Lokr, Lora
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.lora_application import applied_lora
from dopsd_core.adapters.lora_import import read_lora
from dopsd_core.denoiser import plain_linear_sites
from dopsd_core.families import FLUX2_KLEIN, Z_IMAGE, Family
from dopsd_core.training.checkpoint import load_checkpoint
from dopsd_core.training.start import start_of
from dopsd_core.training.trainer import train
from tests.test_adapter_kinds import CONDITIONS, KINDS, X, merged, perturbed, trained_set
from tests.test_real_networks import flux2, z_image
from tests.tiny import TinyDenoiser, make_config, make_data
from tests.toy_denoiser import ToyDenoiser, ToyNet, assert_near, linear

FEATURES = [condition.features for condition in CONDITIONS]


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest) -> Lora:
    return KINDS[request.param]


def saved(config: Lora, folder: Path, dtype: torch.dtype | None = None) -> tuple[ToyDenoiser, AdapterSet, Path]:
    """A trained set on the toy, and its file; in fp32, or as a run writes it."""
    denoiser, adapters = trained_set(config)
    path = folder / "x.safetensors"
    if dtype is None:
        config.save(path, adapters.state(), Z_IMAGE, {"a": "b"})
    else:
        save_file({f"transformer.{k}": v.to(dtype) for k, v in config.exported(adapters.state()).items()}, path)
    return denoiser, adapters, path


def test_a_file_has_the_scale_in_its_tensors_and_magnitudes_in_full(config: Lora, tmp_path: Path) -> None:
    _, adapters, path = saved(config, tmp_path)
    state, tensors = adapters.state(), load_file(path)
    assert tensors.keys() == {f"transformer.{key}" for key in state}
    for key, value in state.items():
        stored = tensors[f"transformer.{key}"]
        if key.endswith((".lora_magnitude_vector", ".dora_scale")):
            assert stored.dtype == torch.float32 and torch.equal(stored, value)
        else:
            factor = 2.0 if key.endswith((".lora_B.weight", ".lokr_w2", ".lokr_w2_a")) else 1.0
            assert torch.equal(stored, (factor * value).bfloat16())


def test_comfyuis_magnitude_is_relative_to_the_norm_of_the_base() -> None:
    """ComfyUI computes (W + B A) * dora_scale / ||W||."""
    denoiser, adapters = trained_set(KINDS["dora"])
    state = adapters.state()
    for name in adapters.part_names():
        weight = linear(denoiser.net, name).weight.cpu()
        updated = weight + 2.0 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        comfyuis = updated * state[f"{name}.dora_scale"] / weight.norm(dim=1, keepdim=True)
        assert_near(comfyuis, merged(KINDS["dora"], weight, state, name), 1e-5)


# -- diffusers and peft ------------------------------------------------------------------------------------------------

NETWORKS: dict[str, tuple[Family, Callable[[], Any], str]] = {
    "z_image": (Z_IMAGE, z_image, "ZImageLoraLoaderMixin"),
    "flux2_klein": (FLUX2_KLEIN, flux2, "Flux2LoraLoaderMixin"),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_diffusers_loads_the_file_at_the_same_strength(network: str, config: Lora, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    loaders: Any = pytest.importorskip("diffusers.loaders.lora_pipeline")
    if isinstance(config, Lokr) and not hasattr(loaders, "_convert_non_diffusers_lokr_to_diffusers"):
        pytest.skip("this diffusers does not load LoKr")
    family, build, pipeline = NETWORKS[network]
    net, call = build()
    net.requires_grad_(False)
    ours = config.replace(targets=family.lora_targets)
    adapters = AdapterSet(plain_linear_sites(net), ours)
    adapters.load_state("student", perturbed(adapters.state(), std=0.1))
    save_file(
        {f"{family.key_prefix}{k}": v for k, v in ours.exported(adapters.state()).items()}, tmp_path / "x.safetensors"
    )
    with torch.no_grad():
        base = call(net)
        with adapters.attached():
            expected = call(net)
        tensors = getattr(loaders, pipeline).lora_state_dict(str(tmp_path), weight_name="x.safetensors")
        net.load_lora_adapter(tensors, prefix="transformer")
        assert_near(call(net), expected, 1e-4)
    assert (expected - base).abs().max() > 0.01 * base.abs().max()


def test_peft_loads_the_tensors_at_the_same_strength(config: Lora, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    denoiser, adapters, path = saved(config, tmp_path, torch.float32)
    names = "|".join(name.replace(".", r"\.") for name in adapters.part_names())
    if isinstance(config, Lokr):
        theirs = peft.LoKrConfig(r=config.rank, alpha=config.rank, decompose_factor=config.factor, target_modules=names)
    else:
        theirs = peft.LoraConfig(r=config.rank, lora_alpha=config.rank, use_dora=True, target_modules=names)
    model = peft.get_peft_model(ToyNet(), theirs)
    tensors = {k: v for k, v in load_file(path).items() if not k.endswith(".dora_scale")}
    result = peft.set_peft_model_state_dict(
        model, {k.replace("transformer.", "base_model.model."): v for k, v in tensors.items()}
    )
    assert not result.unexpected_keys
    with adapters.attached(), torch.no_grad():
        assert_near(model(X, 0.75, FEATURES), denoiser.net(X, 0.75, FEATURES), 1e-4)


def test_a_run_starts_from_a_peft_folder_of_a_dora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = KINDS["dora"]
    names = "|".join(re.escape(name) for name in AdapterSet(ToyDenoiser().sites(), config).part_names())
    theirs = peft.LoraConfig(r=config.rank, lora_alpha=2 * config.rank, use_dora=True, target_modules=names)
    model = peft.get_peft_model(ToyNet(), theirs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                value.add_(torch.rand(value.shape, generator=generator))
        wanted = model(X, 0.75, FEATURES)
        with model.disable_adapter():
            assert (model(X, 0.75, FEATURES) - wanted).abs().max() > 0.1
    model.save_pretrained(str(tmp_path))
    assert_near(outcome(started(config, read_lora(tmp_path))), wanted, 1e-4)
    with pytest.raises(ValueError, match="of DoRA: set adapter to dora"):
        started(Lora(rank=3, targets=("layers.*",)), read_lora(tmp_path))


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_a_file_is_applied_at_a_strength(config: Lora, tmp_path: Path, strength: float) -> None:
    denoiser, adapters, path = saved(config, tmp_path, torch.float32)
    name = "layers.0.feed_forward.w1"
    module, x = linear(denoiser.net, name), torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    base = module(x)
    whole = merged(config, module.weight, adapters.state(), name)
    with applied_lora(denoiser.sites(), path, strength).attached():
        assert_near(module(x), base + strength * (x @ (whole - module.weight).mT), 1e-5)


# -- the start of a run ------------------------------------------------------------------------------------------------


def started(config: Lora, tensors: dict[str, Tensor]) -> AdapterSet:
    sites = ToyDenoiser().sites()
    adapters = AdapterSet(sites, config, seed=8)
    adapters.load_state("student", config.start_state(config.imported(tensors, sites).tensors, adapters.state()))
    return adapters


def outcome(adapters: AdapterSet) -> Tensor:
    denoiser = ToyDenoiser()
    other = AdapterSet(denoiser.sites(), adapters.config)
    other.load_state("student", adapters.state())
    with other.attached(), torch.no_grad():
        return denoiser.net(X, 0.75, FEATURES)


def test_a_run_starts_from_a_file_of_its_kind(config: Lora, tmp_path: Path) -> None:
    _, adapters, path = saved(config, tmp_path, torch.float32)
    assert_near(outcome(started(config, read_lora(path))), outcome(adapters), 1e-5)
    larger = config.replace(rank=config.rank + 1, alpha=1.0)
    if not isinstance(config, Lokr) or config.rank > 3:
        assert_near(outcome(started(larger, read_lora(path))), outcome(adapters), 1e-4)


def test_a_run_that_started_from_a_file_of_its_kind_trains(tmp_path: Path) -> None:
    for kind in ({"adapter": "dora"}, {"adapter": "lokr", "factor": 2, "rank": 1}):
        config = make_config(**kind)
        first = train(config, TinyDenoiser(), make_data(), tmp_path / f"{config.adapter.name} 1")
        initial = config.adapter.imported(read_lora(first.lora_path), TinyDenoiser().sites())
        assert not initial.left_out
        run = tmp_path / f"{config.adapter.name} 2"
        result = train(config, TinyDenoiser(), make_data(), run, initial=initial.tensors)
        assert result.start_gaps is not None and first.start_gaps is not None
        assert result.start_gaps.train < first.start_gaps.train
        assert load_checkpoint(run / "checkpoints") is not None


def lokr_file(**tensors: Tensor) -> dict[str, Tensor]:
    prefix = "diffusion_model.layers.0.attention.to_q"
    return {f"{prefix}.{'' if name == 'alpha' else 'lokr_'}{name}": t for name, t in tensors.items()}


def test_a_lokr_of_another_trainer_starts_at_comfyuis_strength() -> None:
    """alpha / rank counts where a factor is a product, and not where both are in one piece."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    w1, w2, left, right, one, two = draw(2, 2), draw(8, 8), draw(8, 3), draw(3, 8), draw(2, 1), draw(1, 2)
    alpha = torch.tensor(6.0)
    name = "layers.0.attention.to_q"
    for tensors, config, wanted in (
        (lokr_file(w1=w1, w2=w2, alpha=alpha), KINDS["lokr in one piece"], torch.kron(w1, w2)),
        (lokr_file(w1=w1, w2_a=left, w2_b=right, alpha=alpha), KINDS["lokr"], 2 * torch.kron(w1, left @ right)),
        (lokr_file(w1_a=one, w1_b=two, w2=w2, alpha=alpha), KINDS["lokr in one piece"], 6 * torch.kron(one @ two, w2)),
        (lokr_file(w1=w1, w2_a=left, w2_b=right), KINDS["lokr in one piece"], torch.kron(w1, left @ right)),
    ):
        state = started(config, tensors).state()
        assert_near(merged(config, torch.zeros(16, 16), state, name), wanted, 1e-5)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (KINDS["lokr"], {"w1": (4, 4), "w2": (4, 4)}, "first factor of 4 x 4 in .*to_q, the run one of 2 x 2; set fac"),
        (KINDS["lokr"], {"w1": (2, 2), "w2": (8, 8)}, "second factor in one piece in .*; set rank to 4 or more"),
        (
            KINDS["lokr"],
            {"w1": (2, 2), "w2_a": (8, 5), "w2_b": (5, 8)},
            "has rank 5, the run has rank 3; set rank to 5",
        ),
        (KINDS["lokr"], {"w1": (2, 2), "w2": (8, 9)}, "is of another model: .*to_q' goes from 18 to 16, here it goes"),
        (
            KINDS["lokr"],
            {"w1": (2, 2), "w2_a": (8, 3)},
            "is incomplete: .*to_q' lacks its w2, or the halves do not fit",
        ),
        (KINDS["lokr"], {"w1": (2, 2), "w2": (8, 8), "t2": (3, 3)}, "lokr_t2', which adapter lokr cannot start from"),
        (KINDS["lokr"], {"w1": (2, 2, 1), "w2": (8, 8)}, r"w1 of .* is torch.float32 \(2, 2, 1\); it must be a finite"),
        (KINDS["dora"], {"w1": (2, 2), "w2": (8, 8)}, "is a LoKr; set adapter to lokr, or start from a DoRA"),
        (Lora(rank=3, targets=("layers.*",)), {"w1": (2, 2), "w2": (8, 8)}, "of LoKr: set adapter to lokr, or"),
    ],
)
def test_a_lokr_that_does_not_fit_is_refused(config: Lora, tensors: dict[str, Any], message: str) -> None:
    file = lokr_file(**{name: torch.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(ValueError, match=message):
        started(config, file)
    with pytest.raises(ValueError, match=message):  # and before anything is encoded
        start_of(file, {}, ToyDenoiser().sites(), make_config().replace(adapter=config))


def test_what_is_no_lokr_is_advised_before_its_tensors_are_named() -> None:
    file = {f"layers.{index}.{'x' * index}.lora_A.weight": torch.ones(3, 3) for index in range(1, 20)}
    with pytest.raises(ValueError, match="is not a LoKr; set adapter to lora, or start from a LoKr") as raised:
        started(KINDS["lokr"], file)
    assert len(str(raised.value)) < 160


def test_a_lokr_of_other_layers_is_refused_and_of_more_layers_is_reported() -> None:
    ours = lokr_file(w1=torch.ones(2, 2), w2_a=torch.ones(8, 3), w2_b=torch.ones(3, 8))
    other = {key.replace("layers.0.attention.to_q", "blocks.7.x"): value for key, value in ours.items()}
    with pytest.raises(ValueError, match="changes nothing that is trained here: its layers are .*blocks.N.x"):
        started(KINDS["lokr"], other)
    imported = KINDS["lokr"].imported({**other, **ours}, ToyDenoiser().sites())
    assert imported.left_out == tuple(other) and len(imported.tensors) == 3


def dora_file(**changes: Tensor | None) -> dict[str, Tensor]:
    part = "transformer.layers.0.attention.to_q"
    tensors = {"lora_A.weight": torch.ones(2, 16), "lora_B.weight": torch.ones(16, 2)}
    tensors["lora_magnitude_vector"] = torch.ones(16)
    tensors["dora_scale"] = torch.ones(16, 1)
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return {f"{part}.{name}": value for name, value in {**tensors, **given}.items() if value is not None}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (KINDS["dora"], dora_file(lora_magnitude_vector=None), "has dora_scale without lora_magnitude_vector"),
        (KINDS["dora"], dora_file(lora_magnitude_vector=None, dora_scale=None), "is not a DoRA; set adapter to lora"),
        (
            KINDS["dora"],
            dora_file(lora_magnitude_vector=torch.ones(15)),
            "magnitude of .*to_q' has 15 rows, here it has",
        ),
        (KINDS["dora"], dora_file(lora_magnitude_vector=torch.ones(16) / 0), "magnitude of .*to_q' is not finite"),
        (KINDS["dora"], dora_file(lora_magnitude_vector__student=torch.ones(16)), "several magnitudes of a layer"),
        (
            KINDS["dora"],
            {**dora_file(), **{k.replace("to_q", "to_k"): v for k, v in dora_file(lora_magnitude_vector=None).items()}},
            "no magnitude for .*to_k",
        ),
        (KINDS["lokr"], dora_file(), "holds .*, which adapter lokr cannot start from"),
        (
            Lora(rank=3, targets=("layers.*",)),
            dora_file(),
            "of DoRA: set adapter to dora, or start from a plain LoRA",
        ),
        (
            Lora(rank=3, targets=("layers.*",)),
            dora_file(lora_magnitude_vector=None),
            "of a DoRA without lora_magnitude_vector: start from a plain LoRA",
        ),
    ],
)
def test_a_dora_that_does_not_fit_is_refused(config: Lora, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        started(config, tensors)


def test_the_magnitudes_of_a_fused_dora_are_split_with_its_rows() -> None:
    """The file is for the fused projection, and the run trains q and v alone."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 16, generator=generator), torch.randn(48, 2, generator=generator)
    magnitude = torch.rand(48, generator=generator)
    tensors = {
        "diffusion_model.layers.1.attention.qkv.lora_A.weight": a,
        "diffusion_model.layers.1.attention.qkv.lora_B.weight": b,
        "diffusion_model.layers.1.attention.qkv.lora_magnitude_vector": magnitude,
    }
    from tests.toy_denoiser import fuse_qkv

    sites = ToyDenoiser(fuse_qkv(ToyNet())).sites()
    config = Dora(rank=2, targets=("to_q", "to_v"))
    imported = config.imported(tensors, sites)
    for number, part in ((0, "to_q"), (2, "to_v")):
        got = imported.tensors[f"layers.1.attention.{part}.lora_magnitude_vector"]
        assert torch.equal(got, magnitude[16 * number : 16 * (number + 1)])
    assert imported.left_out == tuple(tensors)
