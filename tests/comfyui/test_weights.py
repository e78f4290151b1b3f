"""The shipped files in real ComfyUI: its own classes load them and compute what the standalone host computes."""

from __future__ import annotations

import types

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def weights(comfyui):
    """name -> the file's tensors."""
    files = comfyui.core("demo.model_files")
    return {
        "model": load_file(files.WEIGHTS / files.MODEL_FILE),
        "text_encoder": load_file(files.WEIGHTS / files.TEXT_ENCODER_FILE),
    }


@pytest.fixture(scope="module")
def demo(comfyui):
    return comfyui.core("standalone.hosts.demo").load_demo_model()


def test_velocity_is_comfyuis(comfyui, weights, demo):
    import comfy.ops
    import comfy.supported_models

    config = comfy.supported_models.ZImage(
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 256,
            "cap_feat_dim": 128,
            "n_layers": 4,
            "n_refiner_layers": 1,
            "qk_norm": True,
            "n_heads": 2,
            "n_kv_heads": 2,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "multiple_of": 2,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        }
    )
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    # ComfyUI sizes the time embedding's hidden layer by the width, diffusers always by 1024 as in the full model
    embedder = type(model.diffusion_model.t_embedder)
    model.diffusion_model.t_embedder = embedder(1024, output_size=256, operations=comfy.ops.disable_weight_init)
    tensors = {k: v.float() for k, v in weights["model"].items()}
    missing, unexpected = model.diffusion_model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"norm_final.weight"}, (missing, unexpected)

    condition = comfyui.core("conditioning.encode").Condition
    g = torch.Generator().manual_seed(0)
    x, features = torch.randn(2, 16, 8, 8, generator=g), torch.randn(2, 23, 128, generator=g)
    with torch.no_grad():
        for sigma in (1.0, 0.75, 0.3):
            theirs = model.apply_model(x, torch.full((2,), sigma), c_crossattn=features, num_tokens=23)
            ours = demo.denoiser.predict_x0(x, sigma, [condition(f) for f in features])
            assert torch.allclose(ours, theirs, atol=2e-4), sigma


def scaled_down(weights, monkeypatch):
    """ComfyUI's Qwen3-VL in the demo's sizes, with its weights."""
    import comfy.ops
    from comfy.text_encoders import llama, qwen3vl

    tensors = dict(weights["text_encoder"])
    ids = tensors.pop("dopsd.token_ids").long()
    rows = tensors.pop("model.language_model.embed_tokens.weight")
    names = {k: k.removeprefix("model.").replace("language_model.", "model.") for k in tensors}
    state = {names[k]: v.float() for k, v in tensors.items()}
    state["model.embed_tokens.weight"] = torch.zeros(151936, 128).index_copy(0, ids, rows.float())
    vision = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "depth": 3,
        "deepstack_visual_indexes": [0, 1],
        "num_heads": 3,
        "num_position_embeddings": 36,
    }
    monkeypatch.setitem(qwen3vl.QWEN3VL_VISION, "qwen3vl_4b", vision)
    small = type("Small", (llama.Qwen3VL_4BConfig,), {"head_dim": 64, "rope_dims": [12, 10, 10]})
    monkeypatch.setitem(qwen3vl.QWEN3VL_CONFIGS, "qwen3vl_4b", small)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 5e6,
    }
    model_class = type("Demo", (qwen3vl.Qwen3VL,), {"model_type": "qwen3vl_4b"})
    model = model_class(sizes, torch.float32, "cpu", comfy.ops.manual_cast)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model


def test_conditions_are_comfyuis(weights, demo, monkeypatch):
    """Text through its tokenizer and language model, image and text through its Qwen3-VL with DeepStack."""
    from comfy import sd1_clip
    from comfy.text_encoders import qwen3vl, z_image

    text = "a [V] badge, top, on a sand background"
    image = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
    model = scaled_down(weights, monkeypatch)
    hidden_state = {"intermediate_output": -2, "final_layer_norm_intermediate": False, "dtype": torch.float32}
    with torch.no_grad():
        (tokens,) = z_image.ZImageTokenizer().tokenize_with_weights(text)["qwen3_4b"]
        plain = model.model(torch.tensor([[t[0] for t in tokens]]), **hidden_state)[1][0]

        image_part = "<|vision_start|><|image_pad|><|vision_end|>"
        prompt = f"<|im_start|>user\n{image_part}{text}<|im_end|>\n<|im_start|>assistant\n"
        images = [image.movedim(0, -1)[None]]
        batches = qwen3vl.tokenizer("qwen3vl_4b")().tokenize_with_weights(prompt, images=images)["qwen3vl_4b"]
        holder = types.SimpleNamespace(special_tokens={"pad": 151643}, transformer=model)
        model.get_input_embeddings = lambda: model.model.embed_tokens
        embeds, attention, _, info = sd1_clip.SDClipModel.process_tokens(
            holder, [[t[0] for t in batch] for batch in batches], "cpu"
        )
        position, mask, deep = model.build_image_inputs(embeds, info)
        mixed = model.model(
            None,
            attention_mask=attention,
            embeds=embeds,
            position_ids=position,
            visual_pos_masks=mask,
            deepstack_embeds=deep,
            **hidden_state,
        )[1][0]

    student = demo.encoder.encode_text(text).features
    assert len(tokens) == len(student)
    assert torch.allclose(plain, student, atol=1e-4)
    assert torch.allclose(mixed, demo.encoder.encode_image_text(image, text).features, atol=1e-3)
