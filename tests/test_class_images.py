"""Class images: drawn by the untouched model first, cached under all that decides them, resumed bit-exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dopsd_core.conditioning.cache import ConditionCache
from dopsd_core.conditioning.encode import Condition
from dopsd_core.config import ConfigError
from dopsd_core.families import Z_IMAGE
from dopsd_core.rollout import euler_step
from dopsd_core.training.checkpoint import StateError
from dopsd_core.training.class_images import ClassImages, plan_class_images
from dopsd_core.training.log import StepReport, read_log
from dopsd_core.training.nonfinite import NonFiniteError
from dopsd_core.training.rng import make_generator
from dopsd_core.training.trainer import NoCallbacks, train
from dopsd_core.training.training_set import TrainingSet
from tests.tiny import make_config, make_data, make_pair, saved_bytes
from tests.toy_denoiser import CHANNELS, FEATURES, TinyDenoiser


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def anchors(count: int = 3) -> list[Condition]:
    return [make_pair(number, seed=7).student for number in range(count)]


def data_with_anchors(count: int = 3) -> TrainingSet:
    return make_data(5, anchors=anchors(count))


def dreambooth(**options: Any) -> Any:
    return make_config(objective="dreambooth", **{"dreambooth_class_images": 6, **options})


def pso(**options: Any) -> Any:
    return make_config(objective="pso", **{"pso_loser_images": 4, **options})


class Host(NoCallbacks):
    """Records the progress, and stops at a class image or a step."""

    def __init__(self, at_image: int = -1, at_step: int = -1) -> None:
        self.at_image, self.at_step = at_image, at_step
        self.drawn: list[tuple[int, int]] = []
        self.step = 0

    def on_class_image(self, done: int, total: int) -> None:
        self.drawn.append((done, total))

    def on_step(self, report: StepReport) -> None:
        self.step = report.step

    def should_stop(self) -> bool:
        is_drawing = bool(self.drawn) and self.drawn[-1][0] == self.at_image and self.step == 0
        return is_drawing or self.step == self.at_step


def stored(folder: Path) -> dict[str, Tensor]:
    """The cached latents by file name."""
    cache = ConditionCache(folder)
    found = {path.stem: cache.load(path.stem) for path in folder.glob("*.safetensors")}
    return {key: entry["latent"] for key, entry in found.items() if entry is not None}


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_they_are_the_untouched_models_samples_in_its_own_steps(tmp_path: Path) -> None:
    """Recomputed here with Euler steps written out, from the documented noise, on the grid of 8 steps."""
    config, data, denoiser = dreambooth(seed=3), data_with_anchors(), TinyDenoiser()
    train(config, denoiser, data, tmp_path)
    found = stored(tmp_path / "class_images")
    order = torch.randperm(3, generator=make_generator(3, "class captions")).tolist()
    planned = plan_class_images(config, data, "", Z_IMAGE.sample_steps)
    assert len(found) == 6
    for number, image in enumerate(planned):
        shape = [(CHANNELS, 2, 3), (CHANNELS, 3, 2)][number % 2]
        x = torch.randn(1, *shape, generator=make_generator(3, "class image", number)).to(denoiser.device)
        sigmas = Z_IMAGE.sigmas(8, 64, 64)
        for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
            with torch.no_grad():
                x0 = denoiser.predict_x0(x, sigma, [data.anchors[order[number % 3]].to(denoiser.device)])
            x = euler_step(x, x0, sigma, sigma_next)
        torch.testing.assert_close(found[image.key], x[0].cpu(), rtol=1e-5, atol=1e-6)


def test_a_loaded_lora_to_start_from_does_not_change_them(tmp_path: Path) -> None:
    """The untouched model draws them, also where training starts from a LoRA."""
    first = train(make_config(steps=4), TinyDenoiser(), data_with_anchors(), tmp_path / "first")
    from dopsd_core.adapters.lora_file import load_lora
    from dopsd_core.adapters.lora_import import import_lora

    lora, _ = load_lora(first.lora_path)
    initial = import_lora(lora, TinyDenoiser().sites(), ("enter", "leave")).tensors
    train(dreambooth(steps=1), TinyDenoiser(), data_with_anchors(), tmp_path / "with", initial=initial)
    train(dreambooth(steps=1), TinyDenoiser(), data_with_anchors(), tmp_path / "without")
    with_lora, without = (stored(tmp_path / run / "class_images") for run in ("with", "without"))
    assert with_lora.keys() == without.keys()
    assert all(torch.equal(with_lora[key], without[key]) for key in without)


def changes() -> dict[str, tuple[Any, TrainingSet, str, int]]:
    """What decides the images: (configuration, data, model, steps), each changed alone."""
    config, data = dreambooth(), data_with_anchors()
    other = replace(data, anchors=[*data.anchors[:2], Condition(torch.zeros(3, FEATURES))])
    shapes = replace(make_data(2, shapes=((4, 4),)), anchors=data.anchors)
    return {
        "nothing": (config, data, "model", 4),
        "the seed": (dreambooth(seed=1), data, "model", 4),
        "the number": (dreambooth(dreambooth_class_images=7), data, "model", 4),
        "the captions": (config, other, "model", 4),
        "the sizes": (config, shapes, "model", 4),
        "the model": (config, data, "another", 4),
        "the grid": (config, data, "model", 5),
        "the family's grid": (dreambooth(family="flux2_klein"), data, "model", 4),
    }


def test_all_that_decides_them_is_in_their_identity(tmp_path: Path) -> None:
    digests = {name: ClassImages(plan_class_images(*facts)).digest for name, facts in changes().items()}
    assert len(set(digests.values())) == len(digests)
    again = ClassImages(plan_class_images(*changes()["nothing"]), 7, ConditionCache(tmp_path / "elsewhere"))
    assert again.digest == digests["nothing"] != ""
    assert plan_class_images(make_config(), data_with_anchors(), "model", 4) == () and ClassImages().digest == ""


def test_what_decides_an_image_decides_its_key() -> None:
    keys = {name: plan_class_images(*facts)[0].key for name, facts in changes().items() if name != "the captions"}
    assert keys.pop("nothing") == keys.pop("the number")  # more images are more of the same
    assert len(set(keys.values())) == len(keys)
    keys_of_captions = [{image.key for image in plan_class_images(*changes()[n])} for n in ("nothing", "the captions")]
    assert len(keys_of_captions[0] & keys_of_captions[1]) == 4  # two of three captions are the same


def test_every_size_of_the_dataset_gets_at_least_one() -> None:
    data = replace(make_data(6, shapes=((2, 2), (2, 3), (3, 2))), anchors=anchors())
    for objective, number in (("pso", 1), ("dreambooth", 2)):
        option = "pso_loser_images" if objective == "pso" else "dreambooth_class_images"
        config = make_config(objective=objective, **{option: number})
        assert {image.shape for image in plan_class_images(config, data, "", 4)} == set(data.shapes())


# -- runs --------------------------------------------------------------------------------------------------------------

RUNS = {
    "dreambooth": dreambooth(batch_size=2, grad_accumulation=2),
    "dreambooth, grid": dreambooth(dreambooth_sigmas="grid", dreambooth_prior_weight=0.5),
    "pso": pso(batch_size=2),
    "pso, dpo": pso(pso_form="dpo", rollout_steps=2),
    "sft with anchors": make_config(objective="sft", sft_anchor_probability=0.5),
    "data states": make_config(states="data", regression_target="ground_truth", anchor_probability=0.3),
    "teacher states": make_config(states="teacher", grad_steps=2, teacher="same"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    config = RUNS[name]
    train(config, TinyDenoiser(), data_with_anchors(), tmp_path / "whole")
    stopped = train(config, TinyDenoiser(), data_with_anchors(), tmp_path / "cut", Host(at_step=5))
    assert stopped.stopped and stopped.step == 5
    assert train(config, TinyDenoiser(), data_with_anchors(), tmp_path / "cut").step == 12
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")


@pytest.mark.parametrize("is_cache_lost", [False, True])
def test_a_run_stopped_while_drawing_continues_where_it_was(tmp_path: Path, is_cache_lost: bool) -> None:
    train(dreambooth(), TinyDenoiser(), data_with_anchors(), tmp_path / "whole")
    first = Host(at_image=4)
    result = train(dreambooth(), TinyDenoiser(), data_with_anchors(), tmp_path / "cut", first)
    assert result.stopped and result.step == 0
    assert first.drawn == [(number, 6) for number in range(5)]
    if is_cache_lost:
        for path in (tmp_path / "cut" / "class_images").iterdir():
            path.unlink()
    second = Host()
    train(dreambooth(), TinyDenoiser(), data_with_anchors(), tmp_path / "cut", second)
    assert second.drawn == [(number, 6) for number in range(0 if is_cache_lost else 4, 7)]
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")


def test_a_finished_run_draws_nothing_and_a_longer_one_takes_them_from_the_cache(tmp_path: Path) -> None:
    train(dreambooth(), TinyDenoiser(), data_with_anchors(), tmp_path)
    again, longer = Host(), Host()
    train(dreambooth(), TinyDenoiser(), data_with_anchors(), tmp_path, again)
    train(dreambooth(steps=14), TinyDenoiser(), data_with_anchors(), tmp_path, longer)
    assert (again.drawn, longer.drawn, longer.step) == ([], [(6, 6)], 14)


def test_runs_on_a_known_model_share_a_cache_and_others_do_not(tmp_path: Path) -> None:
    cache = ConditionCache(tmp_path / "cache")
    facts = {"dopsd_base_fingerprint": "model"}
    hosts = [Host() for _ in range(3)]
    for run, host in enumerate(hosts[:2]):
        config = dreambooth(steps=1, lr=1e-3 * (run + 1))
        train(config, TinyDenoiser(), data_with_anchors(), tmp_path / str(run), host, facts=facts, cache=cache)
    train(dreambooth(steps=1), TinyDenoiser(1), data_with_anchors(), tmp_path / "unknown", hosts[2], cache=cache)
    assert [len(host.drawn) for host in hosts] == [7, 1, 7]
    assert len(stored(tmp_path / "cache")) == 6
    assert len(stored(tmp_path / "unknown" / "class_images")) == 6


def test_a_run_with_other_class_images_is_refused(tmp_path: Path) -> None:
    train(dreambooth(steps=3), TinyDenoiser(), data_with_anchors(), tmp_path)
    with pytest.raises(StateError, match=r"the class images: .*sampling steps"):
        train(dreambooth(steps=5), TinyDenoiser(), data_with_anchors(), tmp_path, sample_steps=4)
    with pytest.raises(StateError, match="dreambooth_class_images: 6 -> 7"):
        train(dreambooth(steps=5, dreambooth_class_images=7), TinyDenoiser(), data_with_anchors(), tmp_path)


def test_class_images_shape_the_training(tmp_path: Path) -> None:
    """Other images, everything else the same: other weights; and the log has both losses."""
    for steps in (4, 8):
        train(dreambooth(), TinyDenoiser(), data_with_anchors(), tmp_path / str(steps), sample_steps=steps)
    assert saved_bytes(tmp_path / "4") != saved_bytes(tmp_path / "8")
    _, *reports = read_log(tmp_path / "4" / "train.jsonl")
    for report in reports:
        assert report.loss == pytest.approx(report.metrics["concept_loss"] + report.metrics["prior_loss"])


def test_the_network_is_untouched_afterwards(tmp_path: Path) -> None:
    denoiser = TinyDenoiser()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    train(pso(), denoiser, data_with_anchors(), tmp_path, Host(at_image=2))
    train(pso(), denoiser, data_with_anchors(), tmp_path)
    assert all(torch.equal(before[name], value) for name, value in denoiser.state_dict().items())
    assert "forward" not in denoiser.enter.__dict__


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [dreambooth(), pso()])
def test_without_anchor_captions_it_is_refused_before_any_work(config: Any, tmp_path: Path) -> None:
    denoiser = TinyDenoiser()
    with pytest.raises(ConfigError, match=f"objective {config.objective.name} draws class images from the anchor"):
        train(config, denoiser, make_data(), tmp_path)
    assert denoiser.calls == 0 and not (tmp_path / "config.json").exists()


def test_sft_with_anchors_is_refused_without(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sft_anchor_probability is above 0, but there are no anchor captions"):
        train(make_config(objective="sft", sft_anchor_probability=0.1), TinyDenoiser(), make_data(), tmp_path)


def test_pso_refuses_edits(tmp_path: Path) -> None:
    pair = make_pair(0)
    source = replace(pair.student, reference_latents=(torch.zeros(CHANNELS, 2, 3),))
    data = TrainingSet([replace(pair, student=source)], anchors=anchors())
    with pytest.raises(ConfigError, match="objective pso does not train edits"):
        train(pso(), TinyDenoiser(), data, tmp_path)


def test_images_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    denoiser = TinyDenoiser()
    denoiser.poison_at = 12
    with pytest.raises(NonFiniteError, match="class image of step 0 is nan"):
        train(dreambooth(), denoiser, data_with_anchors(), tmp_path)
    assert len(stored(tmp_path / "class_images")) == 1
