"""Several concepts in one dataset: each image its own trigger, teacher images and gaps by concept, one LoRA."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dopsd_core import TrainConfig, train
from dopsd_core.adapters import Lora
from dopsd_core.data.caption_folder import caption_folder
from dopsd_core.data.captioning import CaptionOptions
from dopsd_core.data.dataset import DatasetReport, read_dataset
from dopsd_core.data.encoding_plan import Example, plan_encoding
from dopsd_core.objectives import DOPSD
from dopsd_core.optimizers import AdamW, Constant
from dopsd_core.sharing.model_spec import Description, concepts_in, spec_header, trigger_facts, trigger_of
from dopsd_core.standalone.hosts.demo import load_demo_model
from dopsd_core.training.log import LOG_NAME, Gaps, gaps_by_concept, read_log
from dopsd_core.training.probe import probed_examples
from dopsd_core.training.regularisation import check_regularisation
from dopsd_core.training.shown_images import pair_of_prompt, shown_to_teacher
from dopsd_core.training.training_set import build_training_set


def write(folder: Path, captions: dict[str, str], trigger: str | None = None, shade: int = 0) -> None:
    """Images of 64 x 64 with these captions by name, and the folder's trigger."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, text) in enumerate(captions.items()):
        gradient = Image.linear_gradient("L").resize((64, 64))
        Image.merge("RGB", [gradient, gradient.rotate(90), Image.new("L", (64, 64), shade + 20 * number)]).save(
            folder / f"{name}.png"
        )
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    if trigger is not None:
        (folder / "trigger.txt").write_text(trigger, encoding="utf-8")


def read(source: Path, trigger: str = "") -> DatasetReport:
    return read_dataset(source, pixel_budget=64 * 64, multiple=16, trigger=trigger)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A dog and a cat in folders of their own, each with two images."""
    folder = tmp_path / "pets"
    write(folder / "10_dog", {"a": "a [V] dog on grass", "b": "an ohwx dog, asleep"}, " ohwx \n")
    write(folder / "cat", {"c": "a [V] cat on a mat", "d": "a [v] cat beside an ohwx dog"}, "sks", shade=100)
    return folder


def test_each_folder_has_its_trigger(pets: Path) -> None:
    report = read(pets)
    assert not report.errors and not report.warnings
    captions = {pair.image_path.stem: (pair.trigger, pair.captions[0]) for pair in report.pairs}
    assert captions == {
        "a": ("ohwx", "a ohwx dog on grass"),
        "b": ("ohwx", "an ohwx dog, asleep"),
        "c": ("sks", "a sks cat on a mat"),
        "d": ("sks", "a sks cat beside an ohwx dog"),
    }
    assert report.concepts == ("ohwx", "sks") and report.trigger_in_prompts("") == ""
    assert "2 of the concept ohwx" in report.describe() and "2 of the concept sks" in report.describe()


def test_the_nearest_folder_counts_and_the_given_trigger_is_for_the_rest(pets: Path) -> None:
    write(pets / "cat" / "kitten", {"e": "a [V] kitten"}, "zwx", shade=50)
    write(pets / "cat" / "close", {"f": "a [V] cat, close"}, shade=60)
    write(pets, {"g": "a [V] bird"}, shade=70)
    found = {pair.image_path.stem: pair.trigger for pair in read(pets, "given").pairs}
    assert found == {"a": "ohwx", "b": "ohwx", "c": "sks", "d": "sks", "e": "zwx", "f": "sks", "g": "given"}


def test_one_trigger_in_the_folder_itself_is_the_datasets(tmp_path: Path) -> None:
    write(tmp_path / "photos", {"a": "a [V] dog", "b": "my dog"}, "ohwx")
    report = read(tmp_path / "photos")
    assert report.concepts == ("ohwx",) and report.trigger_in_prompts("") == "ohwx"
    (warning,) = report.warnings
    assert "lacks the trigger 'ohwx'" in str(warning)


def test_rows_name_their_triggers(pets: Path) -> None:
    rows = [
        {"path": "10_dog/a.png", "caption": "a [V] dog", "trigger": "ohwx"},
        {"path": "cat/c.png", "caption": "a [V] cat", "trigger": "sks"},
        {"path": "cat/d.png", "caption": "a [V] bird", "trigger": ""},
    ]
    (pets / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = read(pets / "rows.jsonl", "given")
    assert not report.problems
    assert [pair.captions[0] for pair in report.pairs] == ["a ohwx dog", "a sks cat", "a given bird"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "the trigger is empty: write a word such as ohwx"),
        (b"ohwx\nsks", "more than a few words"),
        (b"a caption that somebody wrote for an image which is no longer there, " * 2, "more than a few words"),
        (b"caf\xe9", "is not UTF-8"),
        (b"oh\x01wx", "contains the control character U+0001"),
        (b"ohwx [v]", "the trigger contains [V], which stands for it: write a word such as ohwx"),
    ],
)  # fmt: skip
def test_a_trigger_that_cannot_be_one_is_an_error(pets: Path, text: bytes, sentence: str) -> None:
    (pets / "cat" / "trigger.txt").write_bytes(text)
    (error,) = read(pets).errors
    assert error.file == pets / "cat" / "trigger.txt" and sentence in error.message


def test_a_given_trigger_that_no_image_has_is_not_what_prompts_mean(pets: Path, tmp_path: Path) -> None:
    report = read(pets, "tok")
    assert [str(warning) for warning in report.warnings] == [
        f"warning: {pets}: the trigger 'tok' is not used: all images have their own (ohwx, sks)"
    ]
    assert report.trigger_in_prompts("tok") == "" and report.trigger_in_prompts("SKS") == "SKS"
    write(tmp_path / "one", {"a": "a [V] dog"}, "ohwx")
    one = read(tmp_path / "one", "tok")
    assert one.trigger_in_prompts("tok") == "ohwx" and "'tok' is not used" in one.warnings[0].message
    assert not read(tmp_path / "one", "OHWX").warnings
    write(tmp_path / "two", {"a": "a [V] dog"})
    assert read(tmp_path / "two", "tok").trigger_in_prompts("tok") == "tok"


def test_a_folder_without_a_trigger_beside_one_with_it_is_an_error(pets: Path) -> None:
    (pets / "cat" / "trigger.txt").rename(pets / "cat" / "words.txt")
    (error,) = read(pets).errors
    assert error.file == pets / "cat" / "c.txt"
    assert error.message == (
        "[V] stands for nothing here, while other images have a trigger: write one for the folder cat, as trigger.txt, "
        "or give the trigger of all images without their own"
    )
    assert not read(pets, "tok").errors
    (pets / "cat" / "words.txt").rename(pets / "cat" / "Trigger.TXT")
    assert not read(pets).errors and read(pets).concepts == ("ohwx", "sks")


def test_rows_without_a_trigger_beside_one_with_it_are_an_error(pets: Path) -> None:
    rows = [
        {"file_name": "10_dog/a.png", "text": "a [V] dog", "trigger": "ohwx"},
        {"file_name": "cat/c.png", "text": "a [V] cat"},
        {"file_name": "cat/d.png", "text": "a cat"},
    ]
    (pets / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (error,) = read(pets / "rows.jsonl").errors
    assert (error.file.name, error.line) == ("rows.jsonl", 2) and "write one for each row, or give" in error.message


def test_a_trigger_from_outside_is_not_read(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (pets / "cat" / "trigger.txt").unlink()
    (pets / "cat" / "trigger.txt").symlink_to(tmp_path / "secret.txt")
    report = read(pets)
    assert "is outside of the folder" in str(report.errors[0]) and "secret" not in report.concepts


def test_the_caption_of_an_image_named_trigger_is_a_caption(tmp_path: Path) -> None:
    write(tmp_path / "guns", {"trigger": "a [V] trigger", "b": "a [V] barrel"})
    report = read(tmp_path / "guns", "ohwx")
    assert not report.problems and report.concepts == ("ohwx",)
    (row,) = [{"path": "b.png", "caption": "a", "trigger": 3}]
    (tmp_path / "guns" / "rows.jsonl").write_text(json.dumps(row))
    assert "'trigger': is 3, it must be text" in str(read(tmp_path / "guns" / "rows.jsonl").errors[0])


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_anchors_name_no_concept(pets: Path) -> None:
    plan = plan_encoding(read(pets).pairs)
    assert plan.anchors == ("a dog on grass", "an dog, asleep", "a cat on a mat", "a cat beside an dog")
    assert [example.concept for example in plan.examples] == ["ohwx", "ohwx", "sks", "sks"]


def test_one_concept_has_the_identity_that_it_always_had(tmp_path: Path) -> None:
    """A run's identity contains the text of its examples."""
    write(tmp_path, {"a": "a [V] dog", "b": "a [V] dog, asleep"}, "ohwx")
    (first, _) = plan_encoding(read(tmp_path).pairs).examples
    assert first.concept == "" and repr(first) == "Example(variants=(0,), dropped=None, repeats=1)"
    assert repr(Example((0,), None, 1, "ohwx")) == repr(first)


def test_the_teacher_sees_images_of_the_same_concept(pets: Path) -> None:
    pairs = read(pets).pairs
    for index, pair in enumerate(pairs):
        (shown,) = shown_to_teacher(pairs, index, "other")
        assert shown is not pair and shown.trigger == pair.trigger
    assert [pair_of_prompt(pairs, "a sks cat", number) for number in range(3)] == [2, 3, 2]
    assert [pair_of_prompt(pairs, "a house", number) for number in range(5)] == [0, 1, 2, 3, 0]
    alone = replace(pairs[0], trigger="zwx")
    with pytest.raises(ValueError, match="teacher_image other needs at least two images of zwx"):
        build_training_set([alone, *pairs], load_demo_model().encoder, teacher_image="other")


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ({"anchor_prompts": ["a house", "a [V] house"]}, "anchor prompt 2: .V. may stand for any of ohwx, sks"),
        ({"heldout_caption": "a [v] house"}, "held-out caption 1: .V. may stand for any of"),
    ],
)
def test_a_placeholder_that_may_stand_for_several_is_refused(pets: Path, prompts, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_training_set(read(pets).pairs, load_demo_model().encoder, **prompts)


def test_ordinary_captions_that_name_any_concept_are_pointed_out(pets: Path, tmp_path: Path) -> None:
    write(tmp_path / "ordinary", {"x": "a sks cat", "y": "a tree"}, shade=50)
    (remark,) = check_regularisation(read(tmp_path / "ordinary").pairs, read(pets).pairs, "")
    assert "x.png: its caption names the concept" in remark


def test_probes_take_the_concepts_in_turn() -> None:
    examples = [Example((i,), concept=name) for i, name in enumerate("aaab")]
    assert [example.variants[0] for example in probed_examples(examples, 3)] == [0, 3, 1]
    assert [example.variants[0] for example in probed_examples(examples, 1)] == [0, 3]  # one of each
    single = [Example((i,)) for i in range(4)]
    assert probed_examples(single, 2) == single[:2]


def test_gaps_are_reported_by_concept_and_survive_a_resume(pets: Path, tmp_path: Path) -> None:
    model = load_demo_model()
    data = build_training_set(read(pets).pairs, model.encoder, anchors=True, heldout_caption="a sks cat in snow")
    config = TrainConfig(
        steps=2, rollout_steps=1, probe_every=1, probe_pairs=2, adapter=Lora(rank=2), checkpoint_every=1,
        optimizer=AdamW(lr=2e-3), schedule=Constant(warmup=0), objective=DOPSD(anchor_probability=0.0),
    )  # fmt: skip
    train(config.replace(steps=1), model.denoiser, data, tmp_path / "run")
    train(config, model.denoiser, data, tmp_path / "run")
    reports = read_log(tmp_path / "run" / LOG_NAME)
    found = [gaps_by_concept(report.metrics) for report in reports]
    assert found[0] == {"ohwx": 1.0, "sks": 1.0}
    assert all(gaps.keys() == {"ohwx", "sks"} for gaps in found) and found[1] != found[0] != found[2]
    starts = reports[0].metrics["gap"]
    assert starts > 0 and reports[2].relative_gap is not None
    low, high = sorted(found[2].values())
    assert low - 1e-9 <= reports[2].relative_gap <= high + 1e-9  # a weighted mean of the two


def test_gaps_of_older_checkpoints_are_read() -> None:
    assert Gaps.from_json([0.5, None]) == Gaps(0.5, None)
    both = Gaps(0.5, 0.7, (("ohwx", 0.4), ("sks", 0.6)))
    assert Gaps.from_json(json.loads(json.dumps([0.5, 0.7, [["ohwx", 0.4], ["sks", 0.6]]]))) == both
    assert gaps_by_concept(both.metrics_of_concepts(Gaps(1.0, 1.0, (("ohwx", 0.8), ("sks", 0.6))))) == {
        "ohwx": 0.5,
        "sks": 1.0,
    }


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_header_names_all_triggers() -> None:
    facts = trigger_facts("", ("ohwx", "sks"))
    header = spec_header(facts, Description(), "pets", is_diffusers=True)
    assert trigger_of(header) == "ohwx, sks" and concepts_in(header) == ("ohwx", "sks")
    assert header["modelspec.usage_hint"] == "Trigger words: ohwx, sks"
    assert json.loads(header["trained_words"]) == ["ohwx", "sks"]
    assert (
        trigger_facts("ohwx", ("ohwx",)) == {"dopsd_trigger": "ohwx"} and concepts_in({"dopsd_trigger": "a, b"}) == ()
    )
    assert concepts_in({"dopsd_concepts": "{"}) == concepts_in({"dopsd_concepts": "[1]"}) == ()


def test_captions_are_checked_for_the_trigger_of_their_folder(pets: Path) -> None:
    found = caption_folder(pets, CaptionOptions(), None)
    assert [item.trigger for item in found.items] == ["ohwx", "ohwx", "sks", "sks"]
    assert not any("lacks" in remark for remark in found.remarks())
    (pets / "cat" / "trigger.txt").write_text("zwx")
    (pets / "cat" / "c.txt").write_text("a sks cat")
    assert any(
        "c.png: the caption lacks" in remark for remark in caption_folder(pets, CaptionOptions(), None).remarks()
    )


# -- triggers that prompts cannot tell apart ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("ohwx", "OHWX", "the trigger 'OHWX' differs from 'ohwx' in case only: they count as one concept"),
        ("sks", "sks dog", "the trigger 'sks' is a part of the trigger 'sks dog'"),
        ("dog", "zwx", "every caption of the concept 'zwx' contains 'dog', the trigger of another concept"),
        ("sks", "asks", ""),
        ("zwx", "mat", ""),  # one caption in two has the word
    ],
)
def test_triggers_that_prompts_cannot_tell_apart_are_warned_about(
    tmp_path: Path, first: str, second: str, said: str
) -> None:
    write(tmp_path / "one", {"a": "a [V] cat on a mat", "b": "a [V] cat"}, first)
    write(tmp_path / "two", {"c": "a [V] beside a dog", "d": "a [V] and a dog"}, second, shade=100)
    warnings = [str(problem) for problem in read(tmp_path).warnings]
    assert len(warnings) == bool(said) and said in "".join(warnings)


def test_the_longer_of_two_triggers_in_a_prompt_is_meant(tmp_path: Path) -> None:
    write(tmp_path / "one", {"a": "a [V] cat", "b": "a [V] cat, close"}, "sks")
    write(tmp_path / "two", {"c": "a [V] in the snow"}, "sks dog", shade=100)
    pairs = read(tmp_path).pairs
    assert pairs[pair_of_prompt(pairs, "a sks dog on a chair", 0)].image_path.stem == "c"
    assert pairs[pair_of_prompt(pairs, "a sks on a chair", 0)].trigger == "sks"
    assert plan_encoding(pairs).anchors == ("a cat", "a cat, close", "a in the snow")
