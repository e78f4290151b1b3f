"""Images that the untouched model draws before training, for DreamBooth's prior and PSO's losers.

They are drawn from the anchor captions in the model's own few steps, one at a time: image i is a function of (model,
seed, i, its caption, its shape, its grid) only, so drawing can be interrupted and resumed in the same bits. Each is
cached under all of these, like conditions. The images are divided over the latent shapes of the dataset, at least one
for each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditioning.cache import ConditionCache, cache_key, plain_cpu
from ..conditioning.encode import Condition
from ..config import TrainConfig
from ..denoiser import Denoiser
from ..families import get_family
from ..objectives import ClassImage
from ..rollout import sample
from .nonfinite import NonFiniteError, remedy
from .rng import make_generator
from .training_set import TrainingSet

OnDrawn = Callable[[int, int], bool]
"""(number done, total) -> whether to continue; called before each image that is not cached and after the last one."""


@dataclass(frozen=True)
class PlannedImage:
    """An image to draw.

    Attributes:
        number: its index, which seeds its noise.
        anchor: index of the anchor that it is drawn from.
        shape: (C, h, w) of its latent.
        sigmas: the grid.
        key: of its cache entry; it changes with everything that decides the image.
    """

    number: int
    anchor: int
    shape: tuple[int, ...]
    sigmas: tuple[float, ...]
    key: str


def plan_class_images(config: TrainConfig, data: TrainingSet, model: str, steps: int) -> tuple[PlannedImage, ...]:
    """The images that the objective needs; none if it needs none, if there are no anchors, or if it is given some.

    Args:
        model: fingerprint of the base model.
        steps: number of steps that the model was distilled for.
    """
    if not config.objective.drawn_images or not data.anchors or given_images(config, data):
        return ()
    shapes = tuple(dict.fromkeys(data.shapes()))
    order = torch.randperm(len(data.anchors), generator=make_generator(config.seed, "class captions")).tolist()
    digests = [_digest(anchor) for anchor in data.anchors]
    planned = []
    for number in range(max(config.objective.drawn_images, len(shapes))):
        anchor, shape = order[number % len(order)], shapes[number % len(shapes)]
        sigmas = get_family(config.family).grid(steps, shape)
        facts = {"seed": config.seed, "number": number, "shape": list(shape), "sigmas": list(sigmas)}
        key = cache_key("class image", "", digests[anchor], model, facts)
        planned.append(PlannedImage(number, anchor, shape, sigmas, key))
    return tuple(planned)


def given_images(config: TrainConfig, data: TrainingSet) -> Sequence[ClassImage]:
    """The regularisation images, if the objective takes them in place of drawn ones."""
    return data.regularisation if config.objective.takes_regularisation else ()


class ClassImages:
    """The class images of a run: which ones it needs, and the images after `draw`.

    Args:
        planned: as from `plan_class_images`.
        seed: the run's seed.
        cache: drawn images are kept there; None keeps none.
        given: images that are there already, in place of planned ones.

    Attributes:
        digest: identifies the set, with the number and order of the images; "" if none are needed.
        images: the images; the drawn ones only after `draw`.
    """

    def __init__(
        self,
        planned: Sequence[PlannedImage] = (),
        seed: int = 0,
        cache: ConditionCache | None = None,
        given: Sequence[ClassImage] = (),
    ) -> None:
        self._planned, self._seed, self._cache = tuple(planned), seed, cache
        keys = "".join(image.key for image in self._planned)
        self.digest = hashlib.sha256(keys.encode()).hexdigest() if keys else ""
        self.images: tuple[ClassImage, ...] = tuple(given)

    def cached(self) -> frozenset[str]:
        """The keys of the planned images that are in the cache."""
        return frozenset(image.key for image in self._planned if self._cached(image.key) is not None)

    def _cached(self, key: str) -> dict[str, Tensor] | None:
        return self._cache.load(key) if self._cache is not None else None

    def draw(
        self,
        conditions: Sequence[Condition],
        denoiser: Denoiser,
        on_drawn: OnDrawn,
        cached: frozenset[str] | None = None,
    ) -> bool:
        """Draws the images that are not cached; returns False if `on_drawn` stopped it.

        Args:
            conditions: the anchors on the denoiser's device.
            denoiser: the untouched network.
            on_drawn: progress.
            cached: the keys of those to take from the cache, for ranks that draw together; by default all that are
                there.

        Raises:
            NonFiniteError: the network's predictions are not finite.
            FileNotFoundError: an image of `cached` is not in the cache.
        """
        if not self._planned:
            return True
        images, total = [], len(self._planned)
        for done, image in enumerate(self._planned):
            condition = conditions[image.anchor]
            found = self._cached(image.key) if cached is None or image.key in cached else None
            if found is None and cached is not None and image.key in cached:
                raise FileNotFoundError(
                    "a class image that another process has is missing here: the output folder has to be on a disk "
                    "that all processes share"
                )
            if found is None:
                if not on_drawn(done, total):
                    return False
                found = {"latent": _draw(image, condition, denoiser, self._seed)}
                if self._cache is not None:
                    self._cache.keep(image.key, found)
            images.append(ClassImage(condition, found["latent"]))
        self.images = tuple(images)
        return on_drawn(total, total)


def _draw(image: PlannedImage, condition: Condition, denoiser: Denoiser, seed: int) -> Tensor:
    noise = torch.randn(1, *image.shape, generator=make_generator(seed, "class image", image.number))
    latent = plain_cpu(sample(denoiser, [condition], noise.to(denoiser.device), image.sigmas)[0].float())
    if not torch.isfinite(latent).all():
        raise NonFiniteError(0, "class image", float("nan"), remedy=remedy(0, denoiser.compute_dtype == torch.float16))
    return latent


def _digest(condition: Condition) -> str:
    """A digest of the condition's tensors, of any shape."""
    digest = hashlib.sha256()
    for tensor in (condition.features, *condition.reference_latents):
        digest.update(f"{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
