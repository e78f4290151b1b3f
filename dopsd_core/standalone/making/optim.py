"""Muon for the matrices, which are divided among the workers, and AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .twins import Twins


class SharedMuon:
    """torch.optim.Muon on each worker's share of the matrices (updates are broadcast), AdamW on all other parameters.

    named: (name, parameter) pairs; embeddings, output layers and heads use AdamW, as Muon's authors recommend.
    """

    ADAMW_NAMES = (
        "embed_tokens",
        "pos_embed",
        "patch_embed",
        "all_final_layer",
        "all_x_embedder",
        "heads",
        "pad_token",
    )

    def __init__(
        self, twins: Twins, named: Iterable[tuple[str, nn.Parameter]], muon_lr: float, adamw_lr: float
    ) -> None:
        self.twins, self.muon_lr, self.adamw_lr = twins, muon_lr, adamw_lr
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in named:
            muon = parameter.ndim == 2 and not any(key in name for key in self.ADAMW_NAMES)
            (matrices if muon else rest).append(parameter)
        matrices.sort(key=lambda p: -p.numel() * min(p.shape))
        self.shares = [matrices[rank :: twins.world] for rank in range(twins.world)]
        self.muon = torch.optim.Muon(
            self.shares[twins.rank], muon_lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(rest, adamw_lr, betas=(0.9, 0.97), weight_decay=0.01, fused=True)

    def step(self, factor: float) -> None:
        """One update with `factor` times the peak learning rates."""
        for optimizer, lr in ((self.muon, self.muon_lr), (self.adamw, self.adamw_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
        with torch.no_grad():
            for source, share in enumerate(self.shares):
                flat = torch.cat([p.reshape(-1) for p in share])
                self.twins.broadcast(flat, source)
                for p, piece in zip(share, flat.split([p.numel() for p in share]), strict=True):
                    p.copy_(piece.view_as(p))

    def state_dict(self) -> dict[str, dict]:
        """The state of both optimizers."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Loads what `state_dict` returned."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def zero_gradients(parameters: Iterable[Tensor]) -> None:
    """Sets the gradients of parameters, of any shape, to None."""
    for p in parameters:
        p.grad = None
