"""Spark ML: the backbone as a Transformer, a stage of a Pipeline with Spark's own stages.

The only module that imports PySpark at its top, since its class derives from PySpark's; no other
module imports it. Worker code is in `pomona.spark.dataframes`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from pyspark.ml import Transformer
from pyspark.ml.functions import array_to_vector
from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import HasInputCol, HasOutputCol
from pyspark.ml.util import (
    DefaultParamsReader,
    DefaultParamsWriter,
    MLReadable,
    MLReader,
    MLWritable,
    MLWriter,
)
from pyspark.sql import DataFrame, SparkSession, functions

from pomona.backbone.spec import BackboneSpec, make_spec
from pomona.backbone.weights import Weights, default, load_weights, pack, unpack
from pomona.core.errors import MismatchError, RequestError
from pomona.core.schema import FEATURES, quoted
from pomona.spark.dataframes import add_features
from pomona.spark.resources import gives_gpus

log = logging.getLogger("pomona")

FORMAT = 1
"""Format of a saved stage. Raise it when old readers would misread; keep reading old formats."""

INVALID = ("keep", "skip", "error")


def _param(name: str, doc: str, converter: Any) -> Any:
    return Param(Params._dummy(), name, doc, converter)


T = TypeVar("T")
M = TypeVar("M", bound=Callable[..., Any])


def _setter(name: str, kind: type[T]) -> Callable[[Any, T], MobileNetV2Features]:
    """Make the method ``setName`` of a param, as Spark ML's stages have it."""

    def setter(self: Any, value: Any) -> Any:
        return self.setParams(**{name: value})

    return _named(setter, "set", name, value=kind)


def _getter(name: str, kind: type[T]) -> Callable[[Any], T]:
    """Make the method ``getName`` of a param that has a default."""

    def getter(self: Any) -> Any:
        return self.getOrDefault(name)

    return _named(getter, "get", name, **{"return": kind})


def _named(method: M, verb: str, param: str, **annotations: Any) -> M:
    """Give a method the name, docstring and signature that help() shows."""
    method.__name__ = f"{verb}{param[0].upper()}{param[1:]}"
    method.__qualname__ = f"MobileNetV2Features.{method.__name__}"
    method.__doc__ = f"{'Set' if verb == 'set' else 'Return'} ``{param}``."
    method.__annotations__ = annotations
    return method


class MobileNetV2Features(Transformer, HasInputCol, HasOutputCol, MLReadable, MLWritable):
    """Photos become features: a stage of a Spark ML Pipeline.

    All columns stay, in their order; rows out equal rows in, unless ``handleInvalid`` says skip.
    A saved stage holds the weights; loading checks them and runs no code from the files.

    Parameters
    ----------
    inputCol
        A column of bytes (binary), or of paths and URIs that workers can read (string).
        Default ``content``.
    outputCol
        New column of features. Default ``features``.
    errorCol
        New column of error codes, null where a photo has features. Default ``error``.
    weights
        ``imagenet``, ``random:SEED``, or a file on the driver. Default POMONA_WEIGHTS, or imagenet.
    imageSize
        Side of the square that photos are stretched to, in pixels. Default 224.
    batchSize
        Photos per call of the network. Default 8, on a GPU 128.
    backend
        ``onnx`` or ``torch``. Default ``onnx``.
    device
        ``auto``, ``cpu`` or ``cuda``. Default ``auto``.
    vector
        Whether features are a vector, as Spark ML's stages take them, or array<float>.
        Default True.
    handleInvalid
        What happens to a photo that can't be used: ``keep`` its row, with null features and its
        error code; ``skip`` (drop) its row; ``error`` (stop the job). Default ``keep``. Spark ML's
        estimators fail on nulls: use ``skip`` in a Pipeline with them.

    Examples
    --------
    >>> stage = MobileNetV2Features(weights="random:0", handleInvalid="skip")
    >>> stage.getImageSize(), stage.getOutputCol()
    (224, 'features')
    """

    errorCol = _param("errorCol", "new column of error codes, or null", TypeConverters.toString)
    weights = _param("weights", "imagenet, random:SEED, or a file", TypeConverters.toString)
    imageSize = _param("imageSize", "side of the photo, in pixels", TypeConverters.toInt)
    batchSize = _param("batchSize", "photos per call of the network", TypeConverters.toInt)
    backend = _param("backend", "onnx or torch", TypeConverters.toString)
    device = _param("device", "auto, cpu or cuda", TypeConverters.toString)
    vector = _param("vector", "a vector, or array<float>", TypeConverters.toBoolean)
    handleInvalid = _param(
        "handleInvalid",
        "a photo that can't be used: keep (null and an error code), skip (drop) or error",
        TypeConverters.toString,
    )

    def __init__(
        self,
        *,
        inputCol: str | None = None,
        outputCol: str | None = None,
        errorCol: str | None = None,
        weights: str | None = None,
        imageSize: int | None = None,
        batchSize: int | None = None,
        backend: str | None = None,
        device: str | None = None,
        vector: bool | None = None,
        handleInvalid: str | None = None,
    ) -> None:
        params = {name: value for name, value in locals().items() if name in NAMES}
        super().__init__()
        columns = {"inputCol": "content", "outputCol": "features", "errorCol": "error"}
        self._setDefault(**columns, vector=True, handleInvalid="keep")
        self._setDefault(imageSize=224, backend="onnx", device="auto")
        self._read: tuple[str, Weights] | None = None  # the param `weights`, and what it names
        self._made: tuple[tuple[Any, ...], BackboneSpec] | None = None  # its settings, the spec
        self.setParams(**params)

    def setParams(self, **params: Any) -> MobileNetV2Features:
        """Set several params by name; None leaves one as it is."""
        for name in params:
            if name not in NAMES:
                raise RequestError(f"there is no param {name}; there are {', '.join(NAMES)}")
        return self._set(**{name: value for name, value in params.items() if value is not None})  # type: ignore[no-any-return]

    setInputCol = _setter("inputCol", str)
    setOutputCol = _setter("outputCol", str)
    setErrorCol = _setter("errorCol", str)
    getErrorCol = _getter("errorCol", str)
    setWeights = _setter("weights", str)
    setImageSize = _setter("imageSize", int)
    getImageSize = _getter("imageSize", int)
    setBatchSize = _setter("batchSize", int)
    setBackend = _setter("backend", str)
    getBackend = _getter("backend", str)
    setDevice = _setter("device", str)
    getDevice = _getter("device", str)
    setVector = _setter("vector", bool)
    getVector = _getter("vector", bool)
    setHandleInvalid = _setter("handleInvalid", str)
    getHandleInvalid = _getter("handleInvalid", str)

    def getWeights(self) -> str:
        """Return ``weights``; if not set, POMONA_WEIGHTS or imagenet."""
        return str(self.getOrDefault(self.weights)) if self.isDefined("weights") else default()

    def getBatchSize(self) -> int | None:
        """Return ``batchSize``; None if it was not set."""
        return int(self.getOrDefault(self.batchSize)) if self.isDefined("batchSize") else None

    def _transform(self, dataset: DataFrame) -> DataFrame:
        invalid = self.getHandleInvalid()
        if invalid not in INVALID:
            raise RequestError(f"handleInvalid is {', '.join(INVALID)}, not {invalid}")
        output, error = self.getOutputCol(), self.getErrorCol()
        frame = add_features(
            dataset, self.getInputCol(), self._spec(), output, error, strict=invalid == "error"
        )
        if invalid == "skip":
            frame = frame.where(functions.col(quoted(error)).isNull())
        return _with_vectors(frame, output) if self.getVector() else frame

    def _weights(self) -> Weights:
        """Return the weights, which are read once, or came with a saved stage."""
        name = self.getWeights()
        if self._read is None or self._read[0] != name:
            self._read = (name, load_weights(name))
        return self._read[1]

    def _spec(self) -> BackboneSpec:
        weights = self._weights()
        settings: dict[str, Any] = {
            "image_size": self.getImageSize(),
            "backend": self.getBackend(),
            "device": self.getDevice(),
            "batch_size": self.getBatchSize(),
        }
        key = (weights.digest, *settings.values())
        if self._made is None or self._made[0] != key:
            self._made = (key, make_spec(weights, elsewhere=gives_gpus(), **settings))
        return self._made[1]

    def write(self) -> MLWriter:
        """Return the writer that saves this stage with its weights."""
        return _Writer(self)

    @classmethod
    def read(cls) -> MLReader:
        """Return the reader that loads such a stage."""
        return _Reader()


NAMES = tuple(inspect.signature(MobileNetV2Features).parameters)
"""Its params, in this order."""


def _with_vectors(frame: DataFrame, name: str) -> DataFrame:
    """Turn a column of arrays into vectors; nulls stay null."""
    column = functions.col(quoted(name))
    width = {"ml_attr": {"num_attrs": FEATURES}}  # VectorAssembler and other stages read it
    vectors = functions.when(column.isNotNull(), array_to_vector(column))
    return frame.withColumn(name, vectors.alias(name, metadata=width))


CLASS = "pomona.spark.ml.MobileNetV2Features"
EARLIER_CLASSES = ("pomona.sparkml.MobileNetV2Features",)
"""Names in earlier versions; Spark ML finds them in ``saved_names/``."""
CONTENT = "kind string, content binary"
"""Schema of the saved weights, beside the metadata: a Parquet table of one row."""


class _Writer(MLWriter):
    """Write ``metadata`` as Spark ML does, and ``weights``, to any file system of Hadoop's."""

    def __init__(self, stage: MobileNetV2Features) -> None:
        super().__init__()
        self.stage = stage

    def saveImpl(self, path: str) -> None:
        """Save to a path that doesn't exist yet."""
        weights = self.stage._weights()
        about = {"format": FORMAT, "weights": weights.name, "digest": weights.digest}
        # Without the folder of the weights' file, which a saved stage doesn't need any more.
        stage = self.stage.copy().setWeights(weights.name)
        DefaultParamsWriter.saveMetadata(stage, path, self.sparkSession, {"pomona": about})
        kind = "safetensors" if weights.onnx is None else "onnx"
        row = (kind, bytearray(pack(weights)))
        table = self.sparkSession.createDataFrame([row], CONTENT)
        table.coalesce(1).write.parquet(f"{path}/weights")

    def _handleOverwrite(self, path: str) -> None:
        if hasattr(self.sparkSession, "_jsparkSession"):
            super()._handleOverwrite(path)
            return
        from pyspark.ml.connect.readwrite import RemoteMLWriter

        RemoteMLWriter.handleOverwrite(path, True)


class _Reader(MLReader):
    """Read what `_Writer` wrote."""

    def load(self, path: str) -> MobileNetV2Features:
        """Load a stage and check its weights. Runs no code from the files.

        Raises MismatchError if the folder holds something else or its format is newer, and
        WeightsError if the weights were changed or damaged.
        """
        spark = self.sparkSession
        metadata = DefaultParamsReader.loadMetadata(path, spark)
        about = metadata.get("pomona") or {}
        is_ours = metadata["class"] in (CLASS, *EARLIER_CLASSES)
        if not is_ours or not isinstance(about.get("format"), int):
            raise MismatchError(f"{path} holds {metadata['class']}, not {CLASS}")
        if about["format"] > FORMAT:
            raise MismatchError(
                f"{path} has format {about['format']}, and this Pomona reads up to {FORMAT}: "
                "update Pomona"
            )
        weights = _read_weights(spark, path, about)
        stage = MobileNetV2Features()
        stage._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(stage, metadata)
        stage._read = (stage.getWeights(), weights)
        return stage


def _read_weights(spark: SparkSession, path: str, about: dict[str, Any]) -> Weights:
    try:
        rows = spark.read.parquet(f"{path}/weights").collect()
    except Exception as error:
        log.exception("the weights of a saved stage can't be read")
        raise MismatchError(f"{path}/weights can't be read: copy the whole folder") from error
    if len(rows) != 1:
        raise MismatchError(f"{path}/weights has {len(rows)} rows, not one: save the stage again")
    kind, content = str(rows[0]["kind"]), bytes(rows[0]["content"])
    return unpack(about["weights"], kind, content, about["digest"], path)
