"""Memory per GPU of all weights of Z-Image-Turbo in parts (FSDP2), at the real size, counted without a GPU.

    python -m benchmarks.sharded_cost --ranks 4 8 --side 1024

Runs a whole D-OPSD step of one of the ranks on tensors without contents (FakeTensorMode, a process group that sends nothing), with `ShardedWeights`, gradient checkpointing on every block and AdamW, and counts the bytes alive op by op. Prints the table of docs/full-weights.md. The allocator's gaps and NCCL's buffers are not in it.
"""  # noqa: E501

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.counters import LiveBytes
from dopsd_core.adapters import sharded_weights
from dopsd_core.adapters.sharded_weights import ShardedWeights
from dopsd_core.conditioning.encode import Condition, DualCondition
from dopsd_core.dtensors import local, mesh_of
from dopsd_core.families import Z_IMAGE
from dopsd_core.memory.activation_checkpointing import checkpointed
from dopsd_core.objectives import ObjectiveInputs
from dopsd_core.objectives.distillation import Sides, Teaching, distill

TEXT_WIDTH, STUDENT_TOKENS, TEACHER_TOKENS = 2560, 100, 1200
GB = 1e9


@dataclass(frozen=True)
class Counted:
    """Bytes on one GPU.

    Attributes:
        parameters: number of all weights.
        masters: the fp32 parts of the student's weights.
        resident: masters, teacher, original weights, gradients and the optimizer's state, between two steps.
        peak: the most that is alive during a step.
    """

    parameters: int
    masters: int
    resident: int
    peak: int


def count(ranks: int, side: int, teacher: str, layers: int = 30) -> Counted:
    """One step of one rank; side: of the image in pixels, layers: main blocks of the network."""
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    from dopsd_core.standalone.hosts.z_image import ZImageDenoiser

    names = SimpleNamespace  # fake tensors are no plain weights, which is all that is checked
    listed = patch.object(
        sharded_weights, "trained_parameters", lambda net: [names(name=name) for name, _ in net.named_parameters()]
    )
    agreed = patch.object(ShardedWeights, "_require_agreement", lambda self, mode: None)  # reads values
    mesh = mesh_of("cpu", ranks)
    with FakeTensorMode(allow_non_fake_inputs=True), listed, agreed:
        torch.set_default_dtype(torch.bfloat16)
        network = ZImageTransformer2DModel(n_layers=layers)
        torch.set_default_dtype(torch.float32)
        denoiser, parameters = ZImageDenoiser(network), sum(p.numel() for p in network.parameters())
        weights = ShardedWeights(network, denoiser.blocks(), mesh, teacher)
        optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-5)
        masters = sum(local(parameter.detach()).nbytes for parameter in weights.parameters())
        kept = masters * (3 if weights.has_teacher else 2)
        live = LiveBytes()
        with _followed(live), live, weights.attached(), checkpointed(denoiser.blocks(), len(denoiser.blocks())):
            for number in range(2):  # the optimizer's state is there from the second step on
                _step(denoiser, weights, side)
                optimizer.step()
                if number == 0:
                    optimizer.zero_grad(set_to_none=True)
                    live.peak = live.now
            return Counted(parameters, masters, kept + live.now, kept + live.peak)


@contextmanager
def _followed(live: LiveBytes) -> Iterator[None]:
    """Inside the `with`, FSDP2's own freeing and allocating of what it gathers is counted."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

    allocate, free = _fsdp_param.alloc_storage, _fsdp_param.free_storage

    def allocating(tensor: torch.Tensor) -> None:
        allocate(tensor)
        live.resize(tensor, tensor.numel() * tensor.itemsize)

    def freeing(tensor: torch.Tensor) -> None:
        live.resize(tensor, 0)
        free(tensor)

    with (
        patch.object(_fsdp_param, "alloc_storage", allocating),
        patch.object(_fsdp_param_group, "alloc_storage", allocating),
        patch.object(_fsdp_param, "free_storage", freeing),
    ):
        yield


def _step(denoiser: object, weights: ShardedWeights, side: int) -> None:
    student, teacher = (Condition(torch.zeros(length, TEXT_WIDTH)) for length in (STUDENT_TOKENS, TEACHER_TOKENS))
    inputs = ObjectiveInputs(
        denoiser=denoiser,  # type: ignore[arg-type]
        adapters=weights,
        pairs=[DualCondition(student, teacher, None, "", "")],
        noise=torch.zeros(1, *Z_IMAGE.latent_shape(side, side)),
        sigmas=(1.0, 0.5, 0.0),
        generator=torch.Generator(),
    )
    distill(inputs, Sides.of_pairs(inputs), range(2), Teaching())


def table(counted: Sequence[tuple[int, str, Counted]], side: int) -> str:
    """Markdown; a row per number of ranks and teacher."""
    rows = [
        f"| {ranks} | {teacher} | "
        + " | ".join(f"{size / GB:.1f} GB" for size in (found.masters, found.resident, found.peak))
        + " |"
        for ranks, teacher, found in counted
    ]
    head = f"| GPUs | teacher | a part | between steps | peak at {side} |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def main() -> None:
    """Counts and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--side", type=int, default=1024, help="of the image in pixels")
    parser.add_argument("--layers", type=int, default=30, help="main blocks of the network")
    args = parser.parse_args()
    counted = []
    for ranks in args.ranks:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        counted += [(ranks, name, count(ranks, args.side, name, args.layers)) for name in ("ema", "frozen")]
        dist.destroy_process_group()
    print(f"{counted[0][2].parameters / 1e9:.2f}e9 parameters")
    print(table(counted, args.side))


if __name__ == "__main__":
    main()
