"""Augmentation of a batch: photos on white become photos as a phone might take them. Needs torch.

Random parameters are drawn first (`draw`), for every photo of a batch, and then applied (`apply`).
So each of several processes can apply its part of the same batch, and a step depends on nothing but
the seed and its number. Runs on the driver, or on workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch.nn import functional

WHITE = 225
"""Least value (of 255) of a background pixel's darkest channel: Fruits-360's fruit is cut out onto
white, and JPEG leaves some grey at its edge."""

BORDER = 0.5
"""Least share of a photo's border that is white if the photo counts as taken on white."""

# Structuring elements [n, h, w]: of each photo by itself.
FOUR_NEIGHBOURS = np.array([[[0] * 3] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0] * 3] * 3])
SQUARE = np.ones((1, 3, 3))

SCALE = (0.7, 1.4)  # zoom: below 1 the fruit gets smaller, above 1 the photo is cropped
SHIFT = 0.1  # greatest translation along each axis, as a share of the side
STRETCH = 0.15  # greatest change of the aspect ratio: a factor of e to the power of this
BRIGHTNESS, CONTRAST, SATURATION = 0.25, 0.2, 0.4  # factors are drawn from 1 ± these
HUE = 0.3  # greatest rotation about the grey axis, in radians
TINT = 0.05  # greatest offset of each channel (white is 1), as coloured light gives
NOISE = 0.02  # greatest standard deviation of the sensor noise
KEEP_WHITE = 0.5  # share of photos that keep their white background: those of Test have one too
BLURRED = 0.2  # share of photos that are blurred
OCTAVES = {1: 0.25, 2: 0.25, 5: 0.2, 16: 0.1, 64: 0.06}
"""Octaves of the noise that replaces backgrounds: cells along a side, and greatest amplitude."""

Uniform = Callable[..., torch.Tensor]
"""``uniform(low, high, *shape)`` draws a tensor [n, *shape], evenly distributed."""


class Draws(NamedTuple):
    """Random parameters of n photos: float32, first dimension n."""

    matrix: torch.Tensor  # [n, 2, 3]: affine, from output to input coordinates, both in −1…1
    colour: torch.Tensor  # [n, 3, 4]: affine, in the channels
    blur: torch.Tensor  # [n]: weight of a binomial filter of five pixels, 0 is sharp
    noise: torch.Tensor  # [n]: standard deviation
    replace: torch.Tensor  # [n]: 1 where the background is replaced, else 0
    grain: torch.Tensor  # [n, 1, side, side]: standard normal, scaled by ``noise``
    octaves: tuple[torch.Tensor, ...]  # each [n, 3, cells, cells]: summed, the new background

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Draws:
        """Return draws with every tensor changed."""
        return Draws._make([*map(change, self[:-1]), tuple(map(change, self.octaves))])

    def part(self, rank: int, size: int) -> Draws:
        """Return the draws of every ``size``-th photo from ``rank`` on."""
        return self.map(lambda value: value[rank::size])


def foreground_masks(photos: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return masks of the foreground, uint8 [n, h, w], 0 or 255, for photos uint8 [n, h, w, 3].

    White connected to the border is background, widened by one pixel; white inside the fruit (a
    highlight) is not. A photo whose border isn't white is all foreground.
    """
    white = photos.min(axis=3) >= WHITE
    border = np.ones(white.shape[1:], bool)
    border[1:-1, 1:-1] = False
    on_white = white[:, border].mean(axis=1) >= BORDER
    seeds = white & border & on_white[:, None, None]
    background = ndimage.binary_propagation(seeds, FOUR_NEIGHBOURS, white)
    return np.where(ndimage.binary_dilation(background, SQUARE), 0, 255).astype(np.uint8)


def draw(n: int, side: int, generator: torch.Generator) -> Draws:
    """Draw parameters for n photos of ``side`` pixels: on the CPU, so that devices don't differ."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def chance(share: float) -> torch.Tensor:
        return (torch.rand(n, generator=generator) < share).float()

    return Draws(  # in this order: what a seed gives depends on it
        matrix=_matrices(uniform),
        colour=_colours(uniform),
        blur=chance(BLURRED) * uniform(0.3, 1),
        noise=uniform(0, NOISE) * chance(0.5),
        octaves=tuple(
            _noise(n, cells, generator) * uniform(0, amplitude, 1, 1, 1)
            for cells, amplitude in OCTAVES.items()
        ),
        replace=1 - chance(KEEP_WHITE),
        grain=torch.randn(n, 1, side, side, generator=generator),
    )


def _noise(n: int, cells: int, generator: torch.Generator) -> torch.Tensor:
    """Return grey noise, and colour at half its amplitude: backgrounds seldom have pure colours."""
    grey = torch.randn(n, 1, cells, cells, generator=generator)
    return grey + 0.5 * torch.randn(n, 3, cells, cells, generator=generator)


def _matrices(uniform: Uniform) -> torch.Tensor:
    """Return rotation, flip, zoom, stretch and shift as one matrix."""
    angle = uniform(-torch.pi, torch.pi)
    flip = uniform(-1, 1).sign()
    zoom = torch.exp(uniform(*(float(torch.log(torch.tensor(end))) for end in SCALE)))
    ratio = torch.exp(uniform(-STRETCH / 2, STRETCH / 2))
    shift = uniform(-2 * SHIFT, 2 * SHIFT, 2)  # coordinates are −1…1, so the side is 2
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    x = [flip * cos * ratio, -sin / ratio, shift[:, 0]]
    y = [flip * sin * ratio, cos / ratio, shift[:, 1]]
    return torch.stack([*x, *y], dim=1).reshape(-1, 2, 3)


def _colours(uniform: Uniform) -> torch.Tensor:
    """Return brightness, contrast, saturation and hue as one matrix: all are affine."""
    brightness, contrast, saturation = (
        uniform(1 - most, 1 + most, 1, 1) for most in (BRIGHTNESS, CONTRAST, SATURATION)
    )
    angle = uniform(-HUE, HUE, 1, 1)
    one = torch.eye(3)
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)  # each channel to luma, ITU-R BT.601
    axis = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    hue = torch.cos(angle) * one + (1 - torch.cos(angle)) * axis + torch.sin(angle) * cross
    mix = brightness * contrast * (saturation * one + (1 - saturation) * grey) @ hue
    shift = 0.5 * (1 - contrast) + uniform(-TINT, TINT, 3, 1)
    return torch.cat([mix, shift], dim=2)


def apply(photos: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Return augmented photos, float32 [n, 3, h, w] in 0…1.

    ``photos`` are uint8 [n, h, w, 4]: RGB, and the mask of `foreground_masks`.
    """
    _, height, width, _ = photos.shape
    planes = photos.permute(0, 3, 1, 2).float() / 255
    planes[:, :3] -= 1  # grid_sample pads with 0, which is now white
    grid = _grid(draws.matrix, height, width)
    moved = functional.grid_sample(planes, grid, align_corners=False)
    # A photo that isn't on white is padded with its reflection.
    whole = (photos[..., 3] == 255).flatten(1).all(dim=1)
    if whole.any():
        moved[whole] = functional.grid_sample(
            planes[whole], grid[whole], padding_mode="reflection", align_corners=False
        )
    rgb, mask = moved[:, :3] + 1, moved[:, 3:]
    mix, shift = draws.colour[:, :, :3], draws.colour[:, :, 3:]
    lit = torch.baddbmm(shift, mix, rgb.flatten(2)).reshape(rgb.shape)
    replace, blur, noise = (
        value.reshape(-1, 1, 1, 1) for value in (draws.replace, draws.blur, draws.noise)
    )
    covered = 1 - replace * (1 - mask)
    scene = lit * covered + _background(draws, height, width) * (1 - covered)
    return (torch.lerp(scene, _binomial(scene), blur) + noise * draws.grain).clamp(0, 1)


def _background(draws: Draws, height: int, width: int) -> torch.Tensor:
    layers = [
        functional.interpolate(part, (height, width), mode="bilinear", align_corners=False)
        for part in draws.octaves
    ]
    return (0.5 + torch.stack(layers).sum(dim=0)).clamp(0, 1)


def _grid(matrix: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Do as torch's ``affine_grid``, whose matrix product takes longer than a whole step."""
    x, y = (
        (torch.arange(side, device=matrix.device) * 2 + 1) / side - 1 for side in (width, height)
    )
    m = matrix[:, None, None]
    return m[..., 0] * x[:, None] + m[..., 1] * y[:, None, None] + m[..., 2]


def _binomial(planes: torch.Tensor) -> torch.Tensor:
    """Blur with the separable filter 1 4 6 4 1."""
    padded = functional.pad(planes, (2, 2, 2, 2), mode="replicate")
    for dim in (2, 3):
        length = planes.shape[dim]
        a, b, c, d, e = (padded.narrow(dim, start, length) for start in range(5))
        padded = (a + e + 4 * (b + d) + 6 * c) / 16
    return padded
