"""LoRAs under the names of every trainer land on our parts with the effect that they have in their own."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dopsd_core.adapters import Lora
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.lora_file import load_lora
from dopsd_core.adapters.lora_import import import_lora, lora_digest, read_lora, start_state
from dopsd_core.families import Z_IMAGE
from dopsd_core.training.checkpoint import StateError
from dopsd_core.training.trainer import train
from tests.tiny import TinyDenoiser, make_config, make_data, saved_bytes
from tests.toy_denoiser import WIDTH, ToyDenoiser, ToyNet, fuse_qkv

TARGETS = Z_IMAGE.lora_targets[:6]  # the toy has no w3
BLOCK = "layers.0"
RANK, ALPHA = 3, 7.5


@pytest.fixture
def sites():
    return ToyDenoiser(fuse_qkv(ToyNet())).sites()


def pair(rows: int, rank: int = RANK, columns: int = WIDTH, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


def deltas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B @ A of every part."""
    names = {key.rsplit(".lora_", 1)[0] for key in tensors}
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


def assert_deltas(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    got = deltas(tensors)
    assert got.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(got[name], delta, rtol=1e-5, atol=1e-6)


Q, OUT, W1 = pair(WIDTH, seed=1), pair(WIDTH, seed=2), pair(24, seed=3)
SPLIT = {f"{BLOCK}.attention.to_q": Q, f"{BLOCK}.attention.to_out.0": OUT, f"{BLOCK}.feed_forward.w1": W1}
NATIVE_OUT = {f"{BLOCK}.attention.out": OUT}


def dotted(prefix: str, a: str, b: str, modules: Mapping = SPLIT, alpha: float | None = None) -> dict[str, Tensor]:
    found = {}
    for name, (down, up) in modules.items():
        found |= {f"{prefix}{name}{a}": down, f"{prefix}{name}{b}": up}
        if alpha is not None:
            found[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    return found


def flat(modules: Mapping = SPLIT) -> dict:
    return {name.replace(".", "_"): value for name, value in modules.items()}


AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
ADAPTER = (".lora_A.default.weight", ".lora_B.default.weight")
FILES = {
    "ours and diffusers": (dotted("transformer.", *AB), 1.0),
    "ai-toolkit": (dotted("diffusion_model.", *AB), 1.0),
    "ai-toolkit with alpha": (dotted("diffusion_model.", *AB, alpha=ALPHA), ALPHA / RANK),
    "musubi, raw": (dotted("lora_unet_", *DOWN_UP, flat(), ALPHA), ALPHA / RANK),
    "onetrainer": (dotted("lora_transformer_", *DOWN_UP, flat(), ALPHA), ALPHA / RANK),
    "simpletuner": (dotted("lycoris_", *DOWN_UP, flat(), ALPHA), ALPHA / RANK),
    "peft": (dotted("base_model.model.", *AB), 1.0),
    "peft with an adapter's name": (dotted("base_model.model.", *ADAPTER), 1.0),
    "peft around a pipeline's network": (dotted("base_model.model.transformer.", *AB), 1.0),
    "no prefix": (dotted("", *AB), 1.0),
    "old diffusers": (dotted("transformer.", ".lora.down.weight", ".lora.up.weight"), 1.0),
    "older diffusers": (dotted("transformer.", "_lora.down.weight", "_lora.up.weight"), 1.0),
    "diffusers' own layers": (
        dotted("transformer.", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", alpha=ALPHA),
        ALPHA / RANK,
    ),
    "without .weight": (dotted("diffusion_model.", ".lora_A", ".lora_B", alpha=ALPHA), ALPHA / RANK),
}


@pytest.mark.parametrize(("file", "scale"), FILES.values(), ids=FILES.keys())
def test_names_and_alpha(sites, file, scale):
    imported = import_lora(file, sites, TARGETS)
    assert imported.left_out == ()
    assert_deltas(imported.tensors, {name: scale * b @ a for name, (a, b) in SPLIT.items()})


def test_the_networks_own_names(sites):
    for file in (dotted("diffusion_model.", *DOWN_UP, NATIVE_OUT), dotted("lora_unet_", *DOWN_UP, flat(NATIVE_OUT))):
        imported = import_lora(file, sites, TARGETS)
        assert_deltas(imported.tensors, {f"{BLOCK}.attention.to_out.0": OUT[1] @ OUT[0]})


@pytest.mark.parametrize("flattened", [False, True], ids=["comfyui's trainer", "lora_unet"])
def test_a_fused_projection_is_split_exactly(sites, flattened):
    """ComfyUI's own trainer has one A for q, k and v; each part gets a copy, at the same rank."""
    a, b = pair(3 * WIDTH)
    name = f"{BLOCK}.attention.qkv"
    prefix, modules = ("lora_unet_", flat({name: (a, b)})) if flattened else ("diffusion_model.", {name: (a, b)})
    tensors = import_lora(dotted(prefix, *DOWN_UP, modules, ALPHA), sites, TARGETS).tensors
    rows = (ALPHA / RANK) * (b @ a)
    parts = [f"{BLOCK}.attention.to_{letter}" for letter in "qkv"]
    assert_deltas(tensors, dict(zip(parts, rows.split(WIDTH), strict=True)))
    assert all(torch.equal(tensors[f"{part}.lora_A.weight"], a) for part in parts)


def test_musubis_conversion_of_qkv_is_undone(sites):
    """It stacks the three As and lays the Bs out as blocks: rank 3 r, of which each part needs r."""
    three = [pair(WIDTH, seed=seed) for seed in range(3)]
    fused = torch.cat([a for a, _ in three]), torch.block_diag(*(b for _, b in three))
    file = dotted("lora_unet_", *DOWN_UP, flat({f"{BLOCK}.attention.qkv": fused}), 3 * ALPHA)
    tensors = import_lora(file, sites, TARGETS).tensors
    for letter, (a, b) in zip("qkv", three, strict=True):
        part = f"{BLOCK}.attention.to_{letter}"
        assert torch.equal(tensors[f"{part}.lora_A.weight"], a)
        torch.testing.assert_close(tensors[f"{part}.lora_B.weight"], b * (ALPHA / RANK))


def test_two_loras_on_one_part_are_added(sites):
    a, b = pair(3 * WIDTH, rank=2)
    file = dotted("diffusion_model.", *AB, {f"{BLOCK}.attention.qkv": (a, b)}) | dotted("transformer.", *AB)
    got = deltas(import_lora(file, sites, TARGETS).tensors)[f"{BLOCK}.attention.to_q"]
    torch.testing.assert_close(got, (b @ a)[:WIDTH] + Q[1] @ Q[0])


@pytest.mark.parametrize("prefix", ["transformer.", "lora_unet_", "base_model.model."])
def test_a_layer_under_two_names_is_refused(sites, prefix):
    """ComfyUI applies the last of the two names that it looks for, so their sum would be another LoRA."""
    second = flat(NATIVE_OUT) if prefix == "lora_unet_" else {f"{BLOCK}.attention.to_out.0": OUT}
    file = dotted("diffusion_model.", *AB, NATIVE_OUT) | dotted(prefix, *DOWN_UP, second)
    with pytest.raises(ValueError, match=r"one layer under two names, .*attention.out' and .*attention"):
        import_lora(file, sites, TARGETS)


def test_the_students_weights_are_taken_from_a_file_with_the_teachers(sites):
    file = {}
    for adapter, factor in (("teacher", 5.0), ("student", 1.0)):
        file |= {k.replace("default", adapter): factor * v for k, v in dotted("base_model.model.", *ADAPTER).items()}
    assert_deltas(import_lora(file, sites, TARGETS).tensors, {name: b @ a for name, (a, b) in SPLIT.items()})


def test_what_is_not_trained_is_reported(sites):
    others = {
        "diffusion_model.embed.lora_A.weight": torch.ones(1, 4),
        "diffusion_model.embed.lora_B.weight": torch.ones(WIDTH, 1),
        "diffusion_model.layers.0.norm.diff": torch.ones(WIDTH),
        "text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(1, 4),
        "text_encoder.layers.0.q_proj.lora_B.weight": torch.ones(4, 1),
    }
    imported = import_lora({**dotted("diffusion_model.", *AB), **others}, sites, TARGETS)
    assert sorted(imported.left_out) == sorted(others)
    assert_deltas(imported.tensors, {name: b @ a for name, (a, b) in SPLIT.items()})
    only_q = import_lora(dotted("diffusion_model.", *AB, {f"{BLOCK}.attention.qkv": pair(3 * WIDTH)}), sites, ("to_q",))
    assert len(only_q.left_out) == 2 and deltas(only_q.tensors).keys() == {f"{BLOCK}.attention.to_q"}


A_KEY, B_KEY = f"transformer.{BLOCK}.attention.to_q.lora_A.weight", f"transformer.{BLOCK}.attention.to_q.lora_B.weight"
ALPHA_KEY = f"transformer.{BLOCK}.attention.to_q.alpha"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"unet.x.hada_w1_a": torch.ones(1)}, "LoHa"),
        ({f"transformer.{BLOCK}.attention.to_q.dora_scale": torch.ones(1)}, "DoRA"),
        ({A_KEY: torch.ones(RANK, 5)}, "of another model.*from 5 to 16.*from 16 to 16"),
        ({A_KEY: torch.ones(2, WIDTH)}, "damaged"),
        ({A_KEY: torch.full((RANK, WIDTH), torch.nan)}, "not finite"),
        ({A_KEY: None}, "incomplete.*to_q"),
        ({A_KEY: torch.ones(RANK)}, r"damaged: A \(3,\)"),
        ({A_KEY: torch.ones(0, WIDTH), B_KEY: torch.ones(WIDTH, 0)}, r"damaged: A \(0, 16\)"),
        ({B_KEY: Q[1].to(torch.int8)}, "int8; a LoRA needs floating-point numbers"),
        ({ALPHA_KEY: torch.ones(2)}, r"to_q\.alpha' is float32 of shape \(2,\), it must be a single number"),
        ({ALPHA_KEY: torch.tensor(torch.inf)}, "is inf, it must be a finite number"),
        ({A_KEY.replace("lora_A", "lora_down"): Q[0]}, "several LoRAs"),
        ({B_KEY.replace("lora_B", "lora_B.one"): Q[1], B_KEY: None}, "incomplete"),
    ],
)
def test_what_cannot_be_continued_is_one_sentence(sites, change, found):
    file = {k: v for k, v in {**dotted("transformer.", *AB), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=found) as error:
        import_lora(file, sites, TARGETS)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


ONE = {f"{BLOCK}.attention.to_q": Q}
ELSEWHERE = {f"double_blocks.{number}.img_mlp.0": Q for number in range(3)}


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ({}, "use a LoRA file; none of its 0 tensors belongs to a LoRA"),
        (
            {"a.0.diff": Q[0], "a.1.diff": Q[0]},
            r"use a LoRA file; none of its 2 tensors belongs to a LoRA \('a\.N\.diff' \(x2\)\)",
        ),
        (
            dotted("transformer.", *AB, alpha=0.0),
            "its alpha is 0, a strength of 0; use the file with the alpha of its training .*to_q",
        ),
        (
            dotted("transformer.", *AB, {f"{BLOCK}.attention.to_q": (Q[0], 0 * Q[1])}),
            "its B is zero, as before the first training step; use a LoRA that was trained .*to_q",
        ),
        (
            dotted("transformer.", *AB, ELSEWHERE),
            r"use a LoRA that .*; 0 of its 3 modules are recognised, not .*double_blocks\.N\.img_mlp\.N' \(x3\)",
        ),
        (
            dotted("lora_unet_", *DOWN_UP, {f"{BLOCK}_adaLN_modulation_0": Q, "layers_0_attn_q": Q}),
            "use a LoRA that .*; 0 of its 2 modules are recognised, not recognised are .*adaLN.*, .*attn_q",
        ),
    ],
)
def test_a_lora_that_changes_nothing_is_refused_with_the_reason(sites, file, why):
    with pytest.raises(ValueError, match=f"changes nothing that is trained here: {why}") as error:
        import_lora(file, sites, TARGETS)
    assert "\n" not in str(error.value)


def test_a_lora_of_what_is_not_a_target_says_what_was_recognised(sites):
    file = dotted("transformer.", *AB, ONE | ELSEWHERE)
    sentence = (
        r"none of its layers is among the targets: change targets, .*; 1 of its 4 modules are recognised .*to_q'\)"
    )
    with pytest.raises(ValueError, match=sentence):
        import_lora(file, sites, ("feed_forward.w1",))


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_unet_", "transformer."])
@pytest.mark.parametrize("name", ["layers_0.attention.to_q", "layers.0_attention_to_q", "layers.0.attention_to_q"])
def test_half_converted_names_are_understood(sites, prefix, name):
    """Dots and underscores mixed: what is meant is plain, and it is all there."""
    imported = import_lora(dotted(prefix, *DOWN_UP, {name: Q}, alpha=ALPHA), sites, TARGETS)
    assert_deltas(imported.tensors, {f"{BLOCK}.attention.to_q": ALPHA / RANK * Q[1] @ Q[0]})
    assert imported.left_out == ()


def test_every_key_that_is_not_used_is_named(sites):
    """Of another module, without a partner, of the text encoder, of a second adapter, of no strength, of no LoRA."""
    used = dotted("transformer.", *AB, {f"{BLOCK}.feed_forward.w1": W1}, alpha=ALPHA)
    both = {key.replace(".weight", ".student.weight"): value for key, value in dotted("", *AB, ONE).items()}
    unused = {
        **dotted("transformer.", *AB, ELSEWHERE, alpha=1.0),
        "transformer.layers.7.attention.to_q.alpha": torch.tensor(1.0),
        **dotted("lora_te_", *DOWN_UP, {"text_model_layers_0_mlp": Q}, alpha=1.0),
        **{key.replace("student", "teacher"): 2 * value for key, value in both.items()},
        **dotted("transformer.", *AB, {f"{BLOCK}.attention.to_out.0": OUT}, alpha=0.0),
        "transformer.norm.diff_b": torch.ones(3),
    }
    imported = import_lora({**used, **both, **unused}, sites, TARGETS)
    assert imported.left_out == tuple(unused)
    message = imported.describe_left_out()
    assert message.startswith(f"{len(unused)} tensors of it are not used: ")
    for kind in (
        "double_blocks.N.img_mlp.N.alpha' (x3)",
        "layers.N.attention.to_q.alpha'",
        "lora_te_text_model_layers_N_mlp",
    ):
        assert kind in message
    assert_deltas(
        imported.tensors,
        {f"{BLOCK}.feed_forward.w1": ALPHA / RANK * W1[1] @ W1[0], f"{BLOCK}.attention.to_q": Q[1] @ Q[0]},
    )


def test_one_unused_tensor_and_very_many_kinds_read_well(sites):
    file = dotted("transformer.", *AB, ONE)
    one = import_lora({**file, "norm.diff_b": torch.ones(3)}, sites, TARGETS)
    assert one.describe_left_out() == "1 tensor of it is not used: 'norm.diff_b'"
    assert import_lora(file, sites, TARGETS).describe_left_out() == ""
    odd = {"x" * 10**6: torch.ones(1), **{f"kind{'abcdefghijklmnopqrs'[n]}": torch.ones(1) for n in range(19)}}
    many = import_lora({**file, **odd}, sites, TARGETS).describe_left_out()
    assert many.endswith("and 8 more kinds") and len(many) < 1000


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_folder_with_alpha_in_its_configuration(sites, tmp_path, rslora):
    save_file(dotted("base_model.model.", *AB), tmp_path / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": 2 * RANK, "alpha_pattern": {"feed_forward.w1": 1.0}, "use_rslora": rslora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    size = RANK**0.5 if rslora else RANK
    scales = {name: (1.0 if "w1" in name else 2 * RANK) / size for name in SPLIT}
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        tensors = import_lora(read_lora(path), sites, TARGETS).tensors
        assert_deltas(tensors, {name: scales[name] * b @ a for name, (a, b) in SPLIT.items()})
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        read_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_lora(tmp_path)


def test_diffusers_alpha_is_read_from_the_header(sites, tmp_path):
    settings = {"transformer.r": RANK, "transformer.lora_alpha": 2 * RANK, "transformer.alpha_pattern": {}}
    path = tmp_path / "x.safetensors"
    save_file(dotted("transformer.", *AB), path, {"lora_adapter_metadata": json.dumps(settings)})
    assert_deltas(
        import_lora(read_lora(path), sites, TARGETS).tensors, {name: 2 * b @ a for name, (a, b) in SPLIT.items()}
    )


# -- the start of a run ------------------------------------------------------------------------------------------------


def test_a_smaller_rank_is_filled_up_exactly_and_can_learn(sites):
    config = Lora(rank=RANK + 2, alpha=9.0, targets=TARGETS)
    adapters = AdapterSet(sites, config)
    imported = import_lora(dotted("transformer.", *AB, alpha=ALPHA), sites, TARGETS).tensors
    state = start_state(imported, adapters.state(), config)
    adapters.load_state("student", state)
    expected = {name: torch.zeros(b.shape[0], WIDTH if "w2" not in name else 24) for name, b in _b(adapters).items()}
    expected |= {name: (ALPHA / RANK) * b @ a for name, (a, b) in SPLIT.items()}
    assert_deltas({k: v * config.scale if ".lora_B." in k else v for k, v in state.items()}, expected)
    fresh = AdapterSet(sites, config).state()
    for name in SPLIT:
        assert torch.equal(state[f"{name}.lora_A.weight"][RANK:], fresh[f"{name}.lora_A.weight"][RANK:])
        assert state[f"{name}.lora_A.weight"][RANK:].any(dim=1).all()


def _b(adapters: AdapterSet) -> dict[str, Tensor]:
    return {k.removesuffix(".lora_B.weight"): v for k, v in adapters.state().items() if ".lora_B." in k}


def test_a_larger_rank_and_other_parts_are_refused(sites):
    small = Lora(rank=RANK - 1, alpha=1.0, targets=TARGETS)
    imported = import_lora(dotted("transformer.", *AB), sites, TARGETS).tensors
    with pytest.raises(ValueError, match="has rank 3, the run has rank 2; set rank to 3"):
        start_state(imported, AdapterSet(sites, small).state(), small)
    other = Lora(rank=RANK, alpha=1.0, targets=("attention.to_v",))
    with pytest.raises(ValueError, match="6 tensors that are not trained"):
        start_state(imported, AdapterSet(sites, other).state(), other)


@pytest.fixture
def trained(tmp_path: Path) -> dict[str, Tensor]:
    """A LoRA of the tiny network that does something."""
    config = make_config(steps=4)
    result = train(config, TinyDenoiser(), make_data(), tmp_path / "first")
    return {key: value.float() for key, value in load_lora(result.lora_path)[0].items()}


@pytest.mark.parametrize("teacher", ["ema", "frozen", "same"])
def test_a_run_starts_from_a_lora(tmp_path, trained, teacher, monkeypatch):
    """With nothing learned the LoRA comes out as it went in, and the teacher has it too."""
    config = make_config(steps=1, lr=1e-12, teacher=teacher, probe_every=0)
    result = train(config, TinyDenoiser(), make_data(), tmp_path / "next", initial=trained)
    out = load_lora(result.lora_path)[0]
    for key, value in trained.items():
        torch.testing.assert_close(out[key].float(), value, rtol=1e-2, atol=1e-6)  # the file is bf16
    loaded = saved_bytes(tmp_path / "next")
    assert lora_digest(trained).encode() in loaded["header"]
    assert (b"lora_A" in loaded["checkpoint/teacher.safetensors"]) == (teacher == "ema")
    if teacher == "ema":
        from safetensors.torch import load

        average = load(loaded["checkpoint/teacher.safetensors"])
        exported = config.adapter.exported(average)
        for key, value in trained.items():
            torch.testing.assert_close(exported[key], value)


def test_a_run_resumes_only_with_the_lora_that_it_started_from(tmp_path, trained):
    config, folder = make_config(steps=6), tmp_path / "cut"
    train(make_config(steps=3), TinyDenoiser(), make_data(), folder, initial=trained)
    changed = {key: value * 1.5 for key, value in trained.items()}
    for initial in (None, changed):
        with pytest.raises(StateError, match="the LoRA that it started from"):
            train(config, TinyDenoiser(), make_data(), folder, initial=initial)
    train(config, TinyDenoiser(), make_data(), folder, initial=trained)
    train(config, TinyDenoiser(), make_data(), tmp_path / "whole", initial=trained)
    assert saved_bytes(folder) == saved_bytes(tmp_path / "whole")
    train(config, TinyDenoiser(), make_data(), tmp_path / "without")
    assert saved_bytes(tmp_path / "without")["lora"] != saved_bytes(folder)["lora"]


def test_a_lora_that_does_not_fit_costs_nothing(tmp_path, trained):
    big = {key: torch.cat([value] * 2, dim=0 if ".lora_A." in key else 1) for key, value in trained.items()}
    with pytest.raises(ValueError, match="set rank to 4"):
        train(make_config(), TinyDenoiser(), make_data(), tmp_path / "new", initial=big)
    assert not (tmp_path / "new").exists()


def test_digest_is_of_names_shapes_and_values(trained):
    key = next(iter(trained))
    others = [{**trained, key: trained[key] + 1e-3}, {**trained, key: trained[key].T.clone()}, {}]
    others.append({f"x{name}" if name == key else name: value for name, value in trained.items()})
    assert len({lora_digest(tensors) for tensors in (trained, *others)}) == 5
    assert lora_digest(dict(reversed(trained.items()))) == lora_digest(trained)
