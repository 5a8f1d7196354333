"""What a model's folder must hold, whoever made it: `check_about`, `check_network`, `read_tensors`.

Digests show damage, not sense: a folder whose digests are right may still hold anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pomona.backbone import mobilenet
from pomona.backbone.onnx_file import check_onnx, try_network
from pomona.core.errors import MismatchError
from pomona.core.schema import FEATURES
from pomona.model.sampling import Array
from pomona.model.unknown import CENTRES, METHODS

MOST_LABELS = 100_000
SIZES = (32, 1024)
"""Of photos, in pixels: what `pomona extract --image-size` takes."""

REMEDY = "train again, or ask who made the model"

DETECTOR = "detector."
"""Prefix of the detector's tensors in ``classifier.safetensors``."""


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_text(value: object) -> bool:
    """Tell a text that can be written as UTF-8."""
    return isinstance(value, str) and value != "" and not re.search("[\ud800-\udfff]", value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_preprocessing(value: Any) -> bool:
    size: Any = value.get("image_size") if _is_object(value) else None
    if not _is_whole(size) or not SIZES[0] <= size <= SIZES[1]:
        return False
    return bool(value == mobilenet.preprocessing(size))


def _are_labels(value: Any) -> bool:
    if not isinstance(value, list) or not 2 <= len(value) <= MOST_LABELS:
        return False
    return all(_is_text(label) for label in value) and len(set(value)) == len(value)


def _is_detector(value: Any) -> bool:
    if not _is_object(value) or value.get("method") not in METHODS:
        return False
    threshold = value.get("threshold")  # −∞ where nothing could be held out
    return _is_number(threshold) and threshold < math.inf  # NaN isn't


def _are_weights(value: Any) -> bool:
    if not _is_object(value) or not isinstance(value.get("trained"), bool):
        return False
    return _is_text(value.get("name")) and _is_text(value.get("digest"))


def _are_metrics(value: Any) -> bool:
    """Tell whether what the command prints of them can be printed."""
    if not _is_object(value):
        return False
    for judged in (value.get("test"), value.get("cross_validation")):
        if judged and not _is_object(judged):
            return False
        if judged and "accuracy" in judged:
            accuracy = judged["accuracy"]
            if not _is_object(accuracy) or not _is_number(accuracy.get("value")):
                return False
            if not _is_whole(judged.get("photos")):
                return False
    return True


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "labels": (_are_labels, f"a list of 2 to {MOST_LABELS:,} different names"),
    "preprocessing": (
        _is_preprocessing,
        f"Pomona's own (docs/formats.md), with an image_size of {SIZES[0]} to {SIZES[1]}",
    ),
    "unknown": (
        _is_detector,
        f"an object with a method ({', '.join(METHODS)}) and a threshold, a number",
    ),
    "weights": (_are_weights, "an object with name, digest and trained"),
    "power": (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0 and up to 1"),
    "temperature": (lambda v: _is_number(v) and 0 < v < math.inf, "a number above 0"),
    "components": (lambda v: _is_whole(v) and 1 <= v <= FEATURES, f"a count of 1 to {FEATURES}"),
    "metrics": (_are_metrics, "an object as pomona train writes it"),
}


def check_about(about: Mapping[str, Any], where: str) -> None:
    """Check what ``model.json`` says; a MismatchError names the first field that is wrong.

    ``metrics`` may be absent.
    """
    for name, (is_right, rule) in _RULES.items():
        if name == "metrics" and name not in about:
            continue
        if not is_right(about.get(name)):
            raise MismatchError(f"{where}: {name} must be {rule}; {REMEDY}")


def check_network(content: bytes, about: Mapping[str, Any], where: str) -> None:
    """Check ``model.onnx`` against what ``model.json`` says, and try it on two pictures.

    Raises
    ------
    WeightsError
        As `check_onnx` and `try_network`: it isn't ONNX, holds what it must not, or its input and
        outputs don't fit labels, components and image size.
    """
    check_onnx(content, where)
    widths: dict[str, tuple[int, ...]] = {
        "probabilities": (len(about["labels"]),),
        "score": (),
        "pca_features": (about["components"],),
        "features": (FEATURES,),
    }
    try_network(content, about["preprocessing"]["image_size"], widths, where)


def read_tensors(content: bytes, about: Mapping[str, Any], where: str) -> dict[str, Array]:
    """Return the tensors of ``classifier.safetensors``, which must fit ``model.json``.

    Raises
    ------
    MismatchError
        If it is no safetensors file, or a tensor is missing, has another shape, or holds numbers
        that aren't finite. The bias may be −∞ for labels that training didn't see.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(content)
    except (SafetensorError, TypeError, ValueError, KeyError) as error:  # types that NumPy lacks
        raise MismatchError(f"{where} is no safetensors file of numbers: {REMEDY}") from error
    labels, k = len(about["labels"]), about["components"]
    shapes = {
        "mean": (FEATURES,),
        "linear": (k, FEATURES),
        "weight": (labels, k),
        "bias": (labels,),
    }
    if about["unknown"]["method"] in CENTRES:
        centres = tensors.get(f"{DETECTOR}centres", np.zeros(0))
        count = max(1, *centres.shape[:1])  # as many as there are
        shapes |= {f"{DETECTOR}whitening": (k, k), f"{DETECTOR}centres": (count, k)}
    for name, shape in shapes.items():
        value = tensors.get(name)
        if value is None or value.shape != shape or value.dtype.kind != "f":
            wanted = f"{name}, floating point {list(shape)}"
            raise MismatchError(f"{where} has no tensor {wanted}, as model.json says: {REMEDY}")
        numbers = value[value != -np.inf] if name == "bias" else value
        if not numbers.size or not np.isfinite(numbers).all():
            raise MismatchError(f"{where}: numbers of {name} are not finite: {REMEDY}")
    return tensors
