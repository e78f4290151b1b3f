"""The cache: what is a hit, what is stale, and that nothing damaged is ever trusted."""

import json
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd_core.conditioning.cache import FORMAT, ConditionCache, cache_key, digest_bytes
from dopsd_core.conditioning.encode import Condition, EncodeRequest, ImageInput, encode_dataset, encode_texts
from dopsd_core.conditioning.teachers import EDIT, EDIT_TARGET, TEACHER_VIEWS, VLM, WORDS


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


def image_input(data=b"file", grey=0.25, **settings):
    return ImageInput(digest_bytes(data), lambda: torch.full((3, 8, 8), grey), settings)


def request(data=b"file", caption="a [V] emblem", sources=(), shown=None, **settings):
    return EncodeRequest(image_input(data, **settings), caption, sources, shown)


SOURCE, OTHER = image_input(b"source", 0.5), image_input(b"other", 0.75)


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

    hit = EncodeRequest(ImageInput(digest_bytes(b"file"), no_image), "a [V] emblem")
    seen = []
    (second,) = encode_dataset([hit], encoder, ConditionCache(tmp_path), lambda *report: seen.append(report))
    assert encoder.calls == []
    assert seen == [(1, 1, True)]
    assert_same(first, second)
    assert first.target_latent is not None
    assert first.target_latent.dtype == torch.float32
    assert first.student.features.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changed", "identity", "anew"),
    [
        (request(data=b"edited"), "toy-1", ["latent", "image_text"]),
        (request(caption="a [V] emblem."), "toy-1", ["image_text", "text"]),
        (request(bucket=[64, 64]), "toy-1", ["latent", "image_text"]),
        (request(), "toy-2", ["latent", "image_text", "text"]),
    ],
)
def test_whatever_decides_a_part_is_in_its_key(tmp_path, changed, identity, anew):
    cache = ConditionCache(tmp_path)
    encode_dataset([request()], CountingEncoder(), cache)
    encoder, reports = CountingEncoder(identity), []
    encode_dataset([changed], encoder, cache, lambda *report: reports.append(report))
    assert sorted(encoder.calls) == sorted(anew)
    assert reports == [(1, 1, False)]


def test_a_pair_is_no_hit_when_its_latent_alone_was_missing(tmp_path):
    cache, reports = ConditionCache(tmp_path), []
    encode_dataset([request()], CountingEncoder(), cache)
    cache.path(cache_key("latent", digest_bytes(b"file"), "", "toy-1", {})).unlink()
    encode_dataset([request(), request()], CountingEncoder(), cache, lambda *report: reports.append(report))
    assert reports == [(1, 2, False), (2, 2, True)]


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
    return cache, pair, seen_path(cache)


def seen_path(cache, caption="a [V] emblem"):
    """Of the part that the vision tower and the text encoder make together."""
    return cache.path(cache_key("seen", digest_bytes(b"file"), caption, "toy-1", {}))


def assert_recomputed(cache, pair, caplog, word="damaged or stale"):
    encoder = CountingEncoder()
    (again,) = encode_dataset([request()], encoder, cache)
    assert encoder.calls == ["image_text"], "one part was damaged, the others were not"
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
    intact = cache.load(path.stem)
    assert intact is not None
    rejected = 0
    positions = range(0, len(data), 3)
    for position in positions:
        path.write_bytes(data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :])
        loaded = cache.load(path.stem)
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
    encode_dataset([request(caption="another")], CountingEncoder(), cache)
    os.replace(seen_path(cache, "another"), path)
    assert_recomputed(cache, pair, caplog, "written for key")


def test_an_entry_of_another_format_is_stale(tmp_path, caplog):
    cache, pair, path = stored(tmp_path)
    path.write_bytes(path.read_bytes().replace(FORMAT.encode(), b"dopsd-conditions-0"))
    assert_recomputed(cache, pair, caplog)


def test_entries_of_release_0_2_are_not_read(tmp_path, monkeypatch):
    """They were kept under identities of other text encoders too."""
    cache = ConditionCache(tmp_path)
    with monkeypatch.context() as old:
        old.setattr("dopsd_core.conditioning.cache.FORMAT", "dopsd-conditions-2")
        encode_dataset([request()], CountingEncoder(), cache)
    encoder = CountingEncoder()
    encode_dataset([request()], encoder, cache)
    assert sorted(encoder.calls) == ["image_text", "latent", "text"]


class FileReader(CountingEncoder):
    """An encoder of which each caption with `embedding:` reads a file."""

    contents = "1"

    def identity_for(self, caption):
        return self.identity + self.contents * ("embedding:" in caption)


def test_a_file_that_a_caption_names_counts_for_that_caption(tmp_path):
    cache = ConditionCache(tmp_path)

    def run(contents):
        encoder = FileReader()
        encoder.contents = contents
        pairs = encode_dataset([request(), request(caption="a [V] embedding:x")], encoder, cache)
        return encoder.calls, [pair.key for pair in pairs]

    (_, before), (again, same), (calls, after) = run("1"), run("1"), run("2")
    assert again == [] and same == before
    assert sorted(calls) == ["image_text", "text"]
    assert after[0] == before[0] and after[1] != before[1]


def test_a_file_that_the_teachers_sentence_names_counts_for_every_pair(tmp_path):
    """The student's text does not name it, and what the teacher reads decides the run all the same."""
    cache = ConditionCache(tmp_path)

    def key(contents, sentence):
        encoder = FileReader()
        encoder.contents = contents
        (pair,) = encode_dataset([request()], encoder, cache, teacher=EDIT.with_sentence(sentence))
        return pair.key

    assert key("1", "like embedding:x") == key("1", "like embedding:x") != key("2", "like embedding:x")
    assert key("1", "like that") == key("2", "like that")


def test_a_folder_in_the_place_of_an_entry_costs_the_cache_and_not_the_run(tmp_path, caplog):
    cache, pair, path = stored(tmp_path)
    path.unlink()
    (path / "x").mkdir(parents=True)
    (again,) = encode_dataset([request()], CountingEncoder(), cache)
    assert_same(again, pair)
    assert "cannot be cached" in caplog.text
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_cache_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder belongs")
    cache = ConditionCache(tmp_path / "cache")
    encode_dataset([request(), request(caption="another")], CountingEncoder(), cache)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("conditions cannot be cached" in line and str(tmp_path / "cache") in line for line in warnings) == 1


def test_writers_at_the_same_time_leave_a_whole_entry(tmp_path):
    cache = ConditionCache(tmp_path)
    tensors = {"features": torch.randn(200, 50)}
    threads = [threading.Thread(target=cache.store, args=("k", tensors)) for _ in range(8)]
    for thread in threads:
        thread.start()
    loads = [cache.load("k") for _ in range(30)]
    for thread in threads:
        thread.join()
    assert all(loaded is None or torch.equal(loaded["features"], tensors["features"]) for loaded in loads)
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
    encode_dataset([request(), request(b"file 2"), request(caption="another"), request()], encoder, None)
    assert encoder.calls[:2] == ["latent", "latent"]
    assert sorted(encoder.calls[2:]) == ["image_text"] * 3 + ["text"] * 2
    encoder.calls.clear()
    encode_dataset([request(), request(b"file 2", shown=OTHER)], encoder, None, teacher=EDIT)
    assert encoder.calls == ["latent"] * 3 + ["text"] * 2
    encoder.calls.clear()
    encode_dataset([request(), request(b"file 2", sources=(SOURCE, OTHER))][1:], encoder, None, teacher=EDIT_TARGET)
    assert encoder.calls == ["latent"] * 3 + ["text"] * 2


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
        ("encode_text", Condition(torch.zeros(1, 3, 6)), r"features must be \[L, D\], got \(1, 3, 6\)"),
        ("encode_latent", torch.zeros(1, 4, 2, 2), r"must return \[C, h, w\], got \(1, 4, 2, 2\)"),
        ("encode_latent", torch.full((4, 2, 2), torch.nan), "non-finite latent for an image"),
    ],
)
def test_what_training_could_not_use_is_refused_and_not_cached(tmp_path, method, result, message):
    encoder = CountingEncoder()
    setattr(encoder, method, lambda *args: result)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            encode_dataset([request()], encoder, ConditionCache(tmp_path))


def test_the_entry_is_a_plain_safetensors_file_with_its_key(tmp_path):
    _, _, path = stored(tmp_path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["key"] == path.stem
    assert set(header) == {"__metadata__", "features"}


# -- teachers ----------------------------------------------------------------------------------------------------------


def features_with(teacher, caption="a [V] emblem"):
    return CountingEncoder().encode_text(f"{caption} {teacher.sentence}").features


def latent_of(grey):
    return CountingEncoder().encode_latent(torch.full((3, 8, 8), grey)).float()


def target_of(pair):
    assert pair.target_latent is not None
    return pair.target_latent


def assert_condition(condition, features, *references):
    assert torch.equal(condition.features, features)
    assert len(condition.reference_latents) == len(references)
    assert all(torch.equal(a, b) for a, b in zip(condition.reference_latents, references, strict=True))


def test_the_edit_teacher_has_the_target_as_reference_and_is_asked_to_keep_to_it():
    encoder = CountingEncoder()
    (pair,) = encode_dataset([request()], encoder, None, teacher=EDIT)
    assert_condition(pair.teacher, features_with(EDIT), latent_of(0.25))
    assert_condition(pair.student, encoder.encode_text("a [V] emblem").features)
    assert torch.equal(target_of(pair), latent_of(0.25))


def test_the_teacher_of_an_edit_has_source_and_target_and_its_student_the_source():
    encoder = CountingEncoder()
    (pair,) = encode_dataset([request(sources=(SOURCE, OTHER))], encoder, None, teacher=EDIT_TARGET)
    assert_condition(pair.student, encoder.encode_text("a [V] emblem").features, latent_of(0.5), latent_of(0.75))
    assert_condition(pair.teacher, features_with(EDIT_TARGET), latent_of(0.5), latent_of(0.75), latent_of(0.25))
    assert torch.equal(target_of(pair), latent_of(0.25))


@pytest.mark.parametrize("teacher", [VLM, EDIT])
def test_another_image_is_shown_to_the_teacher_alone(teacher):
    (own,) = encode_dataset([request()], CountingEncoder(), None, teacher=teacher)
    (other,) = encode_dataset([request(shown=OTHER)], CountingEncoder(), None, teacher=teacher)
    assert torch.equal(target_of(own), target_of(other))
    assert torch.equal(own.student.features, other.student.features)
    assert own.key != other.key
    if teacher is VLM:
        assert_condition(other.teacher, CountingEncoder()._draw("a [V] emblem", 144.0, shape=(16, 6)))
    else:
        assert_condition(other.teacher, own.teacher.features, latent_of(0.75))


def test_pairs_share_what_they_have_in_common(tmp_path):
    encoder, cache = CountingEncoder(), ConditionCache(tmp_path)
    requests = [request(sources=(SOURCE,)), request(b"file 2", sources=(SOURCE,))]
    one, two = encode_dataset(requests, encoder, cache, teacher=EDIT_TARGET)
    assert sorted(encoder.calls) == ["latent", "latent", "latent", "text", "text"]
    assert one.teacher.features is two.teacher.features
    assert one.student.reference_latents[0] is two.teacher.reference_latents[0]
    assert one.key != two.key


@pytest.mark.parametrize("changed", [EDIT.with_sentence("Copy it."), EDIT.with_sentence("-"), VLM])
def test_teacher_and_sentence_are_part_of_a_pair(changed):
    (one,) = encode_dataset([request()], CountingEncoder(), None, teacher=EDIT)
    (two,) = encode_dataset([request()], CountingEncoder(), None, teacher=changed)
    assert one.key != two.key
    assert not torch.equal(one.teacher.features, two.teacher.features) if changed.sentence else True


def test_a_sentence_follows_the_caption_and_may_be_left_out():
    assert EDIT.text("a dog") == f"a dog {EDIT.sentence}"
    assert EDIT.text("") == EDIT.sentence
    assert EDIT.with_sentence("  ").text("a dog") == EDIT.text("a dog")
    assert EDIT.with_sentence(" Copy it. ").text("a dog") == "a dog Copy it."
    assert EDIT.with_sentence("-").text("a dog") == "a dog" == VLM.with_sentence("-").text("a dog")
    with pytest.raises(ValueError, match="reads only the caption"):
        VLM.with_sentence("Copy it.")


def test_of_other_images_only_the_subject_is_asked_for():
    assert "background" in EDIT.sentence and "background" not in EDIT.with_sentence("", others=True).text("a dog")
    assert EDIT.with_sentence("", others=True).text("a dog") == f"a dog {EDIT.of_others}"
    assert EDIT.with_sentence("Copy it.", others=True).sentence == "Copy it."
    assert EDIT.with_sentence("-", others=True).sentence == ""
    assert VLM.with_sentence("", others=True) == VLM


def test_a_slider_reads_other_words_and_sees_no_image():
    teacher, encoder = WORDS.with_sentence("emblem -> red emblem"), CountingEncoder()
    (pair,) = encode_dataset([request()], encoder, None, teacher=teacher)
    assert torch.equal(pair.student.features, encoder.encode_text("a [V] emblem").features)
    assert torch.equal(pair.teacher.features, encoder.encode_text("a [V] red emblem").features)
    assert "image_text" not in encoder.calls and teacher.remark == "reads other words"
    (other,) = encode_dataset([request()], CountingEncoder(), None, teacher=WORDS.with_sentence("emblem -> emblems"))
    assert pair.key != other.key


@pytest.mark.parametrize(
    ("sentence", "caption", "text"),
    [
        ("man -> old man", "a man and a woman, man", "a old man and a woman, old man"),
        ("man ->", "a man", "a "),
        ("very old", "a man", "a man very old"),
        ("人->老人", "一个人在雪中", "一个老人在雪中"),
        ("C++ -> C", "C++ in lights", "C in lights"),
        (r"a -> \1", "a man", r"\1 man"),
        ("dog -> cat", "a man", "a man"),
        ("Man -> old man", "a man", "a man"),
        ("man -> old man", "a woman, a policeman, mankind, man2", "a woman, a policeman, mankind, man2"),
        ("caf -> bar", "un café", "un café"),
        ("кот -> рыжий кот", "кот, который спит", "рыжий кот, который спит"),
        ("man -> old man", "一个man站着", "一个old man站着"),
        ("얼굴 -> 웃는 얼굴", "얼굴이 보인다", "웃는 얼굴이 보인다"),
    ],
)
def test_words_are_replaced_whole(sentence: str, caption: str, text: str):
    teacher = WORDS.with_sentence(sentence)
    assert teacher.text(caption) == text and teacher.teaches(caption) == (text != caption)


@pytest.mark.parametrize("sentence", ["", " ", "-", "-> old", "face -> face", " face->face "])
def test_a_slider_without_other_words_is_refused(sentence: str):
    with pytest.raises(ValueError, match="sees no image: write in teacher_sentence what it reads"):
        WORDS.with_sentence(sentence)


@pytest.mark.parametrize(
    ("sentence", "what"),
    [
        ("face → smiling face", "the arrow →"),
        ("face => smiling face", "the arrow =>"),
        ("face ⟶ smiling face", "the arrow ⟶"),
        ("face ➡️ smiling face", "the arrow ➡"),
        ("face -> smiling face, hair -> red hair", "several arrows"),
        ("face -> smiling face\nhair -> red hair", "several arrows"),
    ],
)
def test_an_arrow_that_would_be_read_as_words_is_refused(sentence: str, what: str):
    with pytest.raises(ValueError, match=f"has {what}: write one -> between"):
        WORDS.with_sentence(sentence)
    assert EDIT.with_sentence(sentence).sentence == sentence, "of another teacher it is a sentence"


def test_a_slider_has_no_background():
    with pytest.raises(ValueError, match="sees no image: set teacher_background to keep"):
        WORDS.with_background("grey")
    assert EDIT.with_sentence("face -> smiling face").text("a face") == "a face face -> smiling face"


def test_an_edit_without_a_source_is_refused():
    with pytest.raises(ValueError, match="'edit_target' needs a source image, and 'a .V. emblem' has none"):
        encode_dataset([request()], CountingEncoder(), None, teacher=EDIT_TARGET)


def test_teachers_go_by_their_names():
    assert all(name == teacher.name for name, teacher in TEACHER_VIEWS.items())
