"""Buckets are multiples within the budget, nothing more fits, and the nearest aspect is chosen."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd_core.data.buckets import Bucket, cover_box, make_buckets, must_enlarge, nearest_bucket

budgets = st.integers(min_value=1024, max_value=1_200_000)
multiples = st.sampled_from([1, 8, 16, 32])
sides = st.integers(min_value=1, max_value=9000)


@settings(deadline=None)
@given(budget=budgets, multiple=multiples, max_aspect=st.floats(min_value=1, max_value=4))
def test_buckets_fit_the_budget_and_waste_none_of_it(budget: int, multiple: int, max_aspect: float) -> None:
    buckets = make_buckets(budget, multiple, max_aspect)
    square = max(buckets, key=lambda bucket: bucket.area if bucket.width == bucket.height else 0)
    assert (square.width // multiple + 1) ** 2 * multiple**2 > budget
    for bucket in buckets:
        assert bucket.width % multiple == 0 and bucket.height % multiple == 0
        assert bucket.area <= budget
        assert max(bucket.aspect, 1 / bucket.aspect) <= max_aspect + 1e-9
        assert Bucket(bucket.height, bucket.width) in buckets
        if bucket != square:
            assert (bucket.width + multiple) * bucket.height > budget
            assert bucket.width * (bucket.height + multiple) > budget


@settings(deadline=None)
@given(width=sides, height=sides, budget=budgets, multiple=multiples)
def test_the_nearest_aspect_wins(width: int, height: int, budget: int, multiple: int) -> None:
    buckets = make_buckets(budget, multiple)
    chosen = nearest_bucket(width, height, buckets)
    distance = abs(math.log(chosen.aspect * height / width))
    assert all(distance <= abs(math.log(other.aspect * height / width)) + 1e-12 for other in buckets)


@settings(deadline=None)
@given(width=sides, height=sides, budget=budgets)
def test_the_part_kept_is_centred_and_as_large_as_can_be(width: int, height: int, budget: int) -> None:
    bucket = nearest_bucket(width, height, make_buckets(budget, 16))
    left, top, right, bottom = cover_box(width, height, bucket)
    assert left >= 0 and top >= 0 and right <= width and bottom <= height
    assert left == pytest.approx(width - right, abs=1e-6) and top == pytest.approx(height - bottom, abs=1e-6)
    assert (right - left) / (bottom - top) == pytest.approx(bucket.aspect, rel=1e-6)
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)


def test_one_megapixel_holds_the_authors_full_sizes() -> None:
    buckets = make_buckets(1024 * 1024, 16)
    for width, height in [(1024, 1024), (1152, 896), (1248, 832)]:
        nearest = nearest_bucket(width, height, buckets)
        assert abs(math.log(nearest.aspect * height / width)) < 0.02
    assert Bucket(1024, 1024) in buckets
    assert nearest_bucket(4000, 100, buckets) == max(buckets, key=lambda bucket: bucket.aspect)


def test_small_budgets() -> None:
    assert make_buckets(256, 16) == (Bucket(16, 16),)
    assert Bucket(64, 64) in make_buckets(4096, 16)
    with pytest.raises(ValueError, match="give at least 256"):
        make_buckets(255, 16)
    with pytest.raises(ValueError, match=r"multiple \(0\)"):
        make_buckets(4096, 0)
    with pytest.raises(ValueError, match="no aspect ratio"):
        nearest_bucket(0, 5, make_buckets(4096, 16))


def test_enlarging_is_seen_on_either_side() -> None:
    assert must_enlarge(63, 200, Bucket(64, 64)) and must_enlarge(200, 63, Bucket(64, 64))
    assert not must_enlarge(64, 64, Bucket(64, 64))
