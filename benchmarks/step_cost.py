"""Cost of one D-OPSD optimizer step on the demo model: ours compared with a plain restatement of the reference step.

    python -m benchmarks.step_cost            # from the root of the checkout, in the environment of `make demo`

The reference step encodes both conditions and the target latent of every pair in each step and calls backward once,
with the graphs of all K rollout steps in memory. Ours encodes the conditions beforehand and calls backward after each
rollout step. Model, adapters, pairs, noise and optimizer are the same; every measurement has its own process, so that
peak memory is separate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.report import RESULTS, Section, Table, measured_here, record
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.conditioning.encode import DualCondition
from dopsd_core.data.dataset import read_dataset
from dopsd_core.data.images import load_image
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.demo.world import IMAGE_SIZE
from dopsd_core.families import Z_IMAGE
from dopsd_core.objectives import DOPSD, ObjectiveInputs, self_distillation_loss
from dopsd_core.rollout import rollout
from dopsd_core.standalone.hosts.demo import DemoModel, load_demo_model
from dopsd_core.standalone.memory import peak_rss_mb
from dopsd_core.teachers import EmaTeacher
from dopsd_core.training.rng import make_generator

Step = Callable[[], None]


class Bench:
    """The demo model with a LoRA on it, and four training pairs repeated to the batch size."""

    def __init__(self, folder: Path, batch: int, num_steps: int) -> None:
        self.model: DemoModel = load_demo_model()
        write_dataset(make_concept(0), folder)
        pairs = read_dataset(folder, pixel_budget=IMAGE_SIZE**2, multiple=16).pairs
        self.sources = [pairs[i % len(pairs)] for i in range(batch)]
        self.adapters = AdapterSet(
            self.model.denoiser.sites(), Z_IMAGE.lora_config(rank=16), teacher=EmaTeacher(decay=0.999)
        )
        self.optimizer = torch.optim.AdamW(self.adapters.parameters(), 1e-4, weight_decay=0.0)
        self.sigmas = Z_IMAGE.sigmas(num_steps, IMAGE_SIZE, IMAGE_SIZE)
        self.noise = torch.randn(batch, *Z_IMAGE.latent_shape(IMAGE_SIZE, IMAGE_SIZE))

    def encode(self) -> list[DualCondition]:
        """The conditions of the pairs, computed anew."""
        encoder, out = self.model.encoder, []
        for pair in self.sources:
            image, caption = load_image(pair.image_path, pair.bucket), pair.captions[0]
            student, teacher = encoder.encode_text(caption), encoder.encode_image_text(image, caption)
            out.append(DualCondition(student, teacher, encoder.encode_latent(image), caption, ""))
        return out

    def ours(self) -> Step:
        """The step of this project, on conditions that are encoded once."""
        pairs, objective = self.encode(), DOPSD(anchor_probability=0)

        def step() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            generator = make_generator(0, "bench")
            objective.backward(
                ObjectiveInputs(self.model.denoiser, self.adapters, pairs, self.noise, self.sigmas, generator)
            )
            self.finish()

        return step

    def reference(self) -> Step:
        """The authors' step: encodes each time, one backward over all rollout steps."""
        denoiser, adapters = self.model.denoiser, self.adapters

        def step() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            pairs, losses = self.encode(), []
            students, teachers = [p.student for p in pairs], [p.teacher for p in pairs]
            adapters.mode = "student"
            predict = lambda x, sigma: denoiser.predict_x0(x, sigma, students)  # noqa: E731
            for state in rollout(predict, self.noise, self.sigmas, grad_steps=range(len(self.sigmas))):
                with adapters.use("teacher"), torch.no_grad():
                    target = denoiser.predict_x0(state.x, state.sigma, teachers)
                losses.append(self_distillation_loss(state.x0, target, state.sigma))
            torch.stack(losses).mean().backward()
            self.finish()

        return step

    def finish(self) -> None:
        """Clips the gradients, and updates the LoRA and its teacher."""
        torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), 1.0)
        self.optimizer.step()
        self.adapters.update_teacher()


def measure(variant: str, num_steps: int, batch: int, repeats: int) -> dict[str, float]:
    """steps/s (median of `repeats`, one more before them not counted) and the memory that the steps added, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), batch, num_steps)
        step = {"ours": bench.ours, "reference": bench.reference}[variant]()
        before, seconds = peak_rss_mb(), []
        with bench.adapters.attached():
            for _ in range(repeats + 1):
                began = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - began)
    middle = sorted(seconds[1:])[repeats // 2]
    return {"steps_per_second": 1 / middle, "added_mb": peak_rss_mb() - before}


def main() -> None:
    """Measures both steps and records them; with --worker one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rollout-steps", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--worker", nargs=2, metavar=("VARIANT", "K"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        sys.stdout.write(json.dumps(measure(args.worker[0], int(args.worker[1]), args.batch, args.repeats)) + "\n")
        return
    found = measured_here(section(args.rollout_steps, args.batch, args.repeats))
    record(found, RESULTS)
    print(found.to_markdown())


def section(rollout_steps: Sequence[int], batch: int, repeats: int) -> Section:
    """Both steps at every number of rollout steps, each in a process of its own."""
    rows = []
    for k in rollout_steps:
        for variant in ("reference", "ours"):
            command = [sys.executable, "-m", "benchmarks.step_cost", "--worker", variant, str(k)]
            sizes = ["--batch", str(batch), "--repeats", str(repeats)]
            out = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True)
            row = json.loads(out.stdout.splitlines()[-1])
            rows.append((str(k), variant, f"{row['steps_per_second']:.2f}", f"{row['added_mb']:.0f}"))
    notes = (
        f"The demo model, batch {batch}, {torch.get_num_threads()} threads. The reference's step recomputes its conditions and keeps the graphs of all K rollout steps; ours does neither.",  # noqa: E501
    )
    columns = ("K", "step", "steps/s", "memory added by the steps, MB")
    return Section(
        "step-cost",
        "Cost of an optimizer step",
        "python -m benchmarks.step_cost",
        None,
        Table(columns, tuple(rows)),
        notes,
    )


if __name__ == "__main__":
    main()
