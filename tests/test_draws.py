"""All chance is a function of (seed, step, micro), fair, and the same on every machine."""

import tracemalloc
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dopsd_core.data.encoding_plan import Example
from dopsd_core.training import rng as draws
from dopsd_core.training.rng import DataOrder, derive_seed, draw_noise, draw_variant, make_generator

groups = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), min_size=1, max_size=9)


def test_seeds_are_fixed_for_ever() -> None:
    assert derive_seed(0, "noise", 1, 2) == 277247090877897373
    assert 0 <= derive_seed(5, "x") < 2**63
    assert derive_seed(1, "a", 23) != derive_seed(1, "a", 2, 3) != derive_seed(12, "a", 3)
    first = torch.rand(4, generator=make_generator(3, "x"))
    assert torch.equal(first, torch.rand(4, generator=make_generator(3, "x")))


@given(items=groups, batch_size=st.integers(1, 4), seed=st.integers(0, 9))
def test_an_epoch_visits_all_and_mixes_no_shapes(items: list[tuple[str, int]], batch_size: int, seed: int) -> None:
    shapes, repeats = tuple(shape for shape, _ in items), tuple(count for _, count in items)
    order = DataOrder(shapes, repeats, batch_size, seed)
    visits = Counter(dict.fromkeys(shapes, 0))
    for shape, count in items:
        visits[shape] += count
    batches = sum(-(-count // batch_size) for count in visits.values())
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for number in range(epoch * batches, (epoch + 1) * batches):
            batch = order.batch(number)
            assert len(batch) == batch_size and len({shapes[index] for index in batch}) == 1
            seen.update(batch)
        assert all(seen[index] >= repeats[index] for index in range(len(items)))
        if batch_size == 1:
            assert all(seen[index] == repeats[index] for index in range(len(items)))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = DataOrder((0,) * 8, (1,) * 8, 1, seed)
        return [order.batch(number * 8 + position)[0] for position in range(8)]

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[0] != list(range(8))
    assert epoch(0, 0) == orders[0]


def test_order_of_one_shape_does_not_depend_on_the_batch() -> None:
    singles = DataOrder((0,) * 8, (1,) * 8, 1, 4)
    fours = DataOrder((0,) * 8, (1,) * 8, 4, 4)
    assert tuple(singles.batch(number)[0] for number in range(8)) == fours.batch(0) + fours.batch(1)


def test_noise_belongs_to_the_sample() -> None:
    together = draw_noise(3, 5, 0, [(2, 4, 4)] * 3)
    assert together.shape == (3, 2, 4, 4) and together.dtype == torch.float32
    assert torch.equal(together[2:], draw_noise(3, 5, 2, [(2, 4, 4)]))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, draw_noise(3, 6, 0, [(2, 4, 4)] * 3))
    many = draw_noise(0, 0, 0, [(16, 32, 32)])
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


def test_captions_are_drawn_fairly_and_dropped_as_often_as_asked() -> None:
    example = Example(variants=(0, 1, 1, 2), dropped=3)
    drawn = Counter(draw_variant(example, 0.25, 0, step, 0) for step in range(4000))
    shares = [drawn[index] / 4000 for index in range(4)]
    expected = [0.1875, 0.375, 0.1875, 0.25]
    assert all(abs(share - wanted) < 0.03 for share, wanted in zip(shares, expected, strict=True))
    assert {draw_variant(example, 1.0, 0, step, 0) for step in range(50)} == {3}
    assert 3 not in {draw_variant(example, 0.0, 0, step, 0) for step in range(200)}
    assert {draw_variant(Example((4,)), 1.0, 0, step, 0) for step in range(9)} == {4}


def listed_batches(order: DataOrder, epoch: int) -> list[tuple[int, ...]]:
    """An epoch's batches by their definition, every visit a list item: what runs that are saved were drawn with."""

    def shuffled(items: list[tuple[int, int]], *parts: object) -> list[tuple[int, int]]:
        return sorted(items, key=lambda item: (derive_seed(order.seed, *parts, item), item))

    groups: dict[object, list[tuple[int, int]]] = {}
    for index, (shape, count) in enumerate(zip(order.shapes, order.repeats, strict=True)):
        groups.setdefault(shape, []).extend((index, visit) for visit in range(count))
    queues = []
    for number, visits in enumerate(groups.values()):
        drawn = [index for index, _ in shuffled(visits, "order", epoch, number)]
        size = order.batch_size
        batches = [[drawn[(first + i) % len(drawn)] for i in range(size)] for first in range(0, len(drawn), size)]
        queues.append([tuple(batch) for batch in batches])
    turns = [(number, turn) for number, queue in enumerate(queues) for turn in range(len(queue))]
    remaining = [iter(queue) for queue in queues]
    return [next(remaining[number]) for number, _ in shuffled(turns, "groups", epoch)]


@given(items=groups, batch_size=st.integers(1, 5), seed=st.sampled_from([0, 3, 2**64 - 1]))
def test_the_order_is_that_of_saved_runs(items: list[tuple[str, int]], batch_size: int, seed: int) -> None:
    order = DataOrder(tuple(s for s, _ in items), tuple(count * 3 for _, count in items), batch_size, seed)
    expected = listed_batches(order, 0) + listed_batches(order, 1)
    assert [order.batch(number) for number in range(len(expected))] == expected


def test_the_order_is_fixed_for_ever() -> None:
    order = DataOrder(("a", "b", "a"), (2, 3, 1), 2, 5)
    assert [order.batch(number) for number in range(8)] == listed_batches(order, 0) + listed_batches(order, 1)
    assert [order.batch(number) for number in range(4)] == [(1, 1), (2, 0), (1, 1), (0, 2)]


def test_long_epochs_visit_all_as_often_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "SORTED_VISITS", 0)
    for batch_size in (1, 4):
        order = DataOrder(("a", "b", "a", "b"), (7, 5, 60, 3), batch_size, 1)
        for epoch in range(2):
            batches = -(-67 // batch_size) - (-8 // batch_size)
            drawn = [order.batch(number) for number in range(epoch * batches, (epoch + 1) * batches)]
            assert all(len({order.shapes[index] for index in batch}) == 1 for batch in drawn)
            seen = Counter(index for batch in drawn for index in batch)
            assert all(seen[index] >= count for index, count in enumerate(order.repeats))
            assert sum(seen.values()) == batches * batch_size
    first, second = ([DataOrder((0,) * 9, (3,) * 9, 1, seed).batch(i) for i in range(27)] for seed in (0, 1))
    assert first != second and sorted(first) == sorted(second) and first != sorted(first)


def test_a_visit_is_never_listed_where_there_are_very_many() -> None:
    order = DataOrder(tuple(range(40)), (1_000_000,) * 40, 2, 0)
    tracemalloc.start()
    try:
        drawn = Counter(order.batch(number * 9973)[0] for number in range(2000))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert set(drawn) == set(range(40)) and max(drawn.values()) < 100
