"""A small model, and one service that answers with it for all tests that don't change it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pomona.model.artifact import Model
from tests.conftest import photo
from tests.trained_model import make_model

SIZE = 32


def trained(folders: pytest.TempPathFactory, weights: str) -> Model:
    pytest.importorskip("sklearn")
    contents = [photo(1000 * (n % 3) + n) for n in range(36)]
    labels = ["a", "b", "ünknown"] * 12
    return make_model(folders.mktemp("served") / "model", weights, contents, labels, SIZE)


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return trained(tmp_path_factory, "fruits")


@pytest.fixture(scope="package")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return trained(tmp_path_factory, "random:1")


@pytest.fixture(scope="package")
def url(model: Model) -> Iterator[str]:
    from pomona.serving.app import Settings, create
    from tests.service import running

    with running(create(lambda: model, Settings(workers=2))) as address:
        yield address
