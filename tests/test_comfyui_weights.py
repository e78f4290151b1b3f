"""The shipped files in real ComfyUI: its own classes load them and compute what the standalone host computes.

Runs where a ComfyUI checkout is found ($COMFYUI_PATH, else ~/comfy/ComfyUI) together with what ComfyUI itself imports.
Each check is a process of its own: ComfyUI owns module names and global state.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dopsd_core.conditioning import Condition
from dopsd_core.standalone import demo_files as files
from dopsd_core.standalone.host import load_demo_model

COMFYUI = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)

PREAMBLE = """
import sys; sys.path.insert(0, {comfyui!r})
import comfy.options
from comfy.cli_args import args
args.cpu = True
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
"""


def in_comfyui(script: str, **values: object) -> str:
    code = PREAMBLE.format(comfyui=str(COMFYUI)) + textwrap.dedent(script).format(**values)
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=300, cwd=COMFYUI)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def _comfyui() -> None:
    if not (COMFYUI / "main.py").exists():
        pytest.skip(f"NO COMFYUI at {COMFYUI}: the product was not tested against it (set COMFYUI_PATH)")
    code = PREAMBLE.format(comfyui=str(COMFYUI)) + "import comfy.sd"
    tried = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, cwd=COMFYUI)
    if tried.returncode:
        reason = tried.stderr.strip().splitlines()[-1]
        pytest.skip(
            f"COMFYUI DOES NOT IMPORT in this environment ({reason}): set COMFYUI_PYTHON to one that has its needs"
        )


@pytest.mark.comfyui
def test_velocity_is_comfyuis(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x, features = torch.randn(2, 16, 8, 8, generator=g), torch.randn(2, 23, 128, generator=g)
    save_file({"x": x, "features": features}, tmp_path / "in.safetensors")
    in_comfyui(
        """
        import comfy.ops, comfy.supported_models
        sd = {{k: v.float() for k, v in load_file({weights!r}).items()}}
        config = comfy.supported_models.ZImage({{
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256,
            "cap_feat_dim": 128, "n_layers": 4,
            "n_refiner_layers": 1, "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0, "multiple_of": 2,
            "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}})
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({{}}, "")
        # ComfyUI sizes the time embedding's hidden layer by the width, diffusers always by 1024 as in the full model
        model.diffusion_model.t_embedder = type(model.diffusion_model.t_embedder)(
            1024, output_size=256, operations=comfy.ops.disable_weight_init)
        missing, unexpected = model.diffusion_model.load_state_dict(sd, strict=False)
        assert not unexpected and set(missing) <= {{"norm_final.weight"}}, (missing, unexpected)
        data = load_file({folder!r} + "/in.safetensors")
        out = {{}}
        with torch.no_grad():
            for sigma in (1.0, 0.75, 0.3):
                out[str(sigma)] = model.apply_model(
                    data["x"], torch.full((2,), sigma), c_crossattn=data["features"], num_tokens=23).contiguous()
        save_file(out, {folder!r} + "/out.safetensors")
        """,
        weights=str(files.WEIGHTS / files.MODEL_FILE),
        folder=str(tmp_path),
    )
    denoiser = load_demo_model().denoiser
    theirs = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        for sigma in (1.0, 0.75, 0.3):
            ours = denoiser.predict_x0(x, sigma, [Condition(f) for f in features])
            assert torch.allclose(ours, theirs[str(sigma)], atol=2e-4), sigma


@pytest.mark.comfyui
def test_conditions_are_comfyuis(tmp_path: Path) -> None:
    """Text through its tokenizer and language model, picture and text through its Qwen3-VL with DeepStack."""
    text = "a [V] badge, top, on a sand background"
    picture = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
    save_file({"picture": picture}, tmp_path / "in.safetensors")
    in_comfyui(
        """
        import types
        import comfy.ops
        from comfy import sd1_clip
        from comfy.text_encoders import llama, qwen3vl, z_image
        sd = load_file({weights!r})
        ids = sd.pop("dopsd.token_ids").long()
        rows = sd.pop("model.language_model.embed_tokens.weight")
        sd = {{k.removeprefix("model.").replace("language_model.", "model."): v.float() for k, v in sd.items()}}
        sd["model.embed_tokens.weight"] = torch.zeros(151936, 128).index_copy(0, ids, rows.float())
        qwen3vl.QWEN3VL_VISION["qwen3vl_4b"] = dict(hidden_size=96, intermediate_size=256, depth=3,
            deepstack_visual_indexes=[0, 1], num_heads=3, num_position_embeddings=36)
        class Config(llama.Qwen3VL_4BConfig):
            head_dim = 64
            rope_dims = [12, 10, 10]
        qwen3vl.QWEN3VL_CONFIGS["qwen3vl_4b"] = Config
        class Demo(qwen3vl.Qwen3VL):
            model_type = "qwen3vl_4b"
        sizes = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, rope_theta=5e6)
        vl = Demo(sizes, torch.float32, "cpu", comfy.ops.manual_cast)
        missing, unexpected = vl.load_state_dict(sd, strict=False)
        assert not missing and not unexpected, (missing, unexpected)
        image_part = "<|vision_start|><|image_pad|><|vision_end|>"
        template = "<|im_start|>user\\n" + image_part + "{text}<|im_end|>\\n<|im_start|>assistant\\n"
        image = load_file({folder!r} + "/in.safetensors")["picture"].movedim(0, -1)[None]
        out = {{}}
        with torch.no_grad():
            tokens = z_image.ZImageTokenizer().tokenize_with_weights({text!r})["qwen3_4b"]
            plain = torch.tensor([[t[0] for t in tokens[0]]])
            out["ids"] = plain
            run = dict(intermediate_output=-2, final_layer_norm_intermediate=False, dtype=torch.float32)
            out["text"] = vl.model(plain, **run)[1][0].contiguous()
            tokens = qwen3vl.tokenizer("qwen3vl_4b")().tokenize_with_weights(template, images=[image])["qwen3vl_4b"]
            holder = types.SimpleNamespace(special_tokens={{"pad": 151643}}, transformer=vl)
            holder.transformer.get_input_embeddings = lambda: vl.model.embed_tokens
            e, am, _, info = sd1_clip.SDClipModel.process_tokens(holder, [[t[0] for t in b] for b in tokens], "cpu")
            position, mask, deep = vl.build_image_inputs(e, info)
            out["mixed"] = vl.model(None, attention_mask=am, embeds=e, position_ids=position, visual_pos_masks=mask,
                deepstack_embeds=deep, **run)[1][0].contiguous()
        save_file(out, {folder!r} + "/out.safetensors")
        """,
        weights=str(files.WEIGHTS / files.TEXT_ENCODER_FILE),
        folder=str(tmp_path),
        text=text,
    )
    encoder, theirs = load_demo_model().encoder, load_file(tmp_path / "out.safetensors")
    student = encoder.encode_text(text).features
    assert theirs["ids"].shape[1] == len(student)
    assert torch.allclose(theirs["text"], student, atol=1e-4)
    assert torch.allclose(theirs["mixed"], encoder.encode_image_text(picture, text).features, atol=1e-3)
