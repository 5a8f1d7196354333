"""A registered model as MLflow runs it: ``mlflow models serve``, ``mlflow.pyfunc.load_model``.

`save` writes it. To run it MLflow calls `_load_pyfunc` with the model's folder: nothing is
unpickled, and few of Pomona's dependencies are needed.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

import pomona
from pomona.model import artifact
from pomona.model.artifact import Model
from pomona.model.recogniser import ANSWERS, answer_photos, make_recogniser

COLUMN = "image"
"""Input column: a photo's file as bytes, or as base64 text."""
FOLDER = "data/model"
"""Where the model's files lie in a version."""
TOP = 3
"""Default number of labels for each photo."""
NOT_A_FILE = b"\0"
"""Replaces text that isn't base64, so that its row says ``not_an_image``."""

REQUIREMENTS = (
    "mlflow",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "pandas",
    "pillow",
    "pyarrow",
    "safetensors",
)
"""Packages that serving imports, if installed here. Pomona itself is part of the version."""

_TYPES = {pa.string(): "string", pa.bool_(): "boolean", pa.float32(): "float"}


def _load_pyfunc(path: str) -> Served:
    """Read and check the model. MLflow calls a function of this name."""
    return Served(artifact.load_model(Path(path)))


class Served:
    """A model behind MLflow's interface."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Recognise the photos of a DataFrame's column ``image``, or of a list of dicts.

        ``params`` may hold ``top``: how many labels to give for each photo. Returns a DataFrame of
        a row for each photo, in the same order, with the columns of `ANSWERS`. Cells are Python
        objects, so that a missing value becomes null in JSON.
        """
        import pandas

        top = int((params or {}).get("top", TOP))
        images = [row[COLUMN] for row in data] if isinstance(data, list) else list(data[COLUMN])
        recogniser = make_recogniser(self.model, top)
        rows = answer_photos([content(image) for image in images], recogniser)
        return pandas.DataFrame(rows, columns=ANSWERS.names, dtype=object)


def content(image: Any) -> bytes | None:
    """Return a photo's file; None, which gives ``unreadable``, if the cell is empty."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if image is None or isinstance(image, float):  # pandas' missing value is NaN
        return None
    try:
        return base64.b64decode("".join(str(image).split()), validate=True)
    except (binascii.Error, ValueError):
        return NOT_A_FILE


def save(folder: Path, model: Model, run: str, logged: Any) -> None:
    """Write MLflow's form of the model: no pickle, and no input example (photos are private)."""
    import mlflow.pyfunc
    from mlflow.models import Model as Description

    description = Description(
        artifact_path=logged.artifact_location,
        run_id=run,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
    )
    mlflow.pyfunc.save_model(
        str(folder),
        mlflow_model=description,
        loader_module=__name__,
        data_path=str(model.folder),
        # Pomona is in no package index, and the same code gives the same answers.
        code_paths=[str(Path(pomona.__file__).parent)],
        pip_requirements=_requirements(),
        signature=_signature(),
    )


def _requirements() -> list[str]:
    pins = []
    for name in REQUIREMENTS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            pins.append(f"{name}=={metadata.version(name)}")
    return pins


def _signature() -> Any:
    """Return MLflow's schema of input and output. ``image`` is declared as text; bytes pass too."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    def kind(arrow: pa.DataType) -> Any:
        if pa.types.is_list(arrow):
            return Array(kind(arrow.value_type))
        return DataType[_TYPES[arrow]]

    columns = [ColSpec(kind(field.type), field.name, required=False) for field in ANSWERS]
    params = ParamSchema([ParamSpec("top", DataType.long, TOP)])
    return ModelSignature(Schema([ColSpec(DataType.string, COLUMN)]), Schema(columns), params)
