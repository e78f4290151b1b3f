"""The processes that train a run together.

Each rank computes its share of the batches of an optimizer step, and all ranks make the same step with the sum of the
gradients. They also share the pairs on which the gap is measured, and the images of previews. Rank 0 alone reads and
writes the folder of the run. A host provides the communication as a `World`; without one, a run has one process.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

S = TypeVar("S")
T = TypeVar("T")


class World(Protocol):
    """Communication between the ranks of a run; implemented by a host. Every rank makes the same calls in order."""

    @property
    def rank(self) -> int:
        """Index of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    @property
    def mesh(self) -> DeviceMesh | None:
        """torch's process group of these ranks in one row, for weights of which each rank holds a part; None without
        one."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The (picklable) values of all ranks, in their order."""
        ...

    def broadcast(self, value: Any) -> Any:
        """The (picklable) value of rank 0."""
        ...

    def sum_(self, tensor: Tensor) -> None:
        """Replaces the tensor, of any shape, by its sum over all ranks, with equal bits on each."""
        ...


class OneProcess:
    """A world of one rank."""

    rank, size, mesh = 0, 1, None

    def gather(self, value: Any) -> list[Any]:
        """The value alone."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """The value."""
        return value

    def sum_(self, tensor: Tensor) -> None:
        """Leaves the tensor, of any shape, as it is."""


class PeerError(RuntimeError):
    """Raised if another rank failed or was lost."""


class LostPeer(PeerError):
    """Raised if the connection to another rank broke, so that nobody knows here why."""


@dataclass(frozen=True)
class _Outcome:
    """What a rank brings to a meeting.

    Attributes:
        value: the result of its work.
        error: why it failed; None if it did not.
    """

    value: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Turn:
    """A batch that a rank computes.

    Attributes:
        number: its index in the step.
        counts: whether it counts; if not, its loss and gradients are another rank's.
    """

    number: int
    counts: bool = True


class Peers:
    """The ranks of a run, meeting at the same points: a failure of one rank before a meeting ends all of them there."""

    def __init__(self, world: World | None = None) -> None:
        self.world: World = world or OneProcess()
        self._is_over = False
        self._runs_in_step = False

    def run_in_step(self) -> None:
        """From now on all ranks run the network together, since each holds a part of it.

        A failing rank then leaves without a last meeting, which the others could not attend inside a forward: their
        connections break, and the launcher ends them.
        """
        self._runs_in_step = self.world.size > 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.world.rank == 0

    def all(self, work: Callable[[], T]) -> list[T]:
        """Calls `work` on every rank; the results of all ranks, in their order.

        Raises:
            PeerError: it failed on another rank. Where it failed, its own exception is raised.
        """
        if self.world.size == 1:
            return [work()]
        try:
            mine, caught = _Outcome(work()), None
        except BaseException as error:
            if self._runs_in_step:
                self._is_over = True
                raise
            mine, caught = _Outcome(error=_describe(error)), error
        outcomes = self._meet(mine)
        if caught is not None:
            raise caught
        failed = [(rank, outcome.error) for rank, outcome in enumerate(outcomes) if outcome.error is not None]
        if failed:
            raise PeerError(f"process {failed[0][0]} of {self.world.size} failed: {failed[0][1]}")
        return [outcome.value for outcome in outcomes]

    def first(self, work: Callable[[], T]) -> T:
        """Calls `work` on rank 0; its result, on every rank.

        Raises:
            PeerError: it failed on rank 0, whose own exception is raised there.
        """
        found: list[Any] = []
        self.all(lambda: found.append(work()) if self.is_first else None)
        return self._talk(lambda: self.world.broadcast(found[0] if found else None))

    def spread(
        self,
        items: Sequence[S],
        work: Callable[[Sequence[S]], Sequence[T]],
        course: Callable[[S], Hashable] = lambda item: None,
    ) -> list[T]:
        """Divides the items over the ranks; the results of all items, in their order, on every rank.

        Args:
            items: equal on every rank.
            work: the results of a rank's own items, in their order; picklable, tensors on the CPU. It may be called
                with no items.
            course: of an item, what its forwards are; as in `share`.

        Raises:
            PeerError: it failed on another rank. Where it failed, its own exception is raised.
        """
        if self._runs_in_step:
            turns = self._turns_in_step([course(item) for item in items])
        else:
            turns = [Turn(number) for number in range(self.world.rank, len(items), self.world.size)]

        def mine() -> list[tuple[int, T]]:
            results = work([items[turn.number] for turn in turns])
            return [(turn.number, result) for turn, result in zip(turns, results, strict=True) if turn.counts]

        found = dict(pair for results in self.all(mine) for pair in results)
        return [found[number] for number in range(len(items))]

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """An exception inside the `with` block ends all ranks at their next meeting."""
        try:
            yield
        except BaseException as error:
            if self._runs_in_step and _is_lost(error):
                raise _lost(error) from error
            if not self._is_over and not self._runs_in_step:
                try:
                    self._meet(_Outcome(error=_describe(error)))
                except PeerError as lost:
                    raise error from lost
            raise

    def require_equal(self, facts: Mapping[str, str]) -> None:
        """Checks that all ranks have the same facts.

        Raises:
            ValueError: they have not; the message names the facts.
        """
        every = self.all(lambda: dict(facts))
        differing = [name for name in facts if len({found.get(name) for found in every}) > 1]
        if differing:
            raise ValueError(
                f"the processes of this run disagree about {' and '.join(differing)}: start all of them with the same "
                "command, files and versions"
            )

    def share(self, courses: Sequence[Hashable]) -> list[Turn]:
        """This rank's share of the batches of a step, whose number is divisible by the number of ranks.

        courses: of each batch, what its forwards are. Ranks that run the network together get batches of the same
            course at the same time; where their number does not come out even, a batch is repeated without effect.
        """
        if self._runs_in_step:
            return self._turns_in_step(courses)
        rank, each = self.world.rank, len(courses) // self.world.size
        return [Turn(number) for number in range(rank * each, (rank + 1) * each)]

    def _turns_in_step(self, courses: Sequence[Hashable]) -> list[Turn]:
        size, rank = self.world.size, self.world.rank
        turns = []
        for course in dict.fromkeys(courses):
            numbers = [number for number, other in enumerate(courses) if other == course]
            for first in range(0, len(numbers), size):
                mine = first + rank
                turns.append(Turn(numbers[mine]) if mine < len(numbers) else Turn(numbers[first], counts=False))
        return turns

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces the gradients, of any shape, by their sums over all ranks; a missing one counts as zero.

        Gradients of weights in parts are summed already, by their backward.
        """
        if self.world.size == 1 or not parameters or self._runs_in_step:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._talk(lambda: self.world.sum_(flat))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _meet(self, mine: _Outcome) -> list[_Outcome]:
        outcomes = self._talk(lambda: self.world.gather(mine))
        self._is_over = any(outcome.error is not None for outcome in outcomes)
        return outcomes

    def _talk(self, exchange: Callable[[], T]) -> T:
        try:
            return exchange()
        except Exception as error:  # whatever the backend raises if a connection breaks
            self._is_over = True
            raise _lost(error) from error


def _lost(error: BaseException) -> LostPeer:
    why = f"the connection says: {_describe(error)}"
    return LostPeer(f"another process of this run was lost; the same command continues from what is saved ({why})")


def _is_lost(error: BaseException) -> bool:
    """Whether a communication inside a forward broke; gloo and NCCL raise a RuntimeError of their own words."""
    words = ("connection closed", "connection reset", "nccl", "process group")
    is_foreign = isinstance(error, RuntimeError) and not isinstance(error, PeerError)
    return is_foreign and any(word in str(error).lower() for word in words)


def _describe(error: BaseException) -> str:
    unnamed = "it was interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
    return " ".join(str(error).split())[:500] or unnamed
