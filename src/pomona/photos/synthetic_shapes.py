"""Fruit as clouds of points: a catalogue of kinds and varieties, and the shapes they are made of.

A kind is a short recipe of steps that build its surface; a variety gives it colours and its
proportions.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

# Kind | steps that build it, verbs of _VERBS | varieties, each "name skin/second" ("-": no name).
# Lengths and shares are in hundredths, angles in degrees, y points up. An outline is a list of
# "radius,height" from the top to the bottom. Steps separate by ";", colours are hexadecimal.
_CATALOGUE = """
Apple | turn 0,48 14,64 40,78 76,62 95,18 90,-28 66,-68 38,-82 15,-76 0,-66 rib=5,5,10 gloss=40;
  blush 45; speck f0e0b0 17 84; ends 8a7a30 14 6; stick 45 60 4 |
  Red 1 b01226/d9832e, Golden 1 e3c54a/e8d98a, Granny Smith 7fb52c/a9cf5a, Braeburn a8301f/d8b04a,
  Pink Lady d8506a/e8d58a, Crimson Snow 8c0f2a/c23a3a, Golden 2 d9b93c/c98a4a, Red 2 c8242a/e6b84c,
  Red Yellow d6402c/f0cf57, Red Delicious 6f0a1c/a01a2a, Russet a9773a/8d6a35, Gala d9542f/ecc45a,
  Pale c9d67a/e8a07a
Banana | turn 0,130 5,130 6,110 15,85 20,40 21,-20 17,-75 7,-102 4,-108 0,-108 bend=105 rib=5,14,10
  gloss=15; speck second 11 80; ends a8b03c 20 8; ends 3a2a14 3 3; spin 0 -55 |
  - f2cf36/7a5a1e, Lady Finger f0d964/a08a3a, Red 9a3a2e/c8603c, Green 9fbf3c/6f8f2c,
  Ripe e3b52e/4a2e12
Strawberry | turn 0,62 30,68 64,50 71,20 57,-25 32,-70 16,-92 0,-95 knob=11,13,-5 gloss=35;
  ends f0d8b8 12 0; cells 11 13 35 0; ring 8 60 62 55 17; stick 60 38 5 80 4a8a2a |
  - d3141f/f0d060, Wedge e0402f/f2d878, Dark a00d1c/d8b050, White f0dccb/c83a3a
Orange | turn 0,92 25,89 48,79 68,65 84,46 94,24 97,0 94,-24 84,-46 68,-65 48,-79 25,-89 0,-92
  gloss=25; blush 35; rough 24 50; stick 89 10 5 50 5a6a2a; ring 1 65 92 55 20 |
  - f28a12/f7a83c, Clementine f06a0c/f28c28, Mandarin f59a23/e87812, Blood d9541e/a02a1a,
  Tangelo e8621a/f09238, Navel f8a020/f0b850
Grape | turn 0,25 10,23 18,18 23,10 25,0 23,-10 18,-18 10,-23 0,-25 gloss=50; blush 50;
  copies 43,50,21 11,50,47 -30,50,38 -48,50,0 -30,50,-38 11,50,-47 43,50,-21 49,18,8 24,18,44
  -19,18,46 -48,18,14 -41,18,-29 -3,18,-50 37,18,-34 36,-13,-6 17,-13,32 -25,-13,26 -32,-13,-16
  5,-13,-36 19,-42,-15 15,-42,19 -19,-42,15 -15,-42,-19 0,-72,0; stick 50 55 4; ring 2 70 75 60 30 |
  Blue 2b2a5c/6a6aa0, White c3d06a/e6e8a8, Red 8e2238/c85a6a, Pink d98a8c/eec0b4,
  White 2 d8cf6e/c8a850, Black 1c1626/4a3a5c, Green 8fb53c/c0d878
Pineapple | turn 0,25 28,22 46,-5 48,-50 41,-90 19,-108 0,-108 knob=11,12,13 gloss=15;
  cells 11 12 25 60; ring 9 62 16 60 10; ring 8 42 16 72 10; ring 7 26 16 84 10;
  ring 5 10 16 96 10 |
  - e09f24/8a5a16, Mini c9822a/5c3a14, Green 8a8f3a/4f5a1c, Gold f0bc3c/a86a1c
Watermelon | turn 0,94 32,90 60,74 78,45 86,0 78,-45 60,-74 32,-90 0,-94 gloss=25;
  stripe 9 100; stick 90 15 4 200 6a7a3a |
  - 7fb04a/1f5a26, Dark 1f4a22/12331a, Light b0cf8a/4f8a3f, Yellow e0c83c/a8922a
Kiwi Half | turn 0,95 32,91 61,78 83,55 94,28 98,0 94,-28 83,-55 61,-78 32,-91 0,-95;
  rough 30 80; spin 0 90; half 95 110 26 42 26 f4f4d0; spin 0 -50 |
  - 7a5a2c/7fbf2c, Gold 9a7638/e8c834
Lemon | turn 0,100 12,95 28,78 52,55 70,20 71,-20 52,-56 27,-80 13,-96 0,-100 gloss=25;
  blush 35; rough 24 50; stick 96 8 5 50 5a6a2a |
  - f5d92c/f9e875, Meyer f2b81e/f5d050, Green c8d03c/f0e060, Pale f4e87a/f0d83c
Cherry | turn 0,30 12,36 34,30 46,0 36,-33 14,-44 0,-44 rib=1,5,60 gloss=60; blush 45;
  stick 28 125 3 0 6f8a34; copies -47,-45,0,18 50,-35,0,-19; ring 1 80 98 60 20 |
  Red b00f22/d83a3a, Rainier f0b048/d83a34, Black 4a0a18/7a1a28, Yellow f0cf4a/f5e08a,
  Wax 8f1226/c83048, Coral e0483a/f08058
Pear | turn 0,84 19,80 32,50 45,15 64,-25 66,-60 42,-88 15,-93 0,-87 gloss=20; blush 40;
  speck 6f5a2a 22 78; stick 80 35 4 90 |
  - c9c84a/a8b838, Red 9a2a2a/c85a3a, Williams dfcf50/ecdc7a, Kaiser 9a6a2f/b8883f,
  Forelle d8b83a/c83a2a, Pale e6dc9a/b8c060, Abate 8fa83c/b08a3a, Monster a8b84a/7f943a,
  Stone 8a8a3f/6a5f2c
Tomato | turn 0,60 20,68 48,74 72,64 90,40 97,6 92,-30 74,-60 44,-76 0,-76 rib=6,5,15 gloss=60;
  blush 25; ring 6 84 75 62 12 15; stick 60 36 5 100 4f7f2a |
  - d8200f/e8481f, Yellow f5c21e/f0d850, Cherry Red c0101c/e8402a, Maroon 6a1a1c/8a3a24,
  Black 3a1a1c/6a3a2a,
  Green 7fa83a/a8c050, Pink e0545a/f07850, Orange f07a14/f5a030
Corn | turn 0,115 10,110 24,80 34,20 35,-40 25,-85 0,-90 knob=26,14,12,0 gloss=40; blush 50;
  cells 26 14 0 45 0; ring 4 28 -95 135 30 45 86ab48; ring 3 48 -95 100 28 80 a5c065;
  stick -115 30 10 0 9ab060 |
  - f5c82a/f9dc5a, White f3eccb/faf5e0, Blue 3a3a6a/7a7aa8, Red 8f2a24/c8603c
Carrot | turn 0,45 19,45 27,30 22,-20 14,-80 4,-120 0,-130 bend=12 gloss=20; speck second 9 72;
  ring 5 8 43 85 7 50 4f9a34; ring 7 24 43 75 7 50 4f9a34; ring 9 40 43 65 7 50 4f9a34 |
  - f07a18/c8500c, Purple 5f2450/8f3a6a, Yellow f0c23a/d8a428, White f0e4c0/d0b878
Pepper | turn 0,50 20,62 50,76 76,55 74,0 62,-55 40,-85 15,-78 0,-70 rib=4,26,16 gloss=75;
  blush 30; stick 45 50 9 90 3f7a2a; ring 5 70 52 30 14 50 3f7a2a |
  Red d01414/e83a24, Yellow f5c414/f8dc50, Green 2f7a22/58a03a, Orange f07f12/f7a23a,
  Purple 4a1f4a/6f3a64
Watermelon Half | turn 0,98 32,94 60,78 83,50 94,24 97,0 94,-24 83,-50 60,-78 32,-94 0,-98;
  stripe 9 100 1c4a24; spin 0 90; half 96 88 -10 56 11 e8f0d0;
  spin 0 -50 |
  - 2f7a2f/e0343f, Yellow 3a8a3a/f2cf3c, Orange 8fb45a/f0863c
Eggplant | turn 0,70 20,68 26,40 36,-10 42,-55 32,-95 0,-108 bend=-25 gloss=70; blush 30;
  ring 5 72 70 42 17 160 4a7a2c; stick 66 40 8 80 4f7a30 |
  - 3a1646/5a2a6a, White e8e2d0/d8c8b0, Lilac 8a4a98/c8a8c8, Green 7f9a4a/a8b870
Avocado Half | turn 0,98 20,92 36,55 50,10 66,-30 62,-70 32,-95 0,-100; rough 14 90;
  half 95 80 -10 0 0 a8bf4a;
  turn 0,-5 18,-8 30,-22 34,-38 30,-54 18,-68 0,-71 colour=7a4a20 gloss=50; spin 0 -50 |
  - 3a4a20/e4dc8c, Dark 2c2420/d8cc6a
Peach | turn 0,68 10,78 30,86 62,70 86,38 95,0 86,-42 62,-72 30,-88 0,-92 rib=1,11,90 gloss=8;
  blush 50; stick 66 30 4; ring 1 55 82 75 20 |
  - f0963f/c8322c, White f2d0a8/e0707a, Yellow f5b83c/e87f30, Apricot f4b05a/e88a3c,
  Nectarine c8281e/f0a030
Blueberry | turn 0,35 9,36 17,46 20,44 33,34 47,0 33,-34 0,-45 gloss=10; blush 50;
  ends 18182c 11 0; copies -42,0,30,-30,50 45,2,22,40,35 2,0,-50,-10,-30 2,62,0,-8,25 |
  - 34477f/8294bf, Huckleberry 241f3f/4a4470, Pink c86a8a/e8a8b8
Raspberry | turn 0,70 32,72 60,50 66,10 56,-40 32,-80 0,-95 knob=9,11,22 gloss=35;
  cells 9 11 80 60; ring 6 62 68 45 12 100; stick 65 30 4 60 4a8a2a |
  - c81a40/e24a6c, Black 241428/4c3454, Golden f0b03a/f8d078, Mulberry 5a1030/7f2a4c
Pumpkin | turn 0,38 26,56 52,70 76,60 94,36 100,0 92,-36 70,-64 40,-72 0,-60 rib=11,16,14 gloss=20;
  stripe 11 0; stick 36 55 11 90 6f7a3a |
  - e8781a/c8560f, White ece4d0/d0c4a4, Green 3f6a34/c87f24, Pale e8a860/d88f48
Lime | turn 0,90 12,86 32,74 56,52 72,20 72,-20 56,-54 30,-78 14,-92 0,-95 gloss=25;
  blush 35; rough 24 50; stick 86 8 5 50 5a6a2a |
  - 5fa82a/8fc840, Yellow b8c83c/8fb52f, Key 8fb83a/c8cc50
Plum | turn 0,82 10,90 28,92 58,72 76,38 80,0 74,-42 54,-76 26,-94 0,-98 rib=1,11,90 gloss=30;
  blush 50; stick 80 30 4; ring 1 55 92 70 20 |
  - 4a1f4f/7f5f9a, Red 9a1f34/c8506a, Yellow e8bf3a/d88f2c, Blue 2f2f62/7a82b8, Pink c85a78/e0a08f,
  Green 9fae4a/c8cf7a
Orange Half | turn 0,97 32,92 60,76 83,50 94,24 97,0 94,-24 83,-50 60,-76 32,-92 0,-97;
  rough 24 50; spin 0 90; half 95 90 6 0 10 fbf0d0; spin 0 -50 |
  - f28a12/f9a836, Blood d9541e/b8283a, Lemon f5d92c/f4e060,
  Grapefruit f0a84a/e8687a
Mango | turn 0,92 25,90 56,60 70,5 60,-50 34,-88 0,-100 bend=45 gloss=30; blush 50;
  speck f0dc90 20 82; stick 85 15 5; spin 2 25 |
  - e8b02f/c8402a, Green 6f9a34/b8b83c, Yellow f5c838/f0a028, Red c83a2a/e8a030
Pomegranate | turn 0,84 24,82 50,72 78,46 92,0 80,-45 52,-74 26,-86 0,-88 rib=5,6,10 gloss=35;
  blush 40; speck 7a3a24 13 80; turn 0,86 16,88 24,105 22,92 20,70 0,70;
  ring 6 25 90 32 13 50 a03030 |
  - c0283a/e88f5a, Yellow e0b050/d06a4a, Dark 7f1428/a83a3a, Pink e0707a/f0b890
"""

_SPACING = 0.0165  # between points, of the fruit's radius: 1.5 pixels of the double-size raster
_LEAF, _WOOD = (np.array([[r], [g], [b]]) / 255 for r, g, b in ((74, 138, 42), (106, 74, 36)))


@dataclass(frozen=True)
class _Variety:
    label: str
    recipe: str
    skin: Array  # (3, 1), 0 to 1
    second: Array  # (3, 1): blush, stripes, seeds, flesh

    @property
    def salt(self) -> int:
        return zlib.crc32(self.label.encode())


@dataclass(frozen=True)
class _Part:
    s: Array  # (n,), from 0 at the top of the outline to 1 at its end
    phi: Array  # (n,), around the axis, radians
    xyz: Array  # (3, n), y up
    normal: Array  # (3, n), unit length, outward
    colour: Array  # (3, n), 0 to 1
    gloss: Array  # (n,)


def _hex(code: str) -> Array:
    return np.array([[int(code[i : i + 2], 16) / 255] for i in (0, 2, 4)])


def _varieties() -> dict[str, _Variety]:
    """Order by rank: the first variety of each kind, then the second ones, …."""
    ranked = []
    for entry in re.split(r"\n(?=\w)", _CATALOGUE.strip()):
        kind, recipe, varieties = (" ".join(field.split()) for field in entry.split("|"))
        for rank, variety in enumerate(varieties.split(", ")):
            name, colours = variety.rsplit(" ", 1)
            label = kind if name == "-" else f"{kind} {name}"
            ranked.append((rank, _Variety(label, recipe, *map(_hex, colours.split("/")))))
    return {v.label: v for _, v in sorted(ranked, key=lambda item: item[0])}


BY_LABEL = _varieties()
LABELS: tuple[str, ...] = tuple(BY_LABEL)


def _smooth(low: float, high: float, x: Array) -> Array:
    t = np.clip((x - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def _mix(a: Array, b: Array, t: Array) -> Array:
    return np.asarray(a + (b - a) * t)


def _noise(xyz: Array, frequency: float, salt: int) -> Array:
    """Value noise, (n,), 0 to 1: random numbers on a lattice, smoothly interpolated."""
    lattice = np.random.default_rng(salt).random((32, 32, 32))
    cell, fraction = np.divmod(xyz * frequency + 512.37, 1)
    t = fraction * fraction * (3 - 2 * fraction)
    corners = np.stack([cell, cell + 1]).astype(np.int64) % 32

    def along(axis: int, *picked: Array) -> Array:
        if axis == 3:
            return np.asarray(lattice[picked])
        low, high = (along(axis + 1, *picked, corner[axis]) for corner in corners)
        return _mix(low, high, t[axis])

    return along(0)


def spin(axis: int, degrees: float) -> Array:
    """Return the right-handed rotation about x (0), y (1) or z (2), (3, 3)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = np.eye(3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    turn[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
    return turn


def _place(part: _Part, turn: Array, at: tuple[float, ...] = (0, 0, 0)) -> _Part:
    # einsum, not BLAS: the sums of BLAS may differ with the number of its threads.
    xyz, normal = (np.einsum("ij,jk->ik", turn, field) for field in (part.xyz, part.normal))
    return replace(part, xyz=xyz + np.c_[list(at)], normal=normal)


# --- surfaces -----------------------------------------------------------------------------------


def _spline(outline: Array) -> tuple[Array, Array, Array]:
    """Draw Catmull-Rom through (radius, height): shares of the length, radii, heights."""
    p = np.vstack([outline[1] * (-1, 1), outline, outline[-2] * (-1, 1)])
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    t = np.linspace(0, 1, 24, endpoint=False)[:, None, None]
    curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    points = np.vstack([curve.transpose(1, 0, 2).reshape(-1, 2), outline[-1]])
    length = np.r_[0, np.cumsum(np.hypot(*np.diff(points, axis=0).T))]
    return length / length[-1], np.maximum(points[:, 0], 0), points[:, 1]


def _cells(s: Array, phi: Array, rows: float, columns: float, stagger: float) -> list[Array]:
    """Tell where each point lies in its cell of a grid around the body: across, down, -1 to 1."""
    across = phi / (2 * math.pi) * columns + stagger * np.floor(s * rows)
    return [2 * (across % 1) - 1, 2 * (s * rows % 1) - 1]


def _bump(s: Array, phi: Array, rib: list[float], knob: list[float]) -> Array:
    """Return a factor on the radius. rib: count, depth, sharpness; knob: rows, columns, height."""
    factor = 1 - rib[1] / 100 * (1 - abs(np.sin(rib[0] * phi / 2))) ** (rib[2] / 10)
    u, v = _cells(s, phi, knob[0], knob[1], [*knob, 0.5][3])
    return np.asarray(factor + knob[2] / 100 * np.sqrt(np.clip(1 - 0.55 * (u * u + v * v), 0, 1)))


def _lathe(outline: Array, bend: float, flat: float, rib: list[float], knob: list[float]) -> _Part:
    """Turn a body and spread points evenly over it; ``bend`` curls it towards +x."""
    length, radii, heights = _spline(outline)

    def at(s: Array, phi: Array) -> Array:
        s = np.clip(s, 1e-5, 1 - 1e-5)
        r, y = np.interp(s, length, radii) * _bump(s, phi, rib, knob), np.interp(s, length, heights)
        x, z = r * np.cos(phi) * flat, r * np.sin(phi)
        if bend:
            arm = 1 / bend - x
            x, y = 1 / bend - arm * np.cos(y * bend), arm * np.sin(y * bend)
        return np.stack([x, y, z])

    def across(s: Array, phi: Array, e: float = 2e-3) -> Array:
        """Return the outward normal, as long as the area that a unit of s and phi covers."""
        down, around = at(s + e, phi) - at(s - e, phi), at(s, phi + e) - at(s, phi - e)
        return np.cross(around, down, axis=0) / (4 * e * e)

    rows, columns = np.meshgrid(np.arange(200) + 0.5, np.arange(24) * math.pi / 12)
    area = np.linalg.norm(across(rows.ravel() / 200, columns.ravel()), axis=0).reshape(24, 200)
    ring = np.r_[0, np.cumsum(area.mean(axis=0))] * 2 * math.pi / 200
    count = max(24, round(ring[-1] / _SPACING**2))
    s = np.interp((np.arange(count) + 0.5) / count * ring[-1], ring, np.linspace(0, 1, 201))
    phi = np.arange(count) * math.pi * (3 - math.sqrt(5)) % (2 * math.pi)  # the golden angle
    normal = across(s, phi)
    normal /= np.linalg.norm(normal, axis=0) + 1e-12
    return _Part(s, phi, at(s, phi), normal, np.ones((3, count)), np.zeros(count))


# --- the verbs of the catalogue: each takes the parts so far and returns the parts after it -----


def _turn(v: _Variety, parts: list[_Part], *words: str) -> list[_Part]:
    points = np.array([word.split(",") for word in words if "=" not in word], float) / 100
    options = {"bend": "0", "gloss": "0", "rib": "1,0,10", "knob": "1,1,0"}
    options |= dict(word.split("=") for word in words if "=" in word)
    rib, knob = ([float(n) for n in options[key].split(",")] for key in ("rib", "knob"))
    if not parts:  # varieties of a kind differ in their proportions too
        points[:, 0] *= 0.94 + 0.12 * (v.salt % 997) / 996
    part = _lathe(points, float(options["bend"]) / 100, 1, rib, knob)
    skin = _hex(options["colour"]) if "colour" in options else v.skin
    gloss = np.full(len(part.s), float(options["gloss"]) / 100)
    return [*parts, replace(part, colour=part.colour * skin, gloss=gloss)]


def _stick(_: _Variety, parts: list[_Part], y: float, length: float, radius: float,
           bend: float = 50, colour: Array = _WOOD) -> list[_Part]:  # fmt: skip
    h, r = length, radius
    outline = np.array([(0, h), (1.3 * r, h), (r, h / 2), (r, 0), (0, 0)])
    part = _lathe(outline / 100, bend / 100, 1, [1, 0, 10], [1, 1, 0])
    part = replace(part, colour=part.colour * colour)
    return [*parts, _place(part, np.eye(3), (0, y / 100, 0))]


def _ring(_: _Variety, parts: list[_Part], count: float, lean: float, y: float, length: float,
          width: float, bend: float = 80, colour: Array = _LEAF) -> list[_Part]:  # fmt: skip
    """Add leaves around the axis: thin bodies with a pale vein, darker towards the tip."""
    w, h = width, length
    outline = np.array([(0, h), (w / 2, h * 0.7), (w, h * 0.4), (w / 2, 2), (0, 0)]) / 100
    leaf = _lathe(outline, bend / 100, 0.08, [1, 0, 10], [1, 1, 0])
    vein = 0.2 * _smooth(0.1, 0, abs(leaf.xyz[2]) / width * 100) + 0.25 * (0.6 - leaf.s)
    leaf = replace(leaf, colour=leaf.colour * colour * (1 + vein))
    starts = [length + 360 * k / count for k in range(int(count))]  # rings start at odd places
    return parts + [_place(leaf, spin(1, a) @ spin(2, -lean), (0, y / 100, 0)) for a in starts]


def _copies(_: _Variety, parts: list[_Part], *spots: str) -> list[_Part]:
    """Put the parts so far at each "x,y,z[,lean[,pitch]]", darker where they face the middle."""
    copies = []
    for spot in spots:
        x, y, z, lean, pitch = [*map(float, spot.split(",")), 0, 0][:5]
        for part in parts:
            copy = _place(part, spin(2, -lean) @ spin(0, pitch), (x / 100, y / 100, z / 100))
            outward = np.sum(copy.xyz * copy.normal * [[1], [0.35], [1]], axis=0)
            shade = 0.45 + 0.55 * _smooth(-0.3, 0.25, outward)
            copies.append(replace(copy, colour=copy.colour * shade, gloss=copy.gloss * shade**3))
    return copies


def _turned(_: _Variety, parts: list[_Part], axis: float, degrees: float) -> list[_Part]:
    return [_place(part, spin(int(axis), degrees)) for part in parts]


# --- more verbs: each takes the last part and returns it with another skin -----------------------


def _blush(v: _Variety, part: _Part, share: float) -> _Part:
    """Turn the skin into the second colour on one side, in clouds and streaks."""
    streaks = _noise(part.xyz * [[1], [0.12], [1]], 14, v.salt + 1)
    side = part.normal[0] / 2 + 1.1 * _noise(part.xyz, 2.2, v.salt) + 0.35 * streaks
    t = _smooth(-0.35, 0.45, side - 0.725 + share / 100 - 0.5)
    return replace(part, colour=_mix(part.colour, v.second, t))


def _speck(v: _Variety, part: _Part, tint: Array, size: float, share: float) -> _Part:
    mark = _smooth(share / 100, share / 100 + 0.1, _noise(part.xyz, size, v.salt + 2))
    return replace(part, colour=_mix(part.colour, tint, mark))


def _ends(_: _Variety, part: _Part, tint: Array, top: float, bottom: float) -> _Part:
    near = np.minimum(part.s / (top + 1e-9), (1 - part.s) / (bottom + 1e-9)) * 100
    return replace(part, colour=_mix(part.colour, tint, _smooth(1, 0.5, near)))


def _tiles(v: _Variety, part: _Part, rows: float, columns: float, dot: float, edge: float,
           stagger: float = 0.5) -> _Part:  # fmt: skip
    """Paint a dot of the second colour in each cell of a grid, and a dark line around it."""
    rho = np.hypot(*_cells(part.s, part.phi, rows, columns, stagger))
    colour = _mix(part.colour, v.second, _smooth(dot / 100 + 1e-6, dot / 200, rho))
    return replace(part, colour=colour * (1 - edge / 100 * _smooth(0.6, 1.2, rho)))


def _stripe(
    v: _Variety, part: _Part, count: float, wave: float, tint: Array | None = None
) -> _Part:
    """Paint stripes, of the second colour unless told, along the furrows of "rib", or wavy."""
    shift = 2 * _noise(part.xyz, 5, 3) + 1.2 * _noise(part.xyz, 12, 4) - 1.6
    stripe = _smooth(-0.1, 0.4, np.cos(count * part.phi + 1.6 * wave / 100 * shift))
    return replace(part, colour=_mix(part.colour, v.second if tint is None else tint, stripe))


def _rough(_: _Variety, part: _Part, size: float, depth: float) -> _Part:
    """Shake the normals, for pores, fuzz or wrinkles; the shape stays."""
    shake = np.stack([_noise(part.xyz, size, k) - 0.5 for k in range(3)])
    shaken = part.normal + depth / 100 * shake
    return replace(part, normal=shaken / np.linalg.norm(shaken, axis=0))


def _half(v: _Variety, part: _Part, skin: float, rim: float, heart: float, seeds: float,
          count: float, pale: Array) -> _Part:  # fmt: skip
    """Cut the part at z = 0: what lies before the cut is pressed onto it and painted."""
    cut = part.xyz[2] > 0
    radius, angle = np.hypot(*part.xyz[:2]), np.arctan2(*part.xyz[:2]) / (2 * math.pi) + 0.5
    edge = np.zeros(129)  # how far the cut reaches in each direction
    np.maximum.at(edge, (angle * 128).astype(int), radius)
    rho = radius / np.interp(angle * 128, np.arange(128) + 0.5, edge[:128], period=128) * 100
    spoke = abs(angle * count % 1 - 0.5)
    pith = np.maximum(_smooth(rim - 5, rim + 1, rho), _smooth(heart + 6, heart - 6, rho))
    if count and not seeds:  # segments, as of an orange
        pith = np.maximum(pith, _smooth(7, 2, (0.5 - spoke) * rho))
    face = _mix(v.second, pale, pith)
    if seeds:
        ring = seeds + 7 * (angle * count // 1 % 2)
        away = np.hypot(spoke * 6.28 / count * rho, (rho - ring) / 2)
        face = _mix(face, _hex("1c140c"), _smooth(3.5, 2.2, away))
    face = np.where(cut, _mix(face, part.colour, _smooth(skin - 2, skin + 1, rho)), part.colour)
    xyz = np.where(cut & (np.arange(3) == 2)[:, None], 0, part.xyz)
    normal = np.where(cut, [[0], [0], [1]], part.normal)
    return replace(part, xyz=xyz, normal=normal, colour=face)


_VERBS: dict[str, Callable[..., list[_Part]]] = {
    "turn": _turn, "stick": _stick, "ring": _ring, "copies": _copies, "spin": _turned,
}  # fmt: skip
_SKINS: dict[str, Callable[..., _Part]] = {
    "blush": _blush, "speck": _speck, "ends": _ends, "cells": _tiles, "stripe": _stripe,
    "rough": _rough, "half": _half,
}  # fmt: skip


def _word(word: str, v: _Variety) -> Any:
    """Read a word of a recipe: a colour, text with "," or "=", or a number."""
    if word == "second":
        return v.second
    if re.fullmatch("[0-9a-f]{6}", word):
        return _hex(word)
    return word if "," in word or "=" in word else float(word)


def build(v: _Variety) -> list[_Part]:
    """Follow a variety's recipe."""
    parts: list[_Part] = []
    for step in v.recipe.split(";"):
        verb, *words = step.split()
        values = [_word(word, v) for word in words]
        if verb in _VERBS:
            parts = _VERBS[verb](v, parts, *values)
        else:
            parts[-1] = _SKINS[verb](v, parts[-1], *values)
    return parts
