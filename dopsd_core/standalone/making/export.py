"""Writes the trained weights as the files that ship."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...demo.model_files import JUDGE_FILE, MODEL_FILE, PARENT_FILE, TEXT_ENCODER_FILE, VAE_FILE, WEIGHTS
from ..hosts.demo_weight_files import save_weights, text_encoder_to_single_file, transformer_to_single_file
from .data import own_or_shipped
from .pretrain import load_parent, load_student


def export(folder: Path, out: Path) -> None:
    """Writes both transformers, text encoder, autoencoder and judge from `folder` to `out`.

    What `folder` does not have stays as shipped.
    """
    parent = load_parent(folder)
    facts = {"modelspec.title": "D-OPSD demo model", "modelspec.license": "Apache-2.0"}
    out.mkdir(parents=True, exist_ok=True)
    bf16 = torch.bfloat16
    distilled = transformer_to_single_file(load_student(folder).state_dict())
    save_weights(out / MODEL_FILE, distilled, bf16, facts)
    undistilled = transformer_to_single_file(parent.transformer.state_dict())
    save_weights(out / PARENT_FILE, undistilled, bf16, {**facts, "modelspec.title": "D-OPSD demo model, undistilled"})
    encoder = text_encoder_to_single_file(parent.encoder, parent.token_ids)
    save_weights(out / TEXT_ENCODER_FILE, encoder, bf16, facts)
    for name, made, dtype in ((VAE_FILE, "vae", bf16), (JUDGE_FILE, "judge", torch.float16)):
        save_weights(out / name, load_file(own_or_shipped(folder, f"{made}.safetensors", name)), dtype, facts)
    sizes = {path.name: path.stat().st_size for path in sorted(out.glob("*.safetensors"))}
    print(
        "\n".join(f"{name}: {size / 1e6:.2f} MB" for name, size in sizes.items()),
        f"\n{sum(sizes.values()) / 1e6:.2f} MB",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    export(args.folder, args.out)
