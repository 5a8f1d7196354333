"""A small model, a service that runs for all tests that don't change it, and visitors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pomona.model.artifact import Model
from tests.conftest import chromium
from tests.trained_model import make_model
from tests.web.visitor import LABELS, SIZE, Served, Visitor, fruit, serve


@pytest.fixture(scope="package")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    contents = [fruit(label, n) for label in range(6) for n in range(20)]
    labels = [LABELS[label] for label in range(6) for _ in range(20)]
    folder = tmp_path_factory.mktemp("small") / "model"
    return make_model(folder, "random:0", contents, labels, SIZE)


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visitor]]:
    all_of_them: list[Visitor] = []

    def come(url: str, **options: Any) -> Visitor:
        all_of_them.append(Visitor(browser, url, **options))
        return all_of_them[-1]

    yield come
    for visitor in all_of_them:
        visitor.close()


@pytest.fixture(scope="package")
def served(small: Model) -> Iterator[Served]:
    with serve(small) as running:
        yield running
