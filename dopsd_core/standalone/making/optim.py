"""Muon for the matrices, which are divided among the workers, and AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .twins import Twins


class SharedMuon:
    """torch.optim.Muon on each worker's share of the matrices (updates are broadcast), AdamW on all other parameters.

    named: (name, parameter) pairs; embeddings, output layers and heads use AdamW, as Muon's authors recommend. muon_lr:
    None for AdamW on everything.
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
        self, twins: Twins, named: Iterable[tuple[str, nn.Parameter]], muon_lr: float | None,
        adamw_lr: float, weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        self.twins, self.named = twins, list(named)
        self.names = {id(p): name for name, p in self.named}
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.named:
            muon = muon_lr and parameter.ndim == 2 and not any(key in name for key in self.ADAMW_NAMES)
            (matrices if muon else rest).append(parameter)
        matrices.sort(key=lambda p: -p.numel() * min(p.shape))
        self.shares = [matrices[rank :: twins.world] for rank in range(twins.world)] if matrices else []
        self.adamw = torch.optim.AdamW(rest, adamw_lr, betas=(0.9, 0.97), weight_decay=weight_decay, fused=True)
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [(self.adamw, adamw_lr)]
        if self.shares and muon_lr:
            own = self.shares[twins.rank]
            muon = torch.optim.Muon(
                own, muon_lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizers.append((muon, muon_lr))

    def step(self, factor: float) -> None:
        """One update with `factor` times the peak learning rates."""
        for optimizer, lr in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
        with torch.no_grad():
            for source, share in enumerate(self.shares):
                flat = torch.cat([p.reshape(-1) for p in share])
                self.twins.broadcast(flat, source)
                for p, piece in zip(share, flat.split([p.numel() for p in share]), strict=True):
                    p.copy_(piece.view_as(p))

    def tensors(self, *, shared: bool) -> dict[str, Tensor]:
        """The state under "<parameter>/<entry>", each in its parameter's shape or scalar.

        This worker's share of Muon's, and with `shared` AdamW's too, which is equal on all workers.
        """
        chosen = [optimizer for optimizer, _ in self.optimizers if shared or optimizer is not self.adamw]
        return {
            f"{self.names[id(parameter)]}/{entry}": value
            for optimizer in chosen
            for parameter, state in optimizer.state.items()
            for entry, value in state.items()
            if isinstance(value, Tensor)
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes its part of the `tensors` of all workers, under the names and in the shapes of `tensors()`.

        They take the memory format of their parameters, which fused AdamW needs.
        """
        entries: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, entry = key.rpartition("/")
            entries.setdefault(name, {})[entry] = value
        for optimizer, _ in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = {
                        entry: torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
                        for entry, value in entries.get(self.names[id(parameter)], {}).items()
                    }


def zero_gradients(parameters: Iterable[Tensor]) -> None:
    """Sets the gradients of parameters, of any shape, to None."""
    for p in parameters:
        p.grad = None
