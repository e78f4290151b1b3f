"""The cache: what is a hit, what is stale, and that nothing damaged is ever trusted."""

import json
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd_core.conditioning import (
    Condition,
    ConditionCache,
    EncodeRequest,
    cache_key,
    digest_bytes,
    encode_dataset,
    encode_texts,
)


class CountingEncoder:
    """Tensors that are functions of identity, caption and pixels; counts what it is asked for."""

    def __init__(self, identity="toy-1", reference=False):
        self.identity = identity
        self.reference = reference
        self.calls = []

    def _draw(self, *words, shape):
        seed = int(digest_bytes(repr((self.identity, *words)).encode())[:12], 16)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def encode_text(self, caption):
        self.calls.append("text")
        return Condition(self._draw(caption, shape=(len(caption), 6)).bfloat16())

    def encode_image_text(self, image, caption):
        self.calls.append("image_text")
        references = (self._draw("r", shape=(4, 2, 3)), self._draw("s", shape=(4, 3, 2))) if self.reference else ()
        return Condition(self._draw(caption, image.sum().item(), shape=(len(caption) + 4, 6)), references)

    def encode_latent(self, image):
        self.calls.append("latent")
        return self._draw(image.sum().item(), shape=(4, 2, 2)).half()


def request(data=b"file", caption="a [V] emblem", **settings):
    return EncodeRequest(digest_bytes(data), caption, lambda: torch.full((3, 8, 8), 0.25), settings)


def assert_same(a, b):
    for one, two in ((a.student, b.student), (a.teacher, b.teacher)):
        assert one.features.dtype == two.features.dtype
        assert torch.equal(one.features, two.features)
        assert len(one.reference_latents) == len(two.reference_latents)
        assert all(torch.equal(x, y) for x, y in zip(one.reference_latents, two.reference_latents, strict=True))
    assert torch.equal(a.target_latent, b.target_latent)
    assert (a.caption, a.key) == (b.caption, b.key)


@pytest.mark.parametrize("reference", [False, True])
def test_a_hit_gives_the_same_pair_without_encoder_or_image(tmp_path, reference):
    encoder = CountingEncoder(reference=reference)
    (first,) = encode_dataset([request()], encoder, ConditionCache(tmp_path))
    assert sorted(encoder.calls) == ["image_text", "latent", "text"]
    encoder.calls.clear()

    def no_image():
        raise AssertionError("a hit must not open the image")

    hit = EncodeRequest(digest_bytes(b"file"), "a [V] emblem", no_image)
    seen = []
    (second,) = encode_dataset([hit], encoder, ConditionCache(tmp_path), lambda *report: seen.append(report))
    assert encoder.calls == []
    assert seen == [(1, 1, True)]
    assert_same(first, second)
    assert first.target_latent is not None
    assert first.target_latent.dtype == torch.float32
    assert first.student.features.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changed", "identity"),
    [
        (request(data=b"edited"), "toy-1"),
        (request(caption="a [V] emblem."), "toy-1"),
        (request(bucket=[64, 64]), "toy-1"),
        (request(), "toy-2"),
    ],
)
def test_whatever_decides_the_tensors_is_in_the_key(tmp_path, changed, identity):
    cache = ConditionCache(tmp_path)
    encode_dataset([request()], CountingEncoder(), cache)
    encoder = CountingEncoder(identity)
    encode_dataset([changed], encoder, cache)
    assert encoder.calls


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.text(max_size=4)] * 4), min_size=2, max_size=2, unique=True))
def test_keys_are_distinct_also_where_fields_would_run_together(two):
    one, other = (cache_key(*fields, settings={}) for fields in two)
    assert one != other


def test_the_order_of_settings_does_not_matter():
    assert cache_key("k", "", "", "", {"a": 1, "b": 2}) == cache_key("k", "", "", "", {"b": 2, "a": 1})


# -- damage ------------------------------------------------------------------------------------------------------------


def stored(tmp_path):
    cache = ConditionCache(tmp_path)
    (pair,) = encode_dataset([request()], CountingEncoder(), cache)
    return cache, pair, cache.path(pair.key)


def assert_recomputed(cache, pair, caplog, word="damaged or stale"):
    encoder = CountingEncoder()
    (again,) = encode_dataset([request()], encoder, cache)
    assert len(encoder.calls) == 3
    assert word in caplog.text
    assert_same(again, pair)
    encoder.calls.clear()
    encode_dataset([request()], encoder, cache)
    assert encoder.calls == [], "the entry was not put right"


@pytest.mark.parametrize("keep", [0, 4, 8, 60, 0.5, -1])
def test_a_truncated_entry_is_recomputed(tmp_path, caplog, keep):
    cache, pair, path = stored(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert_recomputed(cache, pair, caplog)


def test_no_bit_flip_is_trusted(tmp_path):
    """One bit anywhere in the file: rejected, or without any effect on what is loaded."""
    cache, pair, path = stored(tmp_path)
    data = path.read_bytes()
    intact = cache.load(pair.key)
    assert intact is not None
    rejected = 0
    positions = range(0, len(data), 3)
    for position in positions:
        path.write_bytes(data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :])
        loaded = cache.load(pair.key)
        rejected += loaded is None
        assert loaded is None or (
            loaded.keys() == intact.keys() and all(torch.equal(loaded[k], intact[k]) for k in intact)
        )
    assert rejected > 0.95 * len(positions)


def test_a_flipped_bit_of_a_tensor_is_recomputed(tmp_path, caplog):
    cache, pair, path = stored(tmp_path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert_recomputed(cache, pair, caplog, "checksum differs")


def test_an_entry_of_another_key_is_stale_under_this_one(tmp_path, caplog):
    cache, pair, path = stored(tmp_path)
    (other,) = encode_dataset([request(caption="another")], CountingEncoder(), cache)
    os.replace(cache.path(other.key), path)
    assert_recomputed(cache, pair, caplog, "written for key")


def test_an_entry_of_another_format_is_stale(tmp_path, caplog):
    cache, pair, path = stored(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"dopsd-conditions-1", b"dopsd-conditions-0"))
    assert_recomputed(cache, pair, caplog)


def test_a_folder_in_the_place_of_an_entry_costs_the_cache_and_not_the_run(tmp_path, caplog):
    cache, pair, path = stored(tmp_path)
    path.unlink()
    (path / "x").mkdir(parents=True)
    (again,) = encode_dataset([request()], CountingEncoder(), cache)
    assert_same(again, pair)
    assert "cannot be written" in caplog.text
    assert not list(tmp_path.glob(".*.tmp"))


def test_writers_at_the_same_time_leave_a_whole_entry(tmp_path):
    cache = ConditionCache(tmp_path)
    tensors = {"student.features": torch.randn(200, 50)}
    threads = [threading.Thread(target=cache.store, args=("k", tensors)) for _ in range(8)]
    for thread in threads:
        thread.start()
    loads = [cache.load("k") for _ in range(30)]
    for thread in threads:
        thread.join()
    assert all(
        loaded is None or torch.equal(loaded["student.features"], tensors["student.features"]) for loaded in loads
    )
    assert cache.load("k") is not None
    assert [p.name for p in tmp_path.iterdir()] == ["k.safetensors"]


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_inference_tensors_become_ordinary_ones(tmp_path):
    class Inference(CountingEncoder):
        def encode_text(self, caption):
            with torch.inference_mode():
                return super().encode_text(caption)

    for cache in (None, ConditionCache(tmp_path)):
        (pair,) = encode_dataset([request()], Inference(), cache)
        assert not pair.student.features.is_inference()


def test_encoders_run_without_a_graph():
    class Trainable(CountingEncoder):
        def encode_text(self, caption):
            assert not torch.is_grad_enabled()
            return Condition(torch.ones(1, 6, requires_grad=True) * 2)

    (pair,) = encode_dataset([request()], Trainable(), None)
    assert not pair.student.features.requires_grad


def test_latents_come_first_so_that_vae_and_text_encoder_need_not_share_memory():
    encoder = CountingEncoder()
    encode_dataset([request(), request(caption="another"), request()], encoder, None)
    assert encoder.calls == ["latent", "latent", "text", "image_text", "text", "image_text"]


def test_texts_are_cached_apart_from_pairs(tmp_path):
    cache, encoder = ConditionCache(tmp_path), CountingEncoder()
    captions = ["a red disc", "a blue disc"]
    first = encode_texts(captions, encoder, cache)
    second = encode_texts(captions, encoder, cache)
    assert encoder.calls == ["text", "text"]
    assert all(torch.equal(a.features, b.features) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("method", "result", "message"),
    [
        ("encode_text", Condition(torch.zeros(1, 3, 6)), r"student features must be \[L, D\], got \(1, 3, 6\)"),
        ("encode_latent", torch.zeros(1, 4, 2, 2), r"must return \[C, h, w\], got \(1, 4, 2, 2\)"),
        ("encode_latent", torch.full((4, 2, 2), torch.nan), "non-finite target_latent for caption 'a .V. emblem'"),
    ],
)
def test_what_training_could_not_use_is_refused_and_not_cached(tmp_path, method, result, message):
    encoder = CountingEncoder()
    setattr(encoder, method, lambda *args: result)
    with pytest.raises(ValueError, match=message):
        encode_dataset([request()], encoder, ConditionCache(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_entry_is_a_plain_safetensors_file_with_its_key(tmp_path):
    _, pair, path = stored(tmp_path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["key"] == pair.key
    assert {"student.features", "teacher.features", "target_latent"} < set(header)
