"""Generates the tables of docs/cost.md: the cost of a step and the memory plans of the training node.

python -m benchmarks.cost_tables            from the root of the checkout; needs ComfyUI, a minute
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import klein_cost, krea2_cost, networks, zimage_cost
from benchmarks.cost_model import StepCost, pass_cost
from benchmarks.counters import META
from benchmarks.networks import Network
from benchmarks.real_size import GB, RAM, make_plan, say
from benchmarks.real_step import Subject
from dopsd_core.config import TrainConfig
from dopsd_core.memory.checkpoint_plan import Checkpointing
from dopsd_core.objectives import DOPSD
from dopsd_core.options import flattened

SIDES, K = (512, 768, 1024), 4
PRESETS = (("24 GB", 64), ("16 GB", 64), ("12 GB", 32), ("8 GB", 16))
BASES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def costs(name: str, subject: Subject) -> None:
    """Of one optimizer step on one sample at rank 64."""
    network = networks.comfyui(subject.comfyui, META, torch.bfloat16)
    for side in SIDES:
        whole = step_cost(subject, network, side)
        student, teacher = whole.student, whole.teacher
        every = replace(whole, checkpointing=len(student.blocks))
        selective = replace(whole, checkpointing=Checkpointing.selective(student.blocks))
        few = [f"{replace(whole, grad_steps=m).forward_equivalents:.1f} S" for m in (2, 1)]
        parts = [f"{flops / 1e12:.1f}" for flops in (student.forward(), teacher.forward(), student.backward())]
        steps = [f"{cost.flops / 1e12:.0f}, {cost.forward_equivalents:.1f} S" for cost in (whole, selective, every)]
        say("| " + " | ".join([name, str(side), *parts, *steps, *few]) + " |\n")


def step_cost(subject: Subject, network: Network, side: int, rank: int | None = None) -> StepCost:
    """That of a step without gradient checkpointing, by the formula."""
    family, latent = subject.family, subject.family.latent_shape(side, side)
    student, teacher = (
        pass_cost(network.denoiser, family, family.lora_config(rank), family.tokens(latent, condition))
        for condition in subject.conditions(side, META)
    )
    return StepCost(student, teacher, K, K)


def plans(name: str, subject: Subject, base: str, ram: int = 0) -> None:
    """What each preset does at each resolution: peak, blocks with gradient checkpointing and the FLOPs that it repeats
    over those of the step, weights that stay in RAM.

    ram: bytes that activations may take: those that they do take then stand in the place of the blocks.
    """
    weights = BASES[base]
    stored = None if weights == torch.bfloat16 else weights
    network = networks.comfyui(subject.comfyui, META, torch.bfloat16, stored, subject.wide)
    config = TrainConfig(
        adapter=subject.family.lora_config(), objective=DOPSD(anchor_probability=0), activation_offloading=ram > 0
    )
    for preset, rank in PRESETS:
        cells = []
        for side in reversed(SIDES):
            plan = make_plan(subject, network, preset, side, rank, config, ram=ram)
            streamed = f", {plan.streamed / GB:.1f} {'of weights' if ram else 'in RAM'}" if plan.streamed else ""
            cost = replace(
                step_cost(subject, network, side, rank),
                checkpointing=Checkpointing(plan.checkpointing.kept),
                grad_steps=flattened(TrainConfig.from_json(plan.config.to_json()))["grad_steps"] or K,
            )
            inside = f"{plan.checkpointing.ram_bytes(plan.footprint.blocks) / GB:.1f}"
            what = inside if ram else f"{plan.checkpointing.count} of {len(plan.footprint.blocks)}"
            cells.append(f"{plan.peak / GB:.1f}: {what}, {cost.repeated:.0%}{streamed}")
        say("| " + " | ".join([f"{name}, {base} {network.weight_bytes / GB:.1f}", preset, str(rank), *cells]) + " |\n")


def main() -> None:
    """Prints all tables."""
    klein = {f"klein {size}, {teacher}": klein_cost.subject(size, teacher) for size, teacher in klein_rows()}
    say(
        "| model, teacher | side | S, TFLOP | T | B | step | selective checkpointing | full checkpointing "
        "| m = 2 of 4 | m = 1 |\n" + "|---" * 10 + "|\n"
    )
    for name, subject in {"Z-Image": zimage_cost.subject(), **klein, "Krea 2": krea2_cost.subject()}.items():
        costs(name, subject)
    for ram in (0, RAM):
        say("\n| model, base in GB | memory | rank | 1024 | 768 | 512 |\n" + "|---" * 6 + "|\n")
        for name, subject in {
            "Z-Image": zimage_cost.subject(),
            "klein 4B": klein_cost.subject("4B"),
            "klein 9B": klein_cost.subject("9B"),
            "Krea 2": krea2_cost.subject(),
        }.items():
            for base in BASES:
                plans(name, subject, base, ram)


def klein_rows() -> list[tuple[str, str]]:
    """(size, teacher) of the rows of FLUX.2-klein."""
    return [("4B", "edit"), ("4B", "vlm"), ("4B", "edit_target"), ("9B", "edit")]


if __name__ == "__main__":
    main()
