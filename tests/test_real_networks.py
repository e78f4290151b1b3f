"""The mechanism on diffusers' own networks, small and random: names, gradients as in peft, files diffusers loads."""

import pytest
import torch

from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.lora_file import save_lora
from dopsd_core.denoiser import plain_linear_sites
from dopsd_core.families import FLUX2_KLEIN, Z_IMAGE

from .toy_denoiser import assert_near, randomise

diffusers = pytest.importorskip("diffusers")


def z_image():
    torch.manual_seed(0)
    net = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[4, 6, 6], axes_lens=[64, 16, 16],
    )  # fmt: skip
    x, text = torch.randn(4, 1, 4, 4), torch.randn(5, 12)
    return net, lambda n: n([x], torch.tensor([0.25]), [text], return_dict=False)[0][0]


def flux2():
    torch.manual_seed(0)
    net = diffusers.Flux2Transformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    x, text = torch.randn(1, 6, 8), torch.randn(1, 5, 12)
    ids = torch.zeros(1, 6, 4), torch.zeros(1, 5, 4)
    return net, lambda n: n(
        x, encoder_hidden_states=text, timestep=torch.tensor([0.5]), img_ids=ids[0], txt_ids=ids[1], return_dict=False
    )[0]


NETWORKS = [(Z_IMAGE, z_image, 4 * 7), (FLUX2_KLEIN, flux2, 12 + 2 * 2)]


@pytest.fixture(params=NETWORKS, ids=lambda n: n[0].name)
def case(request):
    family, build, count = request.param
    net, call = build()
    net.requires_grad_(False)
    adapters = AdapterSet(plain_linear_sites(net), family.lora_config(rank=3))
    return family, net, call, adapters, count


def test_the_familys_targets_are_the_linears_of_the_blocks(case):
    family, net, _, adapters, count = case
    names = adapters.part_names()
    assert len(names) == count
    modulation = ("adaLN", "modulation", "embed", "norm_out", "proj_out", "final")
    blocks = {
        n for n, m in net.named_modules() if isinstance(m, torch.nn.Linear) and not any(w in n for w in modulation)
    }
    assert set(names) == blocks


def test_a_new_student_is_the_network(case):
    _, net, call, adapters, _ = case
    with torch.no_grad():
        base = call(net)
        with adapters.attached():
            assert torch.equal(call(net), base)


def test_outputs_and_gradients_are_pefts(case):
    peft = pytest.importorskip("peft")
    family, net, call, adapters, _ = case
    randomise(adapters)
    with adapters.attached():
        actual = call(net)
        actual.square().mean().backward()
    state, names = adapters.state(), adapters.part_names()
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, target_modules=names), net)
    own = dict(net.named_parameters())
    with torch.no_grad():
        for key, value in state.items():
            own[key.replace(".weight", ".default.weight")].copy_(value)
    expected = call(net)
    expected.square().mean().backward()
    assert_near(actual.detach(), expected.detach(), 1e-5)
    keys = [f"{n}.lora_{m}.default.weight" for n in names for m in "AB"]
    for parameter, key in zip(adapters.parameters(), keys, strict=True):
        gradient = own[key].grad
        # The last text-side Linears of a double-stream block feed nothing: peft gives no gradient or zeros, so do we.
        if parameter.grad is None or gradient is None:
            assert parameter.grad is None or not parameter.grad.any()
            assert gradient is None or not gradient.any()
        else:
            assert_near(parameter.grad, gradient, 1e-4)


def test_diffusers_loads_the_file_at_the_same_strength(tmp_path, case):
    pytest.importorskip("peft")
    family, net, call, adapters, _ = case
    randomise(adapters)
    with torch.no_grad():
        base = call(net)
        with adapters.attached():
            expected = call(net)
        config = adapters.config
        save_lora(tmp_path / "x.safetensors", adapters.state(), config, prefix=family.key_prefix, dtype=torch.float32)
        net.load_lora_adapter(str(tmp_path), prefix="transformer", weight_name="x.safetensors")
        actual = call(net)
    assert_near(actual, expected, 1e-5)
    assert (expected - base).abs().max() > 0.01 * base.abs().max()
