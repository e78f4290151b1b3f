"""Writes the trained weights as the files that ship."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...demo.model_files import JUDGE_FILE, MODEL_FILE, TEXT_ENCODER_FILE, VAE_FILE, WEIGHTS
from ..hosts.demo_weight_files import save_weights, text_encoder_to_single_file, transformer_to_single_file
from .pretrain import load_parent
from .twins import load_state


def export(folder: Path, out: Path, *, undistilled: bool, from_average: bool) -> None:
    """Writes transformer, text encoder, autoencoder and judge from `folder` to `out`."""
    parent = load_parent(folder, 0, from_average=from_average)
    transformer = parent.transformer.state_dict()
    if not undistilled:
        distilled = load_state(folder / "distilled_0.pt")
        assert distilled is not None, "run distill first"
        transformer = distilled["model"]
    facts = {"modelspec.title": "D-OPSD demo model", "modelspec.license": "Apache-2.0"}
    out.mkdir(parents=True, exist_ok=True)
    bf16 = torch.bfloat16
    save_weights(out / MODEL_FILE, transformer_to_single_file(transformer), bf16, facts)
    encoder = text_encoder_to_single_file(parent.encoder, parent.token_ids)
    save_weights(out / TEXT_ENCODER_FILE, encoder, bf16, facts)
    save_weights(out / VAE_FILE, load_file(folder / "vae.safetensors"), bf16, facts)
    save_weights(out / JUDGE_FILE, load_file(folder / "judge.safetensors"), torch.float16, facts)
    sizes = {path.name: path.stat().st_size for path in sorted(out.glob("*.safetensors"))}
    print(
        "\n".join(f"{name}: {size / 1e6:.2f} MB" for name, size in sizes.items()),
        f"\n{sum(sizes.values()) / 1e6:.2f} MB",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--undistilled", action="store_true", help="export the parent, not the distilled transformer")
    parser.add_argument("--from-average", action="store_true", help="use the average of an unfinished joint run")
    args = parser.parse_args()
    export(args.folder, args.out, undistilled=args.undistilled, from_average=args.from_average)
