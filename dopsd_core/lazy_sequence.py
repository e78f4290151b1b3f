"""Sequences that hold no items: each is made when it is asked for, or stands for many equal ones."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar, overload

T = TypeVar("T")
U = TypeVar("U")


class Lazy(Sequence[T], Generic[T]):
    """A sequence of `count` items that `make` makes from their indices, anew for each access."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Lazy[T]: ...

    def __getitem__(self, index: int | slice) -> T | Lazy[T]:
        places = range(self._count)[index]  # raises IndexError
        if isinstance(places, int):
            return self._make(places)
        return Lazy(len(places), lambda place: self._make(places[place]))

    def map(self, change: Callable[[T], U]) -> Lazy[U]:
        """The sequence of changed items."""
        return Lazy(self._count, lambda index: change(self._make(index)))


class Column(Sequence[T], Generic[T]):
    """A long sequence of few different values, in two bytes per item; hashable."""

    def __init__(self, values: Iterable[T]) -> None:
        known: dict[T, int] = {}
        self._places = array("H", (known.setdefault(value, len(known)) for value in values))
        self._values = tuple(known)
        self._hash = hash((self._values, self._places.tobytes()))

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self._values[place] for place in self._places[index]]
        return self._values[self._places[index]]

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Column):
            return NotImplemented
        return self is other or (self._values == other._values and self._places == other._places)

    def __contains__(self, value: object) -> bool:
        return value in self._values

    def distinct(self) -> tuple[Hashable, ...]:
        """The different values in the order in which they occur."""
        return self._values
