"""The geometry of rendered fruit: each step of a recipe adds or changes points of a surface."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pomona.photos.synthetic_catalogue import Array, Variety, rgb

_SPACING = 0.0165  # between points, of the fruit's radius: 1.5 pixels of the double-size raster
_LEAF, _WOOD = (np.array([[r], [g], [b]]) / 255 for r, g, b in ((74, 138, 42), (106, 74, 36)))


@dataclass(frozen=True)
class Part:
    """Points on one body of a fruit, such as the flesh, a leaf or the stalk."""

    s: Array  # (n,), from 0 at the top of the outline to 1 at its end
    phi: Array  # (n,), around the axis, radians
    xyz: Array  # (3, n), y up
    normal: Array  # (3, n), unit length, outward
    colour: Array  # (3, n), 0 to 1
    gloss: Array  # (n,)


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


def _place(part: Part, turn: Array, at: tuple[float, ...] = (0, 0, 0)) -> Part:
    # einsum, not BLAS: the sums of BLAS may differ with the number of its threads.
    xyz, normal = (np.einsum("ij,jk->ik", turn, field) for field in (part.xyz, part.normal))
    return replace(part, xyz=xyz + np.c_[list(at)], normal=normal)


# --- surfaces -----------------------------------------------------------------------------------


def _spline(outline: Array) -> tuple[Array, Array, Array]:
    """Draw a Catmull-Rom spline through points (radius, height).

    Returns, along the curve, the share of its length (0 to 1), the radius, the height: each (n,).
    """
    p = np.vstack([outline[1] * (-1, 1), outline, outline[-2] * (-1, 1)])
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    t = np.linspace(0, 1, 24, endpoint=False)[:, None, None]
    curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    points = np.vstack([curve.transpose(1, 0, 2).reshape(-1, 2), outline[-1]])
    length = np.r_[0, np.cumsum(np.hypot(*np.diff(points, axis=0).T))]
    return length / length[-1], np.maximum(points[:, 0], 0), points[:, 1]


def _cells(s: Array, phi: Array, rows: float, columns: float, stagger: float) -> list[Array]:
    """Return each point's position in its cell of a grid around the body: across, down, -1 to 1."""
    across = phi / (2 * math.pi) * columns + stagger * np.floor(s * rows)
    return [2 * (across % 1) - 1, 2 * (s * rows % 1) - 1]


def _bump(s: Array, phi: Array, rib: list[float], knob: list[float]) -> Array:
    """Return a factor for the radius. rib: count, depth, sharpness; knob: rows, columns, height."""
    factor = 1 - rib[1] / 100 * (1 - abs(np.sin(rib[0] * phi / 2))) ** (rib[2] / 10)
    u, v = _cells(s, phi, knob[0], knob[1], [*knob, 0.5][3])
    return np.asarray(factor + knob[2] / 100 * np.sqrt(np.clip(1 - 0.55 * (u * u + v * v), 0, 1)))


def _lathe(outline: Array, bend: float, flat: float, rib: list[float], knob: list[float]) -> Part:
    """Rotate an outline to a body and spread points evenly on it; ``bend`` curls it towards +x."""
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
        """Return the outward normal; its length is the area that a unit of s and phi covers."""
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
    return Part(s, phi, at(s, phi), normal, np.ones((3, count)), np.zeros(count))


# --- the verbs of the catalogue: each takes the parts so far and returns the parts after it -----


def _turn(v: Variety, parts: list[Part], *words: str) -> list[Part]:
    points = np.array([word.split(",") for word in words if "=" not in word], float) / 100
    options = {"bend": "0", "gloss": "0", "rib": "1,0,10", "knob": "1,1,0"}
    options |= dict(word.split("=") for word in words if "=" in word)
    rib, knob = ([float(n) for n in options[key].split(",")] for key in ("rib", "knob"))
    if not parts:  # varieties of a kind differ in their proportions too
        points[:, 0] *= 0.94 + 0.12 * (v.salt % 997) / 996
    part = _lathe(points, float(options["bend"]) / 100, 1, rib, knob)
    skin = rgb(options["colour"]) if "colour" in options else v.skin
    gloss = np.full(len(part.s), float(options["gloss"]) / 100)
    return [*parts, replace(part, colour=part.colour * skin, gloss=gloss)]


def _stick(_: Variety, parts: list[Part], y: float, length: float, radius: float,
           bend: float = 50, colour: Array = _WOOD) -> list[Part]:  # fmt: skip
    h, r = length, radius
    outline = np.array([(0, h), (1.3 * r, h), (r, h / 2), (r, 0), (0, 0)])
    part = _lathe(outline / 100, bend / 100, 1, [1, 0, 10], [1, 1, 0])
    part = replace(part, colour=part.colour * colour)
    return [*parts, _place(part, np.eye(3), (0, y / 100, 0))]


def _ring(_: Variety, parts: list[Part], count: float, lean: float, y: float, length: float,
          width: float, bend: float = 80, colour: Array = _LEAF) -> list[Part]:  # fmt: skip
    """Add leaves around the axis: thin bodies with a pale vein, darker towards the tip."""
    w, h = width, length
    outline = np.array([(0, h), (w / 2, h * 0.7), (w, h * 0.4), (w / 2, 2), (0, 0)]) / 100
    leaf = _lathe(outline, bend / 100, 0.08, [1, 0, 10], [1, 1, 0])
    vein = 0.2 * _smooth(0.1, 0, abs(leaf.xyz[2]) / width * 100) + 0.25 * (0.6 - leaf.s)
    leaf = replace(leaf, colour=leaf.colour * colour * (1 + vein))
    starts = [length + 360 * k / count for k in range(int(count))]  # rings start at odd places
    return parts + [_place(leaf, spin(1, a) @ spin(2, -lean), (0, y / 100, 0)) for a in starts]


def _copies(_: Variety, parts: list[Part], *spots: str) -> list[Part]:
    """Copy all parts to each "x,y,z[,lean[,pitch]]", darker where they face the middle."""
    copies = []
    for spot in spots:
        x, y, z, lean, pitch = [*map(float, spot.split(",")), 0, 0][:5]
        for part in parts:
            copy = _place(part, spin(2, -lean) @ spin(0, pitch), (x / 100, y / 100, z / 100))
            outward = np.sum(copy.xyz * copy.normal * [[1], [0.35], [1]], axis=0)
            shade = 0.45 + 0.55 * _smooth(-0.3, 0.25, outward)
            copies.append(replace(copy, colour=copy.colour * shade, gloss=copy.gloss * shade**3))
    return copies


def _turned(_: Variety, parts: list[Part], axis: float, degrees: float) -> list[Part]:
    return [_place(part, spin(int(axis), degrees)) for part in parts]


# --- more verbs: each takes the last part and returns it with another skin -----------------------


def _blush(v: Variety, part: Part, share: float) -> Part:
    """Turn the skin into the second colour on one side, in clouds and streaks."""
    streaks = _noise(part.xyz * [[1], [0.12], [1]], 14, v.salt + 1)
    side = part.normal[0] / 2 + 1.1 * _noise(part.xyz, 2.2, v.salt) + 0.35 * streaks
    t = _smooth(-0.35, 0.45, side - 0.725 + share / 100 - 0.5)
    return replace(part, colour=_mix(part.colour, v.second, t))


def _speck(v: Variety, part: Part, tint: Array, size: float, share: float) -> Part:
    mark = _smooth(share / 100, share / 100 + 0.1, _noise(part.xyz, size, v.salt + 2))
    return replace(part, colour=_mix(part.colour, tint, mark))


def _ends(_: Variety, part: Part, tint: Array, top: float, bottom: float) -> Part:
    near = np.minimum(part.s / (top + 1e-9), (1 - part.s) / (bottom + 1e-9)) * 100
    return replace(part, colour=_mix(part.colour, tint, _smooth(1, 0.5, near)))


def _tiles(v: Variety, part: Part, rows: float, columns: float, dot: float, edge: float,
           stagger: float = 0.5) -> Part:  # fmt: skip
    """Paint a dot of the second colour in each cell of a grid, and a dark line around it."""
    rho = np.hypot(*_cells(part.s, part.phi, rows, columns, stagger))
    colour = _mix(part.colour, v.second, _smooth(dot / 100 + 1e-6, dot / 200, rho))
    return replace(part, colour=colour * (1 - edge / 100 * _smooth(0.6, 1.2, rho)))


def _stripe(v: Variety, part: Part, count: float, wave: float, tint: Array | None = None) -> Part:
    """Paint stripes, by default of the second colour, along the furrows of "rib", or wavy."""
    shift = 2 * _noise(part.xyz, 5, 3) + 1.2 * _noise(part.xyz, 12, 4) - 1.6
    stripe = _smooth(-0.1, 0.4, np.cos(count * part.phi + 1.6 * wave / 100 * shift))
    return replace(part, colour=_mix(part.colour, v.second if tint is None else tint, stripe))


def _rough(_: Variety, part: Part, size: float, depth: float) -> Part:
    """Disturb the normals, for pores, fuzz or wrinkles; the shape stays."""
    shake = np.stack([_noise(part.xyz, size, k) - 0.5 for k in range(3)])
    shaken = part.normal + depth / 100 * shake
    return replace(part, normal=shaken / np.linalg.norm(shaken, axis=0))


def _half(v: Variety, part: Part, skin: float, rim: float, heart: float, seeds: float,
          count: float, pale: Array) -> Part:  # fmt: skip
    """Cut the part at z = 0: points in front of the cut are moved onto it and painted."""
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
        face = _mix(face, rgb("1c140c"), _smooth(3.5, 2.2, away))
    face = np.where(cut, _mix(face, part.colour, _smooth(skin - 2, skin + 1, rho)), part.colour)
    xyz = np.where(cut & (np.arange(3) == 2)[:, None], 0, part.xyz)
    normal = np.where(cut, [[0], [0], [1]], part.normal)
    return replace(part, xyz=xyz, normal=normal, colour=face)


_VERBS: dict[str, Callable[..., list[Part]]] = {
    "turn": _turn, "stick": _stick, "ring": _ring, "copies": _copies, "spin": _turned,
}  # fmt: skip
_SKINS: dict[str, Callable[..., Part]] = {
    "blush": _blush, "speck": _speck, "ends": _ends, "cells": _tiles, "stripe": _stripe,
    "rough": _rough, "half": _half,
}  # fmt: skip


def _word(word: str, v: Variety) -> Any:
    """Read a word of a recipe: a colour, text with "," or "=", or a number."""
    if word == "second":
        return v.second
    if re.fullmatch("[0-9a-f]{6}", word):
        return rgb(word)
    return word if "," in word or "=" in word else float(word)


def build(v: Variety) -> list[Part]:
    """Follow a variety's recipe."""
    parts: list[Part] = []
    for step in v.recipe.split(";"):
        verb, *words = step.split()
        values = [_word(word, v) for word in words]
        if verb in _VERBS:
            parts = _VERBS[verb](v, parts, *values)
        else:
            parts[-1] = _SKINS[verb](v, parts[-1], *values)
    return parts
