"""Pre-trains the demo's encoder and transformer jointly from scratch: the undistilled parent.

1. vision warm-up: the encoder learns to classify the attributes of an image from its image tokens;
2. joint flow matching: 3 of 8 rows have an image and a short caption, the others text; with an auxiliary attribute
loss.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...demo.model_files import TEXT_TEMPLATE, TEXT_WIDTH
from ...demo.world import APPEARANCE, NUM_CLASSES
from ..hosts.demo_networks import load_tokenizer, new_text_encoder, new_transformer
from .batched import IMAGE_START, IMAGE_TOKENS, BatchedEncoder, BatchedTransformer, pad_features, teacher_pixels
from .data import RowMaker, Rows, make_bank
from .optim import SharedMuon, zero_gradients
from .twins import Twins, WeightAverage, launch, load_state, save_state, warmup_stable_decay

AUXILIARY = 0.05


class AttributeHeads(nn.Module):
    """Linear attribute classifiers on features [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, NUM_CLASSES[name]) for name in APPEARANCE})

    def loss(self, features: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(summed cross entropy, scalar; accuracy [attributes]) of features [B, width] for labels int64 [B] each."""
        features, loss, right = F.rms_norm(features.float(), features.shape[-1:]), torch.zeros(()), []
        for name, head in self.heads.items():
            logits = head(features).float()
            loss = loss + F.cross_entropy(logits, labels[name])
            right.append((logits.argmax(1) == labels[name]).float().mean())
        return loss, torch.stack(right)


class Parent(nn.Module):
    """Encoder, transformer and auxiliary heads, with their batched forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.token_ids = torch.tensor(sorted(load_tokenizer().get_vocab().values()))
        self.encoder, self.transformer = new_text_encoder(self.token_ids), new_transformer()
        self.encoder_heads, self.image_heads = AttributeHeads(TEXT_WIDTH), AttributeHeads(256)
        self._initialise()
        self.encode, self.velocity = BatchedEncoder(self.encoder), BatchedTransformer(self.transformer)

    def _initialise(self) -> None:
        model: Any = self.transformer
        width = 256
        for block in [*model.layers, *model.noise_refiner]:  # gates half open, no scale
            nn.init.normal_(block.adaLN_modulation[0].weight, std=0.01)
            nn.init.zeros_(block.adaLN_modulation[0].bias)
            with torch.no_grad():
                block.adaLN_modulation[0].bias[width : 2 * width] = 0.5
                block.adaLN_modulation[0].bias[3 * width :] = 0.5
        final = model.all_final_layer["2-1"]
        for layer in (final.linear, final.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(model.x_pad_token, std=0.02)
        nn.init.normal_(model.cap_pad_token, std=0.02)
        nn.init.normal_(self.encoder.language_model.embed_tokens.weight, std=0.5)
        for unused in (self.encoder.language_model.layers[-1], self.encoder.language_model.norm):
            unused.requires_grad_(False)  # the features are taken before the last layer

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the trainable parameters."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def features(self, rows: Rows) -> Tensor:
        """Features [B, 32, D] of all rows, those with an image first."""
        parts = [self.encode(rows.mixed, teacher_pixels(rows.pixels))] if rows.num_image else []
        if len(rows.text):
            parts.append(pad_features(self.encode(rows.text)))
        return torch.cat(parts)

    @torch.no_grad()
    def empty_features(self) -> Tensor:
        """Features [1, 32, D] of the empty caption (8 tokens), for classifier-free guidance."""
        rows = load_tokenizer().encode(TEXT_TEMPLATE.format("")).ids
        index = torch.searchsorted(self.token_ids, torch.tensor([rows]))
        return pad_features(self.encode(index))


def load_parent(folder: Path, rank: int, *, from_average: bool) -> Parent:
    """The frozen model of the joint stage; from_average: use the running average of an unfinished run."""
    parent, state = Parent(), load_state(folder / f"joint_{rank}.pt")
    if state is None:
        raise FileNotFoundError(f"{folder} has no joint_{rank}.pt: run pretrain --stage joint first")
    parent.load_state_dict(state["model"])
    if from_average:
        with torch.no_grad():
            for (_, parameter), value in zip(parent.trainable(), state["average"], strict=True):
                parameter.copy_(value)
    return parent.requires_grad_(False)


def image_token_mean(features: Tensor) -> Tensor:
    """Mean over the image tokens: [B, L, D] -> [B, D]."""
    return features[:, IMAGE_START : IMAGE_START + IMAGE_TOKENS].mean(1)


def sample_sigma(batch: int, generator: torch.Generator, shift: float = 2.0) -> Tensor:
    """Noise levels [batch] in (0, 1]: logit-normal with shift, a sixth uniform, a tenth pure noise."""
    u = torch.sigmoid(torch.randn(batch, generator=generator))
    pick = torch.rand(batch, generator=generator)
    u = torch.where(pick < 0.15, torch.rand(batch, generator=generator), u)
    return torch.where(pick > 0.9, torch.ones(batch), shift * u / (1 + (shift - 1) * u))


def joint_loss(parent: Parent, rows: Rows, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """(flow matching loss with auxiliary attribute losses, scalar; metrics)."""
    batch, n = len(rows.latents), rows.num_image
    sigma = sample_sigma(batch, generator)
    noise = torch.randn(rows.latents.shape, generator=generator)
    s = sigma[:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        features = parent.features(rows)
        state = (1 - s) * rows.latents + s * noise
        velocity, tokens = parent.velocity.with_tokens(state, sigma, features, rows.lengths, after=2)
    error = ((velocity - (noise - rows.latents)).square().mean(1) * rows.weight).mean((1, 2))
    seen, accuracy = parent.encoder_heads.loss(
        image_token_mean(features[:n]), {k: v[:n] for k, v in rows.labels.items()}
    )
    drawn, _ = parent.image_heads.loss(tokens.mean(1), rows.labels)
    figures = {"image": error[:n].mean().item(), "text": error[n:].mean().item(), "drawn": drawn.item()}
    figures |= dict(zip(APPEARANCE, accuracy.tolist(), strict=True))
    return error.mean() + AUXILIARY * (seen + drawn), figures


def vision_loss(parent: Parent, rows: Rows, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """(attribute loss of the encoder's image tokens, scalar; accuracies)."""
    with torch.autocast("cpu", torch.bfloat16):
        features = parent.encode(rows.mixed, teacher_pixels(rows.pixels))
    loss, accuracy = parent.encoder_heads.loss(image_token_mean(features), rows.labels)
    return loss, dict(zip(APPEARANCE, accuracy.tolist(), strict=True))


def train(twins: Twins, stage: str, args: argparse.Namespace) -> None:
    """Trains a stage in one worker process; resumes from its last save."""
    torch.manual_seed(1)
    parent, loss_of = Parent(), {"vision": vision_loss, "joint": joint_loss}[stage]
    if stage == "joint":
        warm = load_state(args.folder / f"vision_{twins.rank}.pt")
        assert warm is not None, "run --stage vision first"
        parent.load_state_dict(warm["model"])
    named = [(k, p) for k, p in parent.trainable() if stage == "joint" or k.startswith("encoder")]
    parameters = [p for _, p in named]
    optimizer = SharedMuon(twins, named, args.muon_lr, args.adamw_lr)
    average, first = WeightAverage(parameters, 0.998), 0
    path = args.folder / f"{stage}_{twins.rank}.pt"
    if state := load_state(path):
        parent.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.updates, first = state["average"], state["step"], state["step"]
    maker = RowMaker(make_bank(twins, args.folder, args.bank), parent.token_ids)
    twins.barrier()
    num_image = args.batch * 3 // 8 if stage == "joint" else args.batch
    running: dict[str, float] = {}
    started = time.monotonic()

    def save(step: int) -> None:
        save_state(path, {"model": parent.state_dict(), "average": average.values,
                          "optimizer": optimizer.state_dict(), "step": step})  # fmt: skip

    for step in range(first, args.steps):
        generator = torch.Generator().manual_seed((step * twins.world + twins.rank) * 2 + (stage == "joint"))
        loss, figures = loss_of(parent, maker.draw(args.batch, num_image, generator), generator)
        zero_gradients(parameters)
        loss.backward()
        figures["norm"] = twins.average_gradients(parameters, 1.0)
        optimizer.step(warmup_stable_decay(step, args.steps, decay=args.decay))
        average.update()
        for key, value in figures.items():
            running[key] = 0.97 * running.get(key, value) + 0.03 * value
        if twins.rank == 0 and (step + 1) % 50 == 0:
            speed = (step + 1 - first) * args.batch * twins.world / (time.monotonic() - started)
            words = " ".join(f"{k} {v:.3f}" for k, v in running.items())
            print(f"{stage} {step + 1}/{args.steps} {words} {speed:.0f} img/s {time.strftime('%H:%M:%S')}", flush=True)
        if (step + 1) % args.save_every == 0:
            save(step + 1)
    average.swap()
    save(args.steps)  # the averaged weights are the stage's result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("vision", "joint"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=64, help="per worker")
    parser.add_argument("--bank", type=int, default=24576, help="scenes per worker")
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adamw-lr", type=float, default=1.5e-3)
    parser.add_argument("--decay", type=float, default=0.4)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    launch(train, args.stage, args, workers=args.workers)
