"""Small files in the layouts that ComfyUI-GGUF reads, and its node pack inside the test process.

The pack is looked for at $COMFYUI_GGUF_PATH, else beside the ComfyUI checkout; the files are written with the package
gguf, and the weights are those of stock_files.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
from pathlib import Path

import stock_files
from inprocess import CHECKOUT, ComfyUI

PACK = Path(os.environ.get("COMFYUI_GGUF_PATH") or CHECKOUT.parent / "ComfyUI-GGUF")
LANGUAGE_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate_proj": "ffn_gate",
}  # fmt: skip
"""Hugging Face's names of Qwen3's tensors, and llama.cpp's."""


def why_not() -> str:
    """Why no GGUF file can be loaded, in one line that says what to do; "" when all is there."""
    if not (PACK / "nodes.py").exists():
        return f"GGUF BASES WERE NOT TESTED: no ComfyUI-GGUF at {PACK}, set COMFYUI_GGUF_PATH to a checkout of it"
    if importlib.util.find_spec("gguf") is None:
        return "GGUF BASES WERE NOT TESTED: this Python lacks the package gguf, run `make comfyui`"
    return ""


def load_pack(comfyui: ComfyUI) -> None:
    """Has ComfyUI load the node pack as a custom node."""
    if "UnetLoaderGGUF" not in comfyui.nodes.NODE_CLASS_MAPPINGS:
        loaded = comfyui.call(lambda: asyncio.run(comfyui.nodes.load_custom_node(str(PACK), module_parent="tests")))
        assert loaded, "ComfyUI did not load ComfyUI-GGUF"


def write(path: Path, state: stock_files.State, architecture: str, form: str) -> Path:
    """The tensors as a GGUF file, matrices of blocks in `form` ("Q8_0", "BF16", ...), the rest in fp32."""
    import gguf

    kind = gguf.GGMLQuantizationType[form]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in state.items():
        array = value.float().numpy()
        if stock_files.is_quantised(name, value) and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def language_model() -> stock_files.State:
    """stock_files' Qwen3-4B under llama.cpp's names."""
    pattern = re.compile("|".join(sorted(map(re.escape, LANGUAGE_NAMES), key=len, reverse=True)))
    return {pattern.sub(lambda m: LANGUAGE_NAMES[m[0]], name): value for name, value in stock_files.qwen3().items()}
