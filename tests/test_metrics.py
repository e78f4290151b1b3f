"""The paper's metrics on tiny random weights: equal to the library called directly, and what is missing is said."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dopsd_core.image_grid import to_images
from dopsd_core.metrics.clip_score import CLIP, ClipScore
from dopsd_core.metrics.dino import DINO, DinoDistance
from dopsd_core.metrics.fid import FrechetInceptionDistance
from dopsd_core.metrics.lpips_distance import LpipsDistance
from dopsd_core.metrics.needs import MetricUnavailable, Needs
from dopsd_core.metrics.preference_score import HumanPreferenceScore
from dopsd_core.metrics.sharpness import laplacian_energy, relative_sharpness
from dopsd_core.metrics.vlm import TransformersVlm
from dopsd_core.metrics.vlm_questions import INSTANCE, QUESTIONS, STYLE, VlmJudge

from . import metric_weights as weights
from .metric_weights import image, need


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may use the network."""
    import socket

    def refused(*_: object, **__: object) -> None:
        raise OSError("the test tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


# -- DINO-D ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    return weights.dino(tmp_path_factory.mktemp("weights") / "dino")


def test_dino_is_the_mean_of_the_patch_tokens_of_the_library(dino_folder) -> None:
    from transformers import AutoModel

    source, generated = image(1, 30, 80), image(2, 48, 64)
    model = AutoModel.from_pretrained(dino_folder).eval()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    features = []
    for pixels in (F.interpolate(source[None], (48, 64), mode="bicubic", antialias=True)[0].clamp(0, 1), generated):
        with torch.no_grad():
            tokens = model(pixel_values=((pixels - mean) / std)[None]).last_hidden_state[0]
        assert len(tokens) == 1 + 4 + 3 * 4  # class, registers, patches
        features.append(tokens[5:].mean(0))
    wanted = 1 - F.cosine_similarity(*features, dim=0)
    distance = DinoDistance.load(dino_folder)
    assert distance(source, generated) == pytest.approx(float(wanted), abs=1e-6)
    assert distance(source, generated) > 1e-4
    assert distance(generated, generated) == pytest.approx(0, abs=1e-6)


def test_dino_reads_the_whole_source_without_a_crop(dino_folder) -> None:
    source = torch.zeros(3, 48, 96)
    source[..., :8] = 1  # a crop to the middle would not see it
    generated = torch.zeros(3, 48, 48)
    assert DinoDistance.load(dino_folder)(source, generated) > 1e-5


# -- LPIPS-D -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_lpips_is_the_library_with_the_same_vgg(tmp_path) -> None:
    need("torchvision", "lpips", "torchmetrics")
    from safetensors.torch import load_file
    from torchmetrics.functional.image.lpips import _LPIPS

    file = weights.vgg(tmp_path / "vgg16.safetensors")
    other = _LPIPS(pretrained=True, net="vgg", pnet_rand=True, eval_mode=True)  # a second implementation
    wanted = {name: name.split(".", 1)[1] for name in other.net.state_dict()}
    tensors = load_file(file)
    other.net.load_state_dict({name: tensors[f"features.{rest}"] for name, rest in wanted.items()})
    source, generated = image(1, 70, 40), image(2, 64, 64)
    resized = F.interpolate(source[None], (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = float(other(resized * 2 - 1, generated[None] * 2 - 1))
    for given in (file, tmp_path):
        distance = LpipsDistance.load(given)
        assert distance(source, generated) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01 and distance(generated, generated) == pytest.approx(0, abs=1e-7)


def test_lpips_refuses_other_weights(tmp_path) -> None:
    need("torchvision", "lpips")
    from safetensors.torch import save_file

    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(MetricUnavailable, match=r"other.safetensors has no features.0.weight; give torchvision's VGG"):
        LpipsDistance.load(tmp_path / "other.safetensors")


# -- CLIP-S ------------------------------------------------------------------------------------------------------------


def test_clip_is_the_raw_cosine_of_the_library(tmp_path) -> None:
    need("torchvision", "open_clip")
    import open_clip

    folder = weights.clip(tmp_path / "clip")
    name = f"local-dir:{folder}"
    made: Any = open_clip.create_model_and_transforms(name)
    model, _, preprocess = made
    model.eval()
    sample, prompt = image(1, 40, 60), "a dog in the snow"
    with torch.no_grad():
        seen = model.encode_image(preprocess(to_images([sample])[0])[None])[0]
        read = model.encode_text(open_clip.get_tokenizer(name)([prompt]))[0]
    wanted = float(seen @ read / seen.norm() / read.norm())
    score = ClipScore.load(folder)
    assert score(sample, prompt) == pytest.approx(wanted, abs=1e-5)
    assert score(sample, "a red bicycle") != pytest.approx(wanted, abs=1e-5)


# -- FID ---------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_fid_is_the_closed_form_on_the_librarys_features(tmp_path) -> None:
    need("torchmetrics", "torch_fidelity")
    from torchmetrics.image.fid import NoTrainInceptionV3

    file = weights.inception(tmp_path / "pt_inception-random.pth")
    real = [image(i, 64, 64) for i in range(3)]
    made = [image(10 + i, 64, 64) * 0.5 for i in range(3)]
    got = FrechetInceptionDistance.load(file)(real, made)
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))

    def features(images):
        with torch.no_grad():
            return network((torch.stack(images) * 255).byte()).double()

    ours, theirs = features(real), features(made)
    one, two = (f - f.mean(0) for f in (ours, theirs))
    root = torch.linalg.matrix_norm(one @ two.T, "nuc") / 2  # tr (AB)^(1/2) of covariances of rank two
    spread = (one.square().sum() + two.square().sum()) / 2
    wanted = float((ours.mean(0) - theirs.mean(0)).square().sum() + spread - 2 * root)
    assert wanted > 1e-6 and got == pytest.approx(wanted, rel=0.02)
    assert FrechetInceptionDistance.load(tmp_path)(real, real) == pytest.approx(0, abs=0.02 * wanted)


def test_fid_with_small_features_is_the_closed_form() -> None:
    need("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance as Metric

    from dopsd_core.standalone.judge import frechet_distance

    class Mean(torch.nn.Module):
        num_features = 3

        def forward(self, x):
            return x.float().mean((2, 3))

    real = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    made = [0.5 * torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(99 + i)) for i in range(40)]
    got = FrechetInceptionDistance(Metric(feature=Mean(), normalize=True))(real, made)
    features = [torch.stack([i.mean((1, 2)) for i in part]).double() for part in (real, made)]
    assert got == pytest.approx(frechet_distance(*features), rel=1e-3)
    with pytest.raises(ValueError, match="FID needs at least two generated images, there are 1"):
        FrechetInceptionDistance(Metric(feature=Mean(), normalize=True))(real, made[:1])


def test_fid_does_not_unpickle_code(tmp_path) -> None:
    need("torchmetrics", "torch_fidelity")
    ran = []

    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"x": Evil()}, tmp_path / "pt_inception.pth")
    with pytest.raises(MetricUnavailable, match="is not a file of weights"):
        FrechetInceptionDistance.load(tmp_path / "pt_inception.pth")
    assert not ran


# -- VLM-J -------------------------------------------------------------------------------------------------------------


def test_a_vlm_answers_as_the_library_does(tmp_path) -> None:
    need("torchvision")
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    folder = weights.qwen3_vl(tmp_path / "vlm")
    images = [image(1, 64, 64), image(2, 64, 32)]
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    text = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "Which?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor(text=[text], images=to_images(images), return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    wanted = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = TransformersVlm.load(folder)(images, "Which?")
    assert answer == wanted and len(answer) > 0
    assert TransformersVlm.load(folder)(images[::-1], "Which?") is not None
    grade = VlmJudge(TransformersVlm.load(folder))(*images)
    assert math.isnan(grade) or 1 <= grade <= 4


@pytest.mark.parametrize(
    ("question", "answer", "grade"),
    [
        (INSTANCE, "SAME INSTANCE", 4),
        (INSTANCE, "The subject is mostly the same.", 3),
        (INSTANCE, "partly similar", 2),
        (INSTANCE, "Label: DIFFERENT INSTANCE, not the same instance", 1),
        (INSTANCE, "yes", None),
        (STYLE, "Highly consistent", 4),
        (STYLE, "mostly consistent", 3),
        (STYLE, "slightly consistent", 2),
        (STYLE, "not consistent", 1),
        (STYLE, "consistent", None),
    ],
)
def test_answers_are_graded_by_their_first_label(question, answer, grade) -> None:
    assert question.grade(answer) == grade


def test_the_judge_shows_source_and_generated_image_in_this_order() -> None:
    asked = []

    def ask(images, text):
        asked.append((images, text))
        return "MOSTLY CONSISTENT"

    source, generated = image(1), image(2)
    assert VlmJudge(ask, "style")(source, generated) == 3
    ((images, text),) = asked
    assert images[0] is source and images[1] is generated and text == QUESTIONS["style"].text
    assert all(label in text for label in STYLE.labels)
    assert math.isnan(VlmJudge(lambda images, text: "no idea")(source, generated))


# -- HPSv3 -------------------------------------------------------------------------------------------------------------


def test_hpsv3_is_called_as_its_package_says(tmp_path, monkeypatch) -> None:
    made = {}

    class Inferencer:
        def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
            made.update(config=config_path, checkpoint=checkpoint_path, device=device)

        def reward(self, image_paths, prompts):
            made.update(size=image_paths[0].size, prompts=prompts)
            return torch.tensor([[7.5, 0.3]])

    package = types.ModuleType("hpsv3")
    package.HPSv3RewardInferencer = Inferencer  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "hpsv3", package)
    (tmp_path / "HPSv3.safetensors").touch()
    score = HumanPreferenceScore.load(tmp_path)
    assert score(image(1, 32, 48), "a dog") == 7.5
    assert made == {
        "config": None, "checkpoint": str(tmp_path / "HPSv3.safetensors"), "device": "cpu", "size": (48, 32),
        "prompts": ["a dog"],
    }  # fmt: skip


def test_hpsv3_names_its_package(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "hpsv3", None)
    with pytest.raises(
        MetricUnavailable, match="HPSv3 needs packages that cannot be imported here .*pip install hpsv3"
    ):
        HumanPreferenceScore.load(tmp_path)


# -- what is missing ---------------------------------------------------------------------------------------------------


def test_weights_that_are_nowhere_are_named(tmp_path) -> None:
    with pytest.raises(
        MetricUnavailable, match="DINO-D: there are no weights at .*nowhere; give the folder or file of"
    ):
        DINO.weights(tmp_path / "nowhere")


def test_a_hub_id_is_not_downloaded_unasked(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        MetricUnavailable, match="facebook/dinov3.* are not on this machine; run `hf download facebook/"
    ):
        DinoDistance.load(DINO.hub_id)


def test_a_folder_without_its_configuration_is_named(tmp_path) -> None:
    with pytest.raises(MetricUnavailable, match="has no config.json; give the whole folder of facebook/dinov3"):
        DinoDistance.load(tmp_path)
    need("torchvision", "open_clip")
    with pytest.raises(MetricUnavailable, match=f"has no open_clip_config.json; give the folder of {CLIP.hub_id}"):
        ClipScore.load(tmp_path)


def test_an_empty_folder_is_named(tmp_path) -> None:
    needs = Needs("X", "x", "owner/x")
    with pytest.raises(MetricUnavailable, match=r"X: the folder .* has no file \*.bin or \*.pth; download owner/x"):
        needs.file_in(tmp_path, "*.bin", "*.pth")


def test_a_missing_package_is_one_sentence(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MetricUnavailable, match="LPIPS-D needs packages .*: pip install lpips torchvision"):
        LpipsDistance.load(tmp_path)


# -- sharpness ---------------------------------------------------------------------------------------------------------


def test_laplacian_energy_by_hand() -> None:
    dot = torch.zeros(1, 3, 5, 5)
    dot[..., 2, 2] = 1
    # on the inner 3 x 3: 4 in the middle, 1 at its four neighbours
    assert float(laplacian_energy(dot)) == pytest.approx(8 / 9)
    sharp = (torch.arange(16)[None, None] % 4 < 2).float().expand(3, 16, 16)
    blurred = F.avg_pool2d(sharp[None], 3, 1, 1)[0]
    assert relative_sharpness(sharp, sharp) == pytest.approx(1)
    assert relative_sharpness(blurred, sharp) < 0.7
