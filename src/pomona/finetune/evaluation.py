"""How good weights are on photos without augmentation. Needs torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pomona.finetune.dataset import Codes, Dataset
from pomona.finetune.network import Network, features_of


def evaluate(network: Network, dataset: Dataset, rows: Codes, device: str) -> dict[str, float]:
    """Return `metrics` of a network on rows of a dataset."""
    features = features_of(network, dataset.photos, rows, device)
    with torch.inference_mode():
        logits = network.heads["label"](features).cpu().numpy()
    return metrics(logits, dataset.labels[rows], dataset.groups[rows])


def metrics(logits: npt.NDArray[np.float32], labels: Codes, groups: Codes) -> dict[str, float]:
    """Return the accuracy over photos, and accuracy and cross-entropy as means over groups.

    Parameters
    ----------
    logits
        [n, labels].
    labels, groups
        Codes [n]. Without photos there are no metrics.
    """
    if not len(labels):
        return {}
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    right = logits.argmax(axis=1) == labels
    weight = 1 / np.bincount(groups)[groups]
    return {
        "accuracy": round(float(right.mean()), 5),
        "accuracy_by_group": round(float(np.average(right, weights=weight)), 5),
        "loss": round(float(np.average(losses, weights=weight)), 5),
    }


def sort_key(evaluation: Mapping[str, Any]) -> tuple[float, float]:
    """Return the sort key of evaluations: higher accuracy by group, then lower loss."""
    return (evaluation.get("accuracy_by_group", -1.0), -evaluation.get("loss", math.inf))
