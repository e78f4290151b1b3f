"""A run: its components and its state."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..adapters.sharded_weights import ShardedWeights
from ..config import TrainConfig
from ..denoiser import Denoiser
from ..dtensors import local
from ..memory.in_use import memory_in_use
from ..objectives import ObjectiveOutput
from ..optimizers import evaluating, set_rate, start_training
from ..optimizers.state import flatten_state
from ..trainable import Role, Trainable
from .batches import Batches, on_device
from .checkpoint import Checkpoint
from .class_images import ClassImages, OnDrawn
from .gradients import Gradients
from .log import Gaps, StepReport, mean_metrics
from .loss_scale import LossScale
from .nonfinite import NonFiniteError, all_finite, remedy
from .probe import Probe
from .resume import identity_of, optimizer_state, require_same_run, run_exists
from .rng import DataOrder
from .run_folder import RunFolder, UnusedFolder, saves_in_background
from .saved_loras import facts_of, is_due
from .scales import ordered
from .sharded_checkpoint import divided_state, load_sharded
from .training_set import TrainingSet
from .unseen_gap import BestStep
from .world import Peers

log = logging.getLogger("dopsd")


class Run:
    """The components of a run and their state.

    Args:
        config: the configuration.
        denoiser: the frozen network.
        data: the training set.
        folder: folder of the run.
        facts: extra metadata for the LoRA's header.
        initial: folded tensors of the LoRA to start from, [rank, in] and [rows, rank].
        class_images: the images that the untouched model draws first; None for an objective without.
        peers: the processes of the run; by default this one.
    """

    def __init__(
        self,
        config: TrainConfig,
        denoiser: Denoiser,
        data: TrainingSet,
        folder: Path,
        facts: Mapping[str, str] | None = None,
        initial: Mapping[str, Tensor] | None = None,
        class_images: ClassImages | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.config, self.denoiser, self.data = config, denoiser, data
        self.peers = peers or Peers()
        self.folder = RunFolder(folder, config, denoiser) if self.peers.is_first else UnusedFolder(folder)
        self._facts = dict(facts or {})
        self.step = 0
        self.start: Gaps | None = None
        self.last: Gaps | None = None
        self.best: BestStep | None = None
        self.is_between_steps = True
        self._class_images = class_images or ClassImages()
        self._identity = identity_of(data, self._facts, initial, self._class_images.digest)
        self._heldout = data.heldout.key if data.heldout is not None else ""
        self._is_other_heldout = False
        self.heldout_since = 0  # the gaps up to this step are of another held-out pair
        self.adapters = _weights(config, denoiser, self.peers)
        if self.adapters.is_sharded:
            self.peers.run_in_step()
        self.loss_scale = LossScale(denoiser.compute_dtype)
        self._start_state = config.adapter.start_state(initial, self.adapters.state()) if initial else None
        self.optimizer = config.optimizer.build(self.adapters.parameters())
        start_training(self.optimizer)
        self.probe = Probe(config, denoiser, self.adapters, data, self.peers)
        order = DataOrder(data.shapes(), data.repeats(), config.batch_size, config.seed)
        self.order = ordered(order, data.scales, config.small_first * config.grad_accumulation)
        self._anchors = on_device(data.anchors, denoiser.device) if config.objective.wants_anchors else []
        batches = Batches(config, denoiser, self.adapters, data, self.order, self._anchors)
        self.gradients = Gradients(config, self.adapters, batches, self._class_images, self.loss_scale, self.peers)

    def open(self, resume: bool) -> None:
        """Locks the folder, loads its newest checkpoint, if there is one, and writes the configuration.

        Raises:
            DiskError: the folder is not writable, or there is not enough space for the next save.
            FolderInUse: another run is using the folder.
            StateError: the run in the folder cannot be resumed.
            ValueError: another process has another configuration, dataset or model.
        """
        self.peers.require_equal({"the configuration": self.config.to_json(), **self._identity.in_words()})
        checkpoint = self.peers.first(self.folder.open)
        if checkpoint is not None:
            if not resume:
                raise run_exists(self.folder.path)
            self._load(checkpoint)
        elif self._start_state is not None:
            self._set_weights(self._start_state, self._start_state)
        self.folder.begin(self.step, is_new=checkpoint is None)
        if self.loss_scale.is_on:
            log.info("the network computes in fp16: loss scale %g", self.loss_scale.value)

    def close(self) -> None:
        """Closes the folder."""
        self.folder.close()

    def draw_class_images(self, on_drawn: OnDrawn) -> bool:
        """Lets the untouched model draw the images that the objective needs; returns False if `on_drawn` stopped it.

        Ranks that hold a part of the weights each draw together those that rank 0 does not find in the cache.
        """
        found = self.peers.first(self._class_images.cached) if self.adapters.is_sharded else None
        with self.adapters.use("off"):
            return self._class_images.draw(self._anchors, self.denoiser, on_drawn, found)

    def measure_start(self) -> StepReport:
        """Measures the gap before training.

        Raises:
            NonFiniteError: the network's predictions are not finite.
        """
        self.start = self.last = self._measure()
        if self.start.train < 1e-6:
            log.warning("teacher and student agree before training: there is nothing to learn")
        relative, heldout = self.start.relative_to(self.start)
        metrics = {"gap": self.start.train, **self.start.metrics_of_concepts(self.start)}
        report = StepReport(step=0, metrics=metrics, relative_gap=relative, heldout_relative_gap=heldout)
        self.folder.append(report)
        return report

    def meet_heldout(self) -> bool:
        """Whether the held-out pair differs from the saved run's; if so, measures its gaps now and before training.

        The pair is not trained on, so a run can resume with another one; but gaps of different pairs do not compare.
        """
        is_other, self._is_other_heldout = self._is_other_heldout, False
        if not is_other or self.start is None or self.last is None:
            return is_other
        with evaluating(self.optimizer):
            self.last = dataclasses.replace(self.last, heldout=self.probe.measure_heldout())
        self.start = dataclasses.replace(self.start, heldout=self._heldout_at_the_start())
        return True

    def _heldout_at_the_start(self) -> float | None:
        if self._start_state is None:  # student and teacher started as the untouched model
            return self.probe.measure_heldout(untrained=True)
        student, teacher = self.adapters.state("student"), self.adapters.state("teacher")
        self._set_weights(self._start_state, self._start_state)
        try:
            return self.probe.measure_heldout()
        finally:
            self._set_weights(student, teacher)

    def make_step(self) -> StepReport:
        """One optimizer step: accumulate, check, clip, step, teacher, probe, log.

        Raises:
            NonFiniteError: loss or gradient is not finite; the state before the step is kept.
            DiskError: the log could not be written, after the step.
        """
        began = time.perf_counter()
        rate = self.config.learning_rate(self.step)
        set_rate(self.optimizer, rate)
        outputs, grad_norm, overflows = self.gradients.accumulate(self.step, self.optimizer)
        scale = self.loss_scale.value
        self.is_between_steps = False
        self.optimizer.step()
        self.adapters.update_teacher()
        self.loss_scale.after_step()
        self.gradients.batches.step_losses.add(outputs)
        self.step += 1
        self.is_between_steps = True
        report = self._report(outputs, rate, grad_norm, time.perf_counter() - began)
        if self.loss_scale.is_on:
            report = dataclasses.replace(report, loss_scale=scale, overflows=overflows)
        self.folder.append(report)
        return report

    def save(self) -> Path:
        """Writes a checkpoint.

        Raises:
            NonFiniteError: the weights are not finite; nothing is written.
            DiskError: it could not be written; older ones are untouched.
        """
        self._require_finite()
        return self.folder.save_checkpoint(self._checkpoint(), self.peers if self.adapters.is_sharded else None)

    def save_meanwhile(self) -> None:
        """Writes a checkpoint, on a GPU while the run continues; raises as `save`, also for the one begun before."""
        if self.adapters.is_sharded:  # all ranks write together
            self.save()
            return
        self._require_finite()
        self.folder.begin_checkpoint(self._checkpoint(), saves_in_background(self.config, self.denoiser.device))

    def save_lora(self) -> Path:
        """Writes the student as a LoRA file.

        Raises:
            NonFiniteError: the weights are not finite; nothing is written.
            DiskError: it could not be written; an older file is untouched.
        """
        self._require_finite()
        with evaluating(self.optimizer):
            return self.folder.save_lora(self.step, self.adapters.state(), self._metadata())

    def save_lora_of_step(self) -> None:
        """Writes the student as the LoRA file of this step, which stays in the run's folder.

        Raises:
            NonFiniteError, DiskError: as in `save_lora`.
        """
        self._require_finite()
        with evaluating(self.optimizer):
            self.folder.save_lora_of_step(self.step, self.adapters.state(), self._metadata(), self.heldout_since)

    def save_all(self) -> tuple[Path, Path]:
        """Writes the LoRA file and a checkpoint, unless they exist for this step, and returns their paths.

        The LoRA is written first: it is small, and may be all that fits on a full disk.

        Raises:
            NonFiniteError, DiskError: as in `save` and `save_lora`.
        """
        return self.save_lora(), self.save()

    def save_before_leaving(self) -> None:
        """After an exception, saves the state if it is valid; never hides the exception."""
        if self.step == 0 or not self.is_between_steps or self.adapters.is_sharded or not self._is_finite():
            return  # weights in parts are saved by all ranks or not at all
        for write in (self.save_lora, self.save):
            try:
                write()
            except Exception as error:
                log.error("the state of step %d could not be saved: %s", self.step, error)

    def _require_finite(self) -> None:
        if not self._is_finite():
            raise NonFiniteError(self.step, f"{self.config.adapter.product}'s weights after the optimizer", math.nan)

    def _is_finite(self) -> bool:
        is_finite = all_finite([local(parameter.detach()) for parameter in self.adapters.parameters()])
        return all(self.peers.all(lambda: is_finite)) if self.adapters.is_sharded else is_finite

    def _set_weights(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        self.adapters.load_state("student", student)
        if self.adapters.has_teacher:
            self.adapters.load_state("teacher", teacher)

    def _measure(self) -> Gaps:
        with evaluating(self.optimizer):
            gaps = self.probe.measure()
        for gap in (gaps.train, gaps.heldout):
            if gap is not None and not math.isfinite(gap):
                raise NonFiniteError(
                    self.step, "gap to the teacher", gap, remedy=remedy(self.step, self.loss_scale.is_on)
                )
        return gaps

    def _metadata(self) -> dict[str, str]:
        return self._facts | facts_of(self.config, self._identity, self.step)

    def _checkpoint(self) -> Checkpoint:
        tensors, rest = flatten_state(self.optimizer.state_dict())
        facts = {
            "config": self.config.to_json(),
            "data": self._identity.data,
            "pairs": self._identity.pairs,
            "model": self._identity.model,
            "heldout": self._heldout,
            "heldout_since": self.heldout_since,
            "initial": self._identity.initial,
            "class_images": self._identity.class_images,
            "optimizer_state": rest,
            "loss_scale": self.loss_scale.state(),
            "step_losses": self.gradients.batches.step_losses.state(),
            "start": None if self.start is None else dataclasses.astuple(self.start),
            "last": None if self.last is None else dataclasses.astuple(self.last),
        }
        return Checkpoint(self.step, self._saved("student"), self._saved("teacher"), tensors, facts)

    def _saved(self, which: Role) -> Mapping[str, Tensor]:
        """Copies of the weights, of any shape; those in parts are not copied."""
        return self.adapters.parts(which) if isinstance(self.adapters, ShardedWeights) else self.adapters.state(which)

    def _report(self, outputs: Sequence[ObjectiveOutput], rate: float, grad_norm: float, seconds: float) -> StepReport:
        config, every = self.config, self.config.probe_every
        relative, heldout, by_concept = None, None, {}
        if every and (self.step % every == 0 or is_due(config, self.step) or self.step == config.steps):
            self.last = self._measure()
            if self.start is not None:
                relative, heldout = self.last.relative_to(self.start)
                by_concept = self.last.metrics_of_concepts(self.start)
        counted = [output for output in outputs if not output.is_anchor] or list(outputs)
        losses, memory = [output.loss for output in counted], memory_in_use(self.denoiser.device)
        return StepReport(
            step=self.step,
            loss=sum(losses) / len(losses),
            metrics=mean_metrics([output.metrics for output in counted]) | by_concept,
            relative_gap=relative,
            heldout_relative_gap=heldout,
            lr=rate,
            grad_norm=grad_norm,
            anchors=sum(output.is_anchor for output in outputs),
            seconds=seconds,
            gpu_gb=memory.gpu_gb,
            ram_gb=memory.ram_gb,
        )

    def _load(self, checkpoint: Checkpoint) -> None:
        facts, folder = checkpoint.facts, self.folder.path
        require_same_run(checkpoint, self.config, self._identity, folder)
        checkpoint = load_sharded(checkpoint, self.adapters, self.adapters.parameters())
        self._set_weights(checkpoint.lora, checkpoint.teacher)
        state = optimizer_state(checkpoint, self.optimizer.state_dict())
        self.optimizer.load_state_dict(divided_state(state, self.adapters.parameters()))
        self.loss_scale.load(facts.get("loss_scale"))
        self.gradients.batches.step_losses.load(facts.get("step_losses"))
        self.step = checkpoint.step
        self.start = Gaps.from_json(facts["start"]) if facts["start"] else None
        self.last = Gaps.from_json(facts["last"]) if facts["last"] else None
        self._is_other_heldout = facts.get("heldout", "") != self._heldout
        self.heldout_since = self.step if self._is_other_heldout else facts.get("heldout_since", 0)
        log.info("resuming %s at step %d", folder, self.step)


def _weights(config: TrainConfig, denoiser: Denoiser, peers: Peers) -> Trainable:
    mesh = peers.world.mesh if peers.world.size > 1 and config.adapter.trains_network else None
    if mesh is None:
        return config.adapter.build(denoiser, config.teacher, config.seed)
    return config.adapter.build_sharded(denoiser, config.teacher, config.seed, mesh)
