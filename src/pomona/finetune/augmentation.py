"""Photos as a phone might take them, made from photos on white, in batches on tensors. Needs torch.

All that is random about a batch is drawn first (`draw`), for every photo of it, and then applied
(`apply`). So each of several processes can apply its own part of one batch, and a step depends on
the seed and its number alone. Runs on the driver, or on workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

Mask = npt.NDArray[np.bool_]

WHITE = 225
"""A background pixel's darkest channel is at least this, of 255: Fruits-360 is cut out onto white,
and JPEG leaves some grey at the fruit's edge."""

BORDER = 0.5
"""Share of a photo's border that must be white for the photo to count as lying on white."""

SCALE = (0.7, 1.4)
"""Of the photo's side: below 1 the fruit gets smaller, above 1 the photo is cropped."""
SHIFT = 0.1
"""Of the side, either way."""
STRETCH = 0.15
"""The sides' ratio: at most e to this."""
BRIGHTNESS, CONTRAST, SATURATION = 0.25, 0.2, 0.4
"""Factors are 1 ± these."""
HUE = 0.3
"""Radians about the grey axis, either way."""
TINT = 0.05
"""Of the light: added to each channel, ± this (1 is white)."""
NOISE = 0.02
"""A sensor's: standard deviation at most."""
KEEP_WHITE = 0.5
"""Share of the photos that keep their background: Test photos have one of that kind too."""
BLURRED = 0.2
"""Share of the photos that are blurred."""
OCTAVES = {1: 0.25, 2: 0.25, 5: 0.2, 16: 0.1, 64: 0.06}
"""Cells along a side of the noise that backgrounds are made of, and its amplitude at most."""


Between = Callable[..., torch.Tensor]
"""Draws evenly between two numbers, [n, …]."""


class Draws(NamedTuple):
    """What is random about n photos: float32, first dimension n."""

    matrix: torch.Tensor  # [n, 2, 3]: from places in the result to places in the photo, in −1…1
    colour: torch.Tensor  # [n, 3, 4]: mixes the channels, and shifts them
    blur: torch.Tensor  # [n]: 0 is sharp, 1 a binomial filter of five pixels
    noise: torch.Tensor  # [n]: standard deviation
    octaves: tuple[torch.Tensor, ...]  # each [n, 3, cells, cells]: the background's parts
    replace: torch.Tensor  # [n]: 1 where the background is replaced, else 0
    grain: torch.Tensor  # [n, 1, side, side]: standard normal, for the noise

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Draws:
        """Return them with every tensor changed."""
        octaves = tuple(change(value) for value in self.octaves)
        others = {
            name: change(value) for name, value in self._asdict().items() if name != "octaves"
        }
        return Draws(octaves=octaves, **others)

    def part(self, rank: int, size: int) -> Draws:
        """Return those of every ``size``-th photo from ``rank`` on."""
        return self.each(lambda value: value[rank::size])


# --- once for each photo -----------------------------------------------------------------------


def cut_out(photos: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the masks of what isn't white background: uint8 [n, h, w], 0 or 255.

    White that is joined to the border is background, as far as it reaches and one pixel more; white
    inside the fruit (a gleam) is not. A photo whose border isn't white is all foreground.

    Parameters
    ----------
    photos
        uint8 [n, h, w, 3].
    """
    white = photos.min(axis=3) >= WHITE
    border = np.ones(white.shape[1:], bool)
    border[1:-1, 1:-1] = False
    on_white = white[:, border].mean(axis=1) >= BORDER
    reached = white & border & on_white[:, None, None]
    count = -1
    while (now := int(reached.sum())) != count:  # twice for a fruit without bays
        count = now
        for axis in (1, 2):
            reached = _run_on(reached, white, axis)
            reached = np.flip(_run_on(np.flip(reached, axis), np.flip(white, axis), axis), axis)
    wider = np.pad(reached, ((0, 0), (1, 1), (1, 1)))
    height, width = white.shape[1:]
    grown = np.zeros_like(white)
    for y in range(3):
        for x in range(3):
            grown |= wider[:, y : y + height, x : x + width]
    return np.where(grown, 0, 255).astype(np.uint8)


def _run_on(reached: Mask, white: Mask, axis: int) -> Mask:
    """Go on along an axis from what is reached, as far as it is white."""
    shape = [1, 1, 1]
    shape[axis] = -1
    place = np.arange(white.shape[axis], dtype=np.int16).reshape(shape)
    last_reached = np.maximum.accumulate(np.where(reached, place, -1), axis=axis)
    last_wall = np.maximum.accumulate(np.where(white, -1, place), axis=axis)
    found: Mask = last_reached > last_wall
    return found


# --- once for each step ------------------------------------------------------------------------


def draw(n: int, side: int, generator: torch.Generator) -> Draws:
    """Draw what is random about n photos of ``side`` pixels; on the CPU, so that it is the same."""

    def between(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def chance(share: float) -> torch.Tensor:
        return (torch.rand(n, generator=generator) < share).float()

    return Draws(
        _matrices(between),
        _colours(between),
        chance(BLURRED) * between(0.3, 1),
        between(0, NOISE) * chance(0.5),
        tuple(
            _noise(n, cells, generator) * between(0, amplitude, 1, 1, 1)
            for cells, amplitude in OCTAVES.items()
        ),
        1 - chance(KEEP_WHITE),
        torch.randn(n, 1, side, side, generator=generator),
    )


def _noise(n: int, cells: int, generator: torch.Generator) -> torch.Tensor:
    """Half of its light is grey: what lies behind fruit is seldom of pure colours."""
    grey = torch.randn(n, 1, cells, cells, generator=generator)
    return grey + 0.5 * torch.randn(n, 3, cells, cells, generator=generator)


def _matrices(between: Between) -> torch.Tensor:
    angle = between(-torch.pi, torch.pi)
    flip = between(-1, 1).sign()
    zoom = torch.exp(between(*(float(torch.log(torch.tensor(end))) for end in SCALE)))
    ratio = torch.exp(between(-STRETCH / 2, STRETCH / 2))
    shift = between(-2 * SHIFT, 2 * SHIFT, 2)  # the side is 2 in these coordinates
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rows = torch.stack(
        [
            flip * cos * ratio,
            -sin / ratio,
            shift[:, 0],
            flip * sin * ratio,
            cos / ratio,
            shift[:, 1],
        ]
    )
    return rows.T.reshape(-1, 2, 3)


_LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601


def _colours(between: Between) -> torch.Tensor:
    """Brightness, contrast, saturation and hue are one matrix: all are affine in the channels."""
    n3 = (-1, 1, 1)
    brightness = between(1 - BRIGHTNESS, 1 + BRIGHTNESS).reshape(n3)
    contrast = between(1 - CONTRAST, 1 + CONTRAST).reshape(n3)
    saturation = between(1 - SATURATION, 1 + SATURATION).reshape(n3)
    angle = between(-HUE, HUE).reshape(n3)
    one = torch.eye(3)
    grey = _LUMA.expand(3, 3)  # each row gives the luma
    axis = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    hue = torch.cos(angle) * one + (1 - torch.cos(angle)) * axis + torch.sin(angle) * cross
    mix = brightness * contrast * (saturation * one + (1 - saturation) * grey) @ hue
    shift = (0.5 * (1 - contrast) + between(-TINT, TINT, 3).unsqueeze(2)).reshape(-1, 3, 1)
    return torch.cat([mix, shift], dim=2)


def apply(photos: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Return the photos as drawn: float32 [n, 3, h, w] in 0…1.

    Parameters
    ----------
    photos
        uint8 [n, h, w, 4]: RGB, and the mask of `cut_out`.
    draws
        For as many photos.
    """
    _, height, width, _ = photos.shape
    planes = photos.permute(0, 3, 1, 2).float() / 255
    planes[:, :3] -= 1  # so that beyond the edge, where zeros are taken, it is white
    grid = _grid(draws.matrix, height, width)
    moved = functional.grid_sample(planes, grid, align_corners=False)
    # A photo that isn't on white goes on beyond its edge as a mirror shows it.
    whole = (photos[..., 3] == 255).flatten(1).all(dim=1)
    if whole.any():
        moved[whole] = functional.grid_sample(
            planes[whole], grid[whole], padding_mode="reflection", align_corners=False
        )
    moved[:, :3] += 1
    rgb, mask = moved[:, :3], moved[:, 3:]
    mix, shift = draws.colour[:, :, :3], draws.colour[:, :, 3:]
    lit = torch.baddbmm(shift, mix, rgb.flatten(2)).reshape(rgb.shape)
    covered = 1 - draws.replace.reshape(-1, 1, 1, 1) * (1 - mask)
    scene = lit * covered + _background(draws, height, width) * (1 - covered)
    soft = torch.lerp(scene, _binomial(scene), draws.blur.reshape(-1, 1, 1, 1))
    return (soft + draws.noise.reshape(-1, 1, 1, 1) * draws.grain).clamp(0, 1)


def _background(draws: Draws, height: int, width: int) -> torch.Tensor:
    layers = [
        functional.interpolate(part, (height, width), mode="bilinear", align_corners=False)
        for part in draws.octaves
    ]
    return (0.5 + torch.stack(layers).sum(dim=0)).clamp(0, 1)


def _grid(matrix: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Do what torch's affine_grid does, whose matrix product takes longer than a whole step."""
    x, y = (
        (torch.arange(side, device=matrix.device) * 2 + 1) / side - 1 for side in (width, height)
    )
    m = matrix[:, None, None]
    return m[..., 0] * x[:, None] + m[..., 1] * y[:, None, None] + m[..., 2]


def _binomial(planes: torch.Tensor) -> torch.Tensor:
    """Return the planes under a filter of 1 4 6 4 1, both ways."""
    padded = functional.pad(planes, (2, 2, 2, 2), mode="replicate")
    for dim in (2, 3):
        length = planes.shape[dim]
        a, b, c, d, e = (padded.narrow(dim, start, length) for start in range(5))
        padded = (a + e + 4 * (b + d) + 6 * c) / 16
    return padded
