"""The demo world: 64x64 images of one badge on a plain background, and captions for them.

A badge has four discrete appearance attributes (shape, colour, center, texture); an image adds the badge's position
and the background. Some combinations of appearance are HELD OUT: the demo model was never trained on images of them,
so one of them, named by the trigger word, is an unseen concept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 64
NOUN = "badge"
TRIGGER = "[V7]"  # a name that the demo model has never seen bound to anything (names.py)

SHAPES = ("circle", "square", "triangle", "star", "cross", "flower")
COLOURS = {
    "red": (0.86, 0.08, 0.08), "orange": (0.98, 0.52, 0.02), "yellow": (0.97, 0.92, 0.12), "green": (0.08, 0.62, 0.12),
    "cyan": (0.10, 0.85, 0.88), "blue": (0.10, 0.18, 0.90), "purple": (0.50, 0.10, 0.68), "pink": (0.99, 0.55, 0.78),
}  # fmt: skip
TEXTURES = ("plain", "striped", "dotted")
POSITIONS = {"middle": (0, 0), "top": (0, -1), "bottom": (0, 1), "left": (-1, 0), "right": (1, 0)}
BACKGROUNDS = {
    "white": (0.95, 0.95, 0.95), "black": (0.05, 0.05, 0.05), "gray": (0.50, 0.50, 0.50), "sand": (0.85, 0.75, 0.55),
    "navy": (0.05, 0.08, 0.30), "forest": (0.05, 0.25, 0.12), "sky": (0.60, 0.80, 0.95), "brown": (0.38, 0.22, 0.10),
}  # fmt: skip

APPEARANCE = ("shape", "colour", "center", "texture")
LAYOUT = ("position", "background")
NUM_CLASSES = {
    "shape": len(SHAPES), "colour": len(COLOURS), "center": len(COLOURS), "texture": len(TEXTURES),
    "position": len(POSITIONS), "background": len(BACKGROUNDS),
}  # fmt: skip

HELD_OUT_SHARE = 0.08
_OFFSET = 10.0  # pixels from the middle to a badge at the side
_JITTER = 3.0  # pixels; what no caption says, so that even a described badge is more than one image


@dataclass(frozen=True)
class Scenes:
    """n images to render, as class indices int64 [n] per attribute.

    Attributes:
        shape: index into SHAPES [n].
        colour: index into COLOURS [n].
        center: index into COLOURS [n].
        texture: index into TEXTURES [n].
        position: index into POSITIONS [n].
        background: index into BACKGROUNDS [n].
        jitter: float [n, 2], offset of the badge in pixels.
    """

    shape: Tensor
    colour: Tensor
    center: Tensor
    texture: Tensor
    position: Tensor
    background: Tensor
    jitter: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        return Scenes(**{name: value[index] for name, value in vars(self).items()})

    def labels(self) -> dict[str, Tensor]:
        """Class index per attribute, each int64 [n]."""
        return {name: getattr(self, name) for name in NUM_CLASSES}

    def with_layout_of(self, other: Scenes) -> Scenes:
        """The same badges at the positions and on the backgrounds of `other`."""
        return Scenes(
            self.shape, self.colour, self.center, self.texture, other.position, other.background, other.jitter
        )

    def repeat(self, n: int) -> Scenes:
        """Each scene n times."""
        return Scenes(**{name: value.repeat_interleave(n, 0) for name, value in vars(self).items()})


def _held_out_table() -> Tensor:
    table = torch.rand(6, 8, 8, 3, generator=torch.Generator().manual_seed(20260605)) < HELD_OUT_SHARE
    table[:, torch.arange(8), torch.arange(8)] = False  # a center of the body's colour does not exist
    return table


HELD_OUT = _held_out_table()


def sample_scenes(n: int, generator: torch.Generator, *, held_out: bool | None = False) -> Scenes:
    """n random scenes; held_out: False for appearances seen in training, True for unseen ones, None for any."""
    chosen: list[Tensor] = []
    while not chosen or sum(map(len, chosen)) < n:
        draw = torch.stack([torch.randint(0, k, (4 * n + 64,), generator=generator) for k in (6, 8, 8, 3)], 1)
        keep = draw[:, 1] != draw[:, 2]
        if held_out is not None:
            keep &= HELD_OUT[tuple(draw.unbind(1))] == held_out
        chosen.append(draw[keep])
    shape, colour, center, texture = torch.cat(chosen)[:n].unbind(1)
    position = torch.randint(0, len(POSITIONS), (n,), generator=generator)
    background = torch.randint(0, len(BACKGROUNDS), (n,), generator=generator)
    jitter = (torch.rand(n, 2, generator=generator) * 2 - 1) * _JITTER
    return Scenes(shape, colour, center, texture, position, background, jitter)


def _outline(shape: int, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (roughly, in pixels; negative inside) to the outline of one kind of badge. x, y: [n, H, W]."""
    r = torch.sqrt(x * x + y * y + 1e-6)
    if shape == 0:
        return r - 18.5
    if shape == 1:
        return torch.maximum(x.abs(), y.abs()) - 16.5
    if shape == 2:
        half = math.sqrt(3) / 2
        return torch.maximum(torch.maximum(half * x - 0.5 * y, -half * x - 0.5 * y), y) - 11.5
    if shape == 3:
        return (r - 18.5 * (0.80 + 0.28 * torch.cos(5 * torch.atan2(x, -y)))) * 0.65
    if shape == 4:
        return torch.minimum(torch.maximum(x.abs() - 8.5, y.abs() - 19), torch.maximum(y.abs() - 8.5, x.abs() - 19))
    return (r - 17.0 * (0.90 + 0.15 * torch.cos(6 * torch.atan2(x, -y)))) * 0.8


def render(scenes: Scenes) -> Tensor:
    """Renders the scenes: float [n, 3, 64, 64] in [0, 1]."""
    n, size = len(scenes), IMAGE_SIZE
    axis = torch.arange(size) - (size - 1) / 2
    centre = torch.tensor(list(POSITIONS.values()))[scenes.position] * _OFFSET + scenes.jitter
    x = (axis[None, None, :] - centre[:, 0, None, None]).expand(n, size, size)
    y = (axis[None, :, None] - centre[:, 1, None, None]).expand(n, size, size)
    distance = torch.empty(n, size, size)
    for shape in range(len(SHAPES)):
        chosen = (scenes.shape == shape).nonzero()[:, 0]
        if len(chosen):
            distance[chosen] = _outline(shape, x[chosen], y[chosen])

    def inside(d: Tensor) -> Tensor:  # anti-aliased coverage [n, 1, H, W]
        return torch.sigmoid(-d * 2.5)[:, None]

    palette = torch.tensor(list(COLOURS.values()))
    body, center = palette[scenes.colour][:, :, None, None], palette[scenes.center][:, :, None, None]
    background = torch.tensor(list(BACKGROUNDS.values()))[scenes.background][:, :, None, None]
    stripes = torch.sigmoid(4 * torch.sin(y * (2 * math.pi / 9.5)))
    dots = torch.sigmoid(9 * (torch.cos(x * math.pi / 5.5) * torch.cos(y * math.pi / 5.5) - 0.25))
    texture = torch.stack([torch.zeros_like(stripes), stripes, dots], 1)[torch.arange(n), scenes.texture][:, None]
    image = body * (1 - 0.8 * texture)
    radius = torch.sqrt(x * x + y * y + 1e-6)
    image = torch.lerp(image, center, inside(radius - 5.6))
    image = image * (1 - inside((radius - 6.2).abs() - 0.8))  # ring around the center
    image = torch.lerp(background, image, inside(distance))
    return (image * (1 - inside((distance + 1.0).abs() - 1.1))).clamp(0, 1)


def _name(table: Sequence[str] | dict, index: Tensor) -> str:
    return list(table)[int(index)]


def caption(
    scenes: Scenes, i: int, *, name: str = "", attributes: Sequence[str] = (), layout: bool = True, brief: bool = False
) -> str:
    """A caption of scene i: an optional name, the requested appearance attributes, and the layout.

    `caption(s, 0, name="[V]")` -> "a [V] badge, top, on a sand background"; brief: "a [V] badge, top, on sand", which
    leaves room for words of appearance in the 32 tokens that image and caption share.
    """
    words = ["a", name] if name else ["a"]
    for attribute, table in (("texture", TEXTURES), ("colour", COLOURS), ("shape", SHAPES)):
        if attribute in attributes:
            words.append(_name(table, getattr(scenes, attribute)[i]))
    words.append(NOUN)
    if "center" in attributes:
        words += ["with", "a", _name(COLOURS, scenes.center[i]), "center"]
    text = " ".join(words)
    if layout:
        position, background = _name(POSITIONS, scenes.position[i]), _name(BACKGROUNDS, scenes.background[i])
        text += f", {position}, on {background}" if brief else f", {position}, on a {background} background"
    return text
