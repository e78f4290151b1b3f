"""LoRA files against the two oracles, peft and diffusers, and against themselves."""

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.lora_file import fold_alpha, load_lora, load_peft, save_lora, save_peft, unfold_alpha
from dopsd_core.files.disk import DiskError

from .toy_denoiser import ToyDenoiser, ToyNet, assert_near, lora, make_pairs, randomise

CONFIG = lora(rank=3, alpha=6.0)
X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
FEATURES = [pair.student.features for pair in make_pairs(2)]


@pytest.fixture
def trained():
    denoiser = ToyDenoiser()
    adapters = AdapterSet(denoiser.sites(), CONFIG)
    randomise(adapters)
    return denoiser, adapters


# -- the file ----------------------------------------------------------------------------------------------------------


def test_keys_and_header(tmp_path, trained):
    _, adapters = trained
    path = tmp_path / "new" / "lora.safetensors"
    save_lora(path, adapters.state(), CONFIG, metadata={"dopsd_steps": "7"})
    tensors = load_file(path)
    assert set(tensors) == {f"transformer.{n}.lora_{m}.weight" for n in adapters.part_names() for m in "AB"}
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "dopsd_steps": "7"}
    assert [p.name for p in path.parent.iterdir()] == ["lora.safetensors"]


def test_alpha_is_folded_into_b(tmp_path, trained):
    _, adapters = trained
    state = adapters.state()
    save_lora(tmp_path / "x.safetensors", state, CONFIG, dtype=torch.float32)
    tensors = load_file(tmp_path / "x.safetensors")
    name = adapters.part_names()[0]
    assert torch.equal(tensors[f"transformer.{name}.lora_B.weight"], 2.0 * state[f"{name}.lora_B.weight"])
    assert torch.equal(tensors[f"transformer.{name}.lora_A.weight"], state[f"{name}.lora_A.weight"])


def test_a_file_loads_back_into_a_set(tmp_path, trained):
    _, adapters = trained
    state = adapters.state()
    save_lora(tmp_path / "x.safetensors", state, CONFIG, dtype=torch.float32, metadata={"a": "b"})
    tensors, metadata = load_lora(tmp_path / "x.safetensors")
    assert metadata["a"] == "b"
    adapters.load_state("student", unfold_alpha(tensors, CONFIG))
    assert all(torch.equal(adapters.state()[k], v) for k, v in state.items())


def test_folding_is_undone_and_leaves_its_input_alone(trained):
    _, adapters = trained
    state = adapters.state()
    copies = {k: v.clone() for k, v in state.items()}
    config = lora(rank=3, alpha=1.0)
    for key, value in unfold_alpha(fold_alpha(state, config), config).items():
        torch.testing.assert_close(value, state[key])
    assert all(torch.equal(copies[k], v) for k, v in state.items())


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "base_model.model."])
@pytest.mark.parametrize("adapter", ["", ".default", ".student"])
def test_other_prefixes_and_adapter_names_are_read(tmp_path, prefix, adapter):
    a, b = torch.randn(2, 5), torch.randn(7, 2)
    keys = {f"{prefix}l.0.to_q.lora_A{adapter}.weight": a, f"{prefix}l.0.to_q.lora_B{adapter}.weight": b}
    save_file(keys, tmp_path / "x.safetensors")
    tensors, _ = load_lora(tmp_path / "x.safetensors")
    assert tensors.keys() == {"l.0.to_q.lora_A.weight", "l.0.to_q.lora_B.weight"}
    assert torch.equal(tensors["l.0.to_q.lora_B.weight"], b)


def test_down_up_and_alpha_are_read(tmp_path):
    a, b = torch.randn(2, 5), torch.randn(7, 2)
    keys = {
        "transformer.q.lora_down.weight": a,
        "transformer.q.lora_up.weight": b,
        "transformer.q.alpha": torch.tensor(6.0),
    }
    save_file(keys, tmp_path / "x.safetensors")
    tensors, _ = load_lora(tmp_path / "x.safetensors")
    assert torch.equal(tensors["q.lora_A.weight"], a)
    torch.testing.assert_close(tensors["q.lora_B.weight"], b * 3.0)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_layers_0_to_q.lora_down.weights": torch.zeros(1)}, "lora_unet_layers_0_to_q"),
        ({"q.lora_A.weight": torch.zeros(2, 5)}, "'q' has only lora_A"),
        ({}, "no LoRA weights"),
    ],
)
def test_what_is_no_lora_says_why(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        load_lora(tmp_path / "x.safetensors")


A, B = torch.ones(2, 5), torch.ones(7, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"transformer.q.alpha": torch.ones(2)},
            r"'transformer\.q\.alpha' is float32 of shape \(2,\), it must be a single",
        ),
        ({"transformer.q.alpha": torch.zeros(0)}, r"of shape \(0,\), it must be a single number"),
        ({"transformer.q.alpha": torch.tensor(True)}, "is bool of shape"),
        ({"transformer.q.alpha": torch.tensor(torch.nan)}, "is nan, it must be a finite number"),
        (
            {"transformer.q.alpha": torch.tensor(3e38), "transformer.q.lora_B.weight": 9e9 * B},
            "alpha is too large in 'q'",
        ),
        ({"transformer.q.lora_A.weight": torch.ones(5)}, r"is damaged: A \(5,\) and B \(7, 2\) of 'q'"),
        ({"transformer.q.lora_A.weight": torch.ones(0, 5), "transformer.q.lora_B.weight": torch.ones(7, 0)}, "damaged"),
        ({"transformer.q.lora_A.weight": torch.ones(3, 5)}, r"A \(3, 5\) and B \(7, 2\)"),
        ({"transformer.q.lora_B.weight": B.to(torch.int8)}, "'q' is torch.int8; a LoRA needs floating-point"),
        ({"transformer.q.lora_B.weight": B / 0}, "not finite in 'q'"),
        ({"diffusion_model.q.lora_A.weight": A.clone()}, "several LoRAs"),
    ],
)
def test_what_is_wrong_with_a_file_names_it_and_the_key(tmp_path, change, message):
    path = tmp_path / "x.safetensors"
    save_file({"transformer.q.lora_A.weight": A, "transformer.q.lora_B.weight": B, **change}, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_lora(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("alpha", [torch.tensor([4.0]), torch.tensor([[4]]), torch.tensor(4.0, dtype=torch.bfloat16)])
def test_alpha_may_be_any_one_number(tmp_path, alpha):
    save_file({"q.lora_A.weight": A, "q.lora_B.weight": B, "q.alpha": alpha}, tmp_path / "x.safetensors")
    assert torch.equal(load_lora(tmp_path / "x.safetensors")[0]["q.lora_B.weight"], 2.0 * B)


def test_facts_that_are_not_unicode_do_not_cost_the_file(tmp_path, trained):
    save_lora(
        tmp_path / "x.safetensors", trained[1].state(), CONFIG, metadata={"dopsd_base_model": "caf\udce9.safetensors"}
    )
    assert load_lora(tmp_path / "x.safetensors")[1]["dopsd_base_model"] == "caf\\xe9.safetensors"


def test_damaged_and_missing_files_say_which(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match=r"x\.safetensors is not a safetensors file"):
        load_lora(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"y\.safetensors"):
        load_lora(tmp_path / "y.safetensors")


def test_what_must_not_be_written_leaves_the_old_file(tmp_path, trained):
    _, adapters = trained
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    state = adapters.state()
    with pytest.raises(ValueError, match="not finite"):
        save_lora(path, {**state, next(iter(state)): torch.full((3, 16), torch.nan)}, CONFIG)
    with pytest.raises(ValueError, match="second time"):
        save_lora(path, state, CONFIG, metadata={"lora_adapter_metadata": "{}"})
    with pytest.raises(ValueError, match="empty"):
        save_lora(path, {}, CONFIG)
    assert path.read_bytes() == b"old"


# -- peft as oracle ----------------------------------------------------------------------------------------------------


def peft_twin(state):
    """The toy network under peft's own LoRA, with the weights of `state`."""
    peft = pytest.importorskip("peft")
    net = ToyNet()
    modules = sorted({k.rsplit(".lora_", 1)[0] for k in state})
    model = peft.get_peft_model(net, peft.LoraConfig(r=3, lora_alpha=6, target_modules=modules))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in state.items():
            own[f"base_model.model.{key.replace('.weight', '.default.weight')}"].copy_(value)
    return model, own


def test_outputs_and_gradients_are_pefts(trained):
    denoiser, adapters = trained
    model, own = peft_twin(adapters.state())
    expected = model(X, 0.75, FEATURES)
    expected.square().mean().backward()
    with adapters.attached():
        actual = denoiser.net(X, 0.75, FEATURES)
        actual.square().mean().backward()
    assert_near(actual.detach(), expected.detach(), 1e-5)
    names = [f"base_model.model.{n}.lora_{m}.default.weight" for n in adapters.part_names() for m in "AB"]
    for parameter, name in zip(adapters.parameters(), names, strict=True):
        assert_near(parameter.grad, own[name].grad, 1e-4)


def test_peft_loads_the_exported_folder(tmp_path, trained):
    peft = pytest.importorskip("peft")
    denoiser, adapters = trained
    save_peft(tmp_path / "p", adapters.state(), CONFIG, base_model="org/name", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(ToyNet(), str(tmp_path / "p"))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (3, 3, "org/name")
    layers = {n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert layers == set(adapters.part_names())
    with adapters.attached(), torch.no_grad():
        assert_near(model(X, 0.75, FEATURES), denoiser.net(X, 0.75, FEATURES), 1e-5)


@pytest.mark.parametrize("fails", ["peft's own file", "a file of ours", "the folder"])
def test_a_full_disk_leaves_no_half_of_a_peft_folder(tmp_path, trained, monkeypatch, fails):
    peft = pytest.importorskip("peft")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where = {"peft's own file": (peft.LoraConfig, "save_pretrained"), "a file of ours": (os, "fsync")}
    monkeypatch.setattr(*where.get(fails, (os, "mkdir")), full)
    with pytest.raises(DiskError, match=r"p\b.* could not be written: No space left on device"):
        save_peft(tmp_path / "p", trained[1].state(), CONFIG)
    assert not list(tmp_path.iterdir())


def test_the_exported_folder_is_imported_again(tmp_path, trained):
    pytest.importorskip("peft")
    _, adapters = trained
    save_peft(tmp_path, adapters.state(), CONFIG, dtype=torch.float32)
    tensors, facts = load_peft(tmp_path)
    assert facts["rank"] == "3"
    for key, value in unfold_alpha(tensors, CONFIG).items():
        torch.testing.assert_close(value, adapters.state()[key])


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 12, "layers.1.attention.to_k": 1}}]
)
def test_a_folder_that_peft_saved_is_imported_at_full_strength(tmp_path, options):
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_k", "w1"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options)
    model = peft.get_peft_model(ToyNet(), config)
    model.save_pretrained(str(tmp_path))
    tensors, _ = load_peft(tmp_path)
    denoiser, ours = ToyDenoiser(), lora(rank=4, alpha=4.0, targets=tuple(targets))
    adapters = AdapterSet(denoiser.sites(), ours)
    adapters.load_state("student", tensors)
    with adapters.attached(), torch.no_grad():
        assert_near(denoiser.net(X, 0.75, FEATURES), model(X, 0.75, FEATURES), 1e-5)


def test_adapters_that_plain_lora_cannot_express_are_refused(tmp_path, trained):
    pytest.importorskip("peft")
    _, adapters = trained
    with pytest.raises(ValueError, match="needs adapter_config.json"):
        load_peft(tmp_path)
    save_peft(tmp_path, adapters.state(), CONFIG)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora is set"):
        load_peft(tmp_path)
    for change, message in (
        ({"lora_alpha": "high"}, "lora_alpha or alpha_pattern of .* is 'high'"),
        ({"lora_alpha": None}, "no valid number"),
        ({"alpha_pattern": {"(": 3}}, r"'\(' of alpha_pattern is not a regular expression"),
        ({"alpha_pattern": {"(l+)+x": 3}}, "too complicated"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_peft(tmp_path)
