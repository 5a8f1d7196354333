"""The catalogue of rendered fruit: kinds, each with a recipe for its surface, and varieties.

A variety gives its kind's recipe colours and proportions of its own.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

# Kind | steps that build it | varieties, each "name skin/second" ("-": no name). The verbs of the
# steps are functions of `pomona.photos.synthetic_shapes`. Lengths and shares are in hundredths,
# angles in degrees, y points up. An outline is a list of "radius,height" from the top to the
# bottom. ";" separates steps; colours are hexadecimal.
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
  Black 3a1a1c/6a3a2a, Green 7fa83a/a8c050, Pink e0545a/f07850, Orange f07a14/f5a030
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
  stripe 9 100 1c4a24; spin 0 90; half 96 88 -10 56 11 e8f0d0; spin 0 -50 |
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
Orange Half | turn 0,97 32,92 60,76 83,50 94,24 97,0 94,-24 83,-50 60,-76 32,-92 0,-97; rough 24 50;
  spin 0 90; half 95 90 6 0 10 fbf0d0; spin 0 -50 |
  - f28a12/f9a836, Blood d9541e/b8283a, Lemon f5d92c/f4e060, Grapefruit f0a84a/e8687a
Mango | turn 0,92 25,90 56,60 70,5 60,-50 34,-88 0,-100 bend=45 gloss=30; blush 50;
  speck f0dc90 20 82; stick 85 15 5; spin 2 25 |
  - e8b02f/c8402a, Green 6f9a34/b8b83c, Yellow f5c838/f0a028, Red c83a2a/e8a030
Pomegranate | turn 0,84 24,82 50,72 78,46 92,0 80,-45 52,-74 26,-86 0,-88 rib=5,6,10 gloss=35;
  blush 40; speck 7a3a24 13 80; turn 0,86 16,88 24,105 22,92 20,70 0,70;
  ring 6 25 90 32 13 50 a03030 |
  - c0283a/e88f5a, Yellow e0b050/d06a4a, Dark 7f1428/a83a3a, Pink e0707a/f0b890
"""


@dataclass(frozen=True)
class Variety:
    """A label, and what it takes to build its surface."""

    label: str
    recipe: str
    skin: Array  # (3, 1), 0 to 1
    second: Array  # (3, 1): blush, stripes, seeds, flesh

    @property
    def salt(self) -> int:
        """The seed of this variety's random numbers."""
        return zlib.crc32(self.label.encode())


def rgb(code: str) -> Array:
    """Return a hexadecimal colour as a column, (3, 1), 0 to 1."""
    return np.array([[int(code[i : i + 2], 16) / 255] for i in (0, 2, 4)])


def _varieties() -> dict[str, Variety]:
    """Return all by label: the first variety of each kind, then the second of each, and so on."""
    ranked = []
    for entry in re.split(r"\n(?=\w)", _CATALOGUE.strip()):
        kind, recipe, varieties = (" ".join(field.split()) for field in entry.split("|"))
        for rank, variety in enumerate(varieties.split(", ")):
            name, colours = variety.rsplit(" ", 1)
            label = kind if name == "-" else f"{kind} {name}"
            ranked.append((rank, Variety(label, recipe, *map(rgb, colours.split("/")))))
    return {v.label: v for _, v in sorted(ranked, key=lambda item: item[0])}


BY_LABEL = _varieties()
LABELS: tuple[str, ...] = tuple(BY_LABEL)
