"""Pre-trains the demo's encoder and transformer jointly from scratch: the undistilled parent.

1. vision warm-up: the encoder learns to classify the attributes of an image from its image tokens;
2. joint flow matching: 5 of 16 rows have an image and a short caption, the others text; with an auxiliary attribute
loss.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from ...demo.model_files import MODEL_FILE, PARENT_FILE, TEXT_ENCODER_FILE, TEXT_TEMPLATE, TEXT_WIDTH, VAE_FILE, WEIGHTS
from ...demo.world import APPEARANCE, NUM_CLASSES
from ...number_text import float_argument, int_argument
from ..hosts.demo_networks import load_tokenizer, new_text_encoder, new_transformer
from ..hosts.demo_weight_files import load_text_encoder, load_transformer
from .batched import (
    IMAGE_START,
    IMAGE_TOKENS,
    BatchedEncoder,
    BatchedTransformer,
    autocast,
    pad_features,
    teacher_pixels,
)
from .checkpoint import Checkpoints, part
from .data import RowMaker, Rows, load_autoencoder, own_or_shipped, result_of
from .optim import SharedMuon
from .stage import Stage, StageRun
from .twins import Twins, launch

AUXILIARY = 0.05
IMAGE_SHARE = 5 / 16


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

    def load_shipped(self, folder: Path, transformer: str = MODEL_FILE) -> None:
        """Loads encoder and transformer from the files of a shipped model; the auxiliary heads stay as they are."""
        encoder, token_ids = load_text_encoder(folder / TEXT_ENCODER_FILE)
        if not torch.equal(token_ids, self.token_ids):
            raise ValueError(f"{folder / TEXT_ENCODER_FILE} has embedding rows for other tokens than the tokenizer")
        self.encoder.load_state_dict(encoder.state_dict())
        self.transformer.load_state_dict(load_transformer(folder / transformer).state_dict())

    @torch.no_grad()
    def empty_features(self) -> Tensor:
        """Features [1, 32, D] of the empty caption (8 tokens), for classifier-free guidance."""
        rows = load_tokenizer().encode(TEXT_TEMPLATE.format("")).ids
        index = torch.searchsorted(self.token_ids, torch.tensor([rows]))
        return pad_features(self.encode(index))


def load_parent(folder: Path, *, from_average: bool = False) -> Parent:
    """The frozen model of the joint stage, or if that stage was not run the one that ships.

    from_average: the weight average of an unfinished run's newest checkpoint.

    Raises:
        FileNotFoundError: there is no such folder, or no checkpoint for the average; the message names it.
    """
    parent = Parent()
    if from_average:
        load_average(folder / "joint", parent, [p for _, p in parent.trainable()])
    elif path := result_of(folder, "joint.safetensors"):
        parent.load_state_dict(load_file(path))
    else:
        parent.load_shipped(WEIGHTS, PARENT_FILE)
    return parent.requires_grad_(False)


def load_student(folder: Path) -> ZImageTransformer2DModel:
    """The frozen few-step transformer: sharpened, or if that stage was not run distilled, or if neither was the one
    that ships.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it was distilled again after it was sharpened.
    """
    path = result_of(folder, "sharpened.safetensors", "distilled.safetensors")
    if path is None:
        return load_transformer(WEIGHTS / MODEL_FILE).requires_grad_(False)
    student = new_transformer()
    student.load_state_dict(load_file(path))
    return student.requires_grad_(False)


@torch.no_grad()
def load_average(checkpoints: Path, model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Loads the newest checkpoint into the model, with the weight average of its trained parameters, of any shape."""
    found = Checkpoints(checkpoints.parent, checkpoints.name, Twins(0, 1)).load()
    if found is None:
        raise FileNotFoundError(f"{checkpoints} has no complete checkpoint: run that stage first")
    model.load_state_dict(part(found[1], "model."))
    for i, parameter in enumerate(parameters):
        parameter.copy_(found[1][f"average.{i}"])


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
    with autocast():
        features = parent.features(rows)
        state = (1 - s) * rows.latents + s * noise
        velocity, tokens = parent.velocity.with_tokens(state, sigma, features, rows.lengths, after=2)
    error = ((velocity - (noise - rows.latents)).square().mean(1) * rows.weight).mean((1, 2))
    seen, accuracy = parent.encoder_heads.loss(image_token_mean(features[:n]), rows.seen.labels())
    drawn, _ = parent.image_heads.loss(tokens.mean(1), rows.labels)
    figures = {"image": error[:n].mean().item(), "text": error[n:].mean().item(), "drawn": drawn.item()}
    figures |= dict(zip(APPEARANCE, accuracy.tolist(), strict=True))
    return error.mean() + AUXILIARY * (seen + drawn), figures


def vision_loss(parent: Parent, rows: Rows, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """(attribute loss of the encoder's image tokens, scalar; accuracies)."""
    with autocast():
        features = parent.encode(rows.mixed, teacher_pixels(rows.pixels))
    loss, accuracy = parent.encoder_heads.loss(image_token_mean(features), rows.seen.labels())
    return loss, dict(zip(APPEARANCE, accuracy.tolist(), strict=True))


def train(twins: Twins, name: str, args: argparse.Namespace) -> None:
    """Trains a stage in one worker process; resumes from its newest checkpoint."""
    stage = stage_of(name, args)
    if stage.result.exists():
        return
    torch.manual_seed(1)
    parent, loss_of = Parent(), {"vision": vision_loss, "joint": joint_loss}[name]
    if args.start is not None:
        parent.load_shipped(args.start)
    elif name == "joint":
        parent.load_state_dict(load_file(args.folder / "vision.safetensors"))
    named = [(k, p) for k, p in parent.trainable() if name == "joint" or k.startswith("encoder")]
    vae = load_autoencoder(own_or_shipped(args.folder, "vae.safetensors", VAE_FILE))
    maker = RowMaker(vae, parent.token_ids)
    twins.barrier()

    def loss(batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        num_image = int(batch * IMAGE_SHARE) if name == "joint" else batch
        return loss_of(parent, maker.draw(batch, num_image, generator), generator)

    StageRun(twins, stage, parent, SharedMuon(twins, named, args.muon_lr, args.adamw_lr)).run(loss)


def stage_of(name: str, args: argparse.Namespace) -> Stage:
    """The stage "vision" or "joint" with the command's options."""
    seed = 1_000_000 * (1 + (name == "joint"))
    return Stage(name, args.folder, args.steps, args.batch, seed, decay=args.decay, minutes=args.minutes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("vision", "joint"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int_argument(), required=True)
    parser.add_argument(
        "--start", type=Path, help="folder with a shipped model to continue from, without a vision stage"
    )
    parser.add_argument("--batch", type=int_argument(), default=64, help="per worker")
    parser.add_argument("--muon-lr", type=float_argument(), default=3e-3)
    parser.add_argument("--adamw-lr", type=float_argument(), default=1.5e-3)
    parser.add_argument("--decay", type=float_argument(), default=0.4)
    parser.add_argument("--minutes", type=float_argument(), default=0.0, help="checkpoint and stop after this long")
    parser.add_argument("--workers", type=int_argument(), default=2)
    args = parser.parse_args()
    launch(train, args.stage, args, workers=args.workers)
