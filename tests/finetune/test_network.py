"""The network: its features are `extract`'s, before training and in the weights it becomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pomona.backbone import extract, mobilenet
from pomona.backbone.spec import make_spec
from pomona.backbone.weights import Weights
from pomona.finetune.network import Network, build, features_of, weights_of
from pomona.photos import decoding
from tests.conftest import photo


def extracted(state: dict[str, Any], content: bytes) -> Any:
    spec = make_spec(Weights("a", "b", state=state), image_size=32, backend="onnx", device="cpu")
    batch = pa.record_batch({"path": ["a"], "content": pa.array([content], pa.binary())})
    (rows,) = list(extract.extract(iter([batch]), spec))
    return np.array(rows["features"][0].as_py(), np.float32)


@pytest.mark.parametrize("folded", [False, True])
def test_before_the_first_step_features_are_extract_s(
    folded: bool, statistics: dict[str, Any]
) -> None:
    """Folded or not: what is trained starts as the network that extract runs."""
    state = mobilenet.unfolded(mobilenet.folded(statistics)) if folded else statistics
    content = photo()
    wanted = extracted(state, content)
    pixels = decoding.decode(content, 32).pixels
    assert pixels is not None
    for norm in (False, True):
        network = build(state, {}, norm=norm)
        features = features_of(network, pixels[None], np.array([0]), "cpu")[0].numpy()
        assert np.allclose(features, wanted, rtol=1e-4, atol=1e-4)
        assert set(weights_of(Network({}, norm=norm))) == set(mobilenet.shapes())
        assert np.allclose(extracted(weights_of(network), content), wanted, rtol=1e-4, atol=1e-4)
