"""For Spark ML: the backbone as a Transformer, for one Pipeline with Spark's own stages.

Beside `pomona.spark.tasks` the only module that imports PySpark: the class has Spark's for bases.
No other module imports this one. What runs on workers is in `pomona.spark.dataframes`.
"""

from __future__ import annotations

import logging
from typing import Any

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
"""Of a saved stage. Raise it when a reader of the old one would be wrong, and keep reading that."""

INVALID = ("keep", "skip", "error")
NAMES = (
    "inputCol",
    "outputCol",
    "errorCol",
    "weights",
    "imageSize",
    "batchSize",
    "backend",
    "device",
    "vector",
    "handleInvalid",
)


def _param(name: str, doc: str, converter: Any) -> Any:
    return Param(Params._dummy(), name, doc, converter)


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
        Takes the features. Default ``features``.
    errorCol
        Takes a code where a photo can't be used, else null. Default ``error``.
    weights
        ``imagenet``, ``random:SEED``, or a file on the driver. Default POMONA_WEIGHTS, or imagenet.
    imageSize
        Side that photos are stretched to, in pixels. Default 224.
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
        What becomes of a photo that can't be used: ``keep`` its row, with null features and its
        code; ``skip`` (drop) its row; ``error`` (stop the job). Default ``keep``. Spark ML's
        estimators fail on nulls: in one Pipeline with them say ``skip``.

    Examples
    --------
    >>> stage = MobileNetV2Features(weights="random:0", handleInvalid="skip")
    >>> stage.getImageSize(), stage.getOutputCol()
    (224, 'features')
    """

    errorCol = _param("errorCol", "takes a code, or null", TypeConverters.toString)
    weights = _param("weights", "imagenet, random:SEED, or a file", TypeConverters.toString)
    imageSize = _param("imageSize", "side of the photo, in pixels", TypeConverters.toInt)
    batchSize = _param("batchSize", "photos per call of the network", TypeConverters.toInt)
    backend = _param("backend", "onnx or torch", TypeConverters.toString)
    device = _param("device", "auto, cpu or cuda", TypeConverters.toString)
    vector = _param("vector", "a vector, or array<float>", TypeConverters.toBoolean)
    handleInvalid = _param(
        "handleInvalid",
        "a photo that can't be used: keep (null and a code), skip (drop) or error",
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
        given = {name: value for name, value in locals().items() if name in NAMES}
        super().__init__()
        self._setDefault(
            inputCol="content",
            outputCol="features",
            errorCol="error",
            imageSize=224,
            backend="onnx",
            device="auto",
            vector=True,
            handleInvalid="keep",
        )
        self._found: tuple[str, Weights] | None = None
        self._made: tuple[tuple[Any, ...], BackboneSpec] | None = None
        self.setParams(**given)

    def setParams(self, **given: Any) -> MobileNetV2Features:
        """Set several at once, by the names that the constructor has; None leaves one as it is."""
        for name in given:
            if name not in NAMES:
                raise RequestError(f"there is no param {name}; there are {', '.join(NAMES)}")
        return self._set(**{name: value for name, value in given.items() if value is not None})  # type: ignore[no-any-return]

    def setInputCol(self, value: str) -> MobileNetV2Features:
        """Set ``inputCol``."""
        return self.setParams(inputCol=value)

    def setOutputCol(self, value: str) -> MobileNetV2Features:
        """Set ``outputCol``."""
        return self.setParams(outputCol=value)

    def setErrorCol(self, value: str) -> MobileNetV2Features:
        """Set ``errorCol``."""
        return self.setParams(errorCol=value)

    def getErrorCol(self) -> str:
        """Return ``errorCol``."""
        return str(self.getOrDefault(self.errorCol))

    def setWeights(self, value: str) -> MobileNetV2Features:
        """Set ``weights``."""
        return self.setParams(weights=value)

    def getWeights(self) -> str:
        """Return ``weights``: what was set, or what is taken where nothing was."""
        return str(self.getOrDefault(self.weights)) if self.isDefined("weights") else default()

    def setImageSize(self, value: int) -> MobileNetV2Features:
        """Set ``imageSize``."""
        return self.setParams(imageSize=value)

    def getImageSize(self) -> int:
        """Return ``imageSize``."""
        return int(self.getOrDefault(self.imageSize))

    def setBatchSize(self, value: int) -> MobileNetV2Features:
        """Set ``batchSize``."""
        return self.setParams(batchSize=value)

    def getBatchSize(self) -> int | None:
        """Return ``batchSize``; None where it was not set."""
        return int(self.getOrDefault(self.batchSize)) if self.isDefined("batchSize") else None

    def setBackend(self, value: str) -> MobileNetV2Features:
        """Set ``backend``."""
        return self.setParams(backend=value)

    def getBackend(self) -> str:
        """Return ``backend``."""
        return str(self.getOrDefault(self.backend))

    def setDevice(self, value: str) -> MobileNetV2Features:
        """Set ``device``."""
        return self.setParams(device=value)

    def getDevice(self) -> str:
        """Return ``device``."""
        return str(self.getOrDefault(self.device))

    def setVector(self, value: bool) -> MobileNetV2Features:
        """Set ``vector``."""
        return self.setParams(vector=value)

    def getVector(self) -> bool:
        """Return ``vector``."""
        return bool(self.getOrDefault(self.vector))

    def setHandleInvalid(self, value: str) -> MobileNetV2Features:
        """Set ``handleInvalid``."""
        return self.setParams(handleInvalid=value)

    def getHandleInvalid(self) -> str:
        """Return ``handleInvalid``."""
        return str(self.getOrDefault(self.handleInvalid))

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
        """Return the weights: read once, or brought along by the file that this was loaded from."""
        name = self.getWeights()
        if self._found is None or self._found[0] != name:
            self._found = (name, load_weights(name))
        return self._found[1]

    def _spec(self) -> BackboneSpec:
        found = self._weights()
        size, batch = self.getImageSize(), self.getBatchSize()
        key = (found.digest, size, batch, self.getBackend(), self.getDevice())
        if self._made is None or self._made[0] != key:
            spec = make_spec(
                found,
                image_size=size,
                backend=self.getBackend(),
                device=self.getDevice(),
                elsewhere=gives_gpus(),
                batch_size=batch,
            )
            self._made = (key, spec)
        return self._made[1]

    def write(self) -> MLWriter:
        """Return what saves this stage, its weights in it."""
        return _Writer(self)

    @classmethod
    def read(cls) -> MLReader:
        """Return what loads such a stage."""
        return _Reader()


def _with_vectors(frame: DataFrame, name: str) -> DataFrame:
    """Turn a column of arrays into vectors; nulls stay null."""
    column = functions.col(quoted(name))
    width = {"ml_attr": {"num_attrs": FEATURES}}  # what VectorAssembler and others ask for
    vectors = functions.when(column.isNotNull(), array_to_vector(column)).alias(
        name, metadata=width
    )
    return frame.withColumn(name, vectors)


# --- saving and loading ------------------------------------------------------------------------

CLASS = "pomona.spark.ml.MobileNetV2Features"
EARLIER_CLASSES = ("pomona.sparkml.MobileNetV2Features",)
"""What earlier versions called it; Spark ML finds it in ``saved_names/``."""
CONTENT = "kind string, content binary"
"""The weights as Spark writes them beside the metadata: a Parquet table of one row."""


class _Writer(MLWriter):
    """Writes ``metadata`` as Spark ML does, and ``weights``, on any file system of Hadoop's."""

    def __init__(self, stage: MobileNetV2Features) -> None:
        super().__init__()
        self.stage = stage

    def saveImpl(self, path: str) -> None:
        """Save to a path that doesn't exist yet."""
        found = self.stage._weights()
        about = {"format": FORMAT, "weights": found.name, "digest": found.digest}
        # Under the name that they have without a folder: the file isn't needed any more.
        named = self.stage.copy().setWeights(found.name)
        DefaultParamsWriter.saveMetadata(named, path, self.sparkSession, {"pomona": about})
        kind = "safetensors" if found.onnx is None else "onnx"
        row = [(kind, bytearray(pack(found)))]
        table = self.sparkSession.createDataFrame(row, CONTENT)
        table.coalesce(1).write.parquet(f"{path}/weights")

    def _handleOverwrite(self, path: str) -> None:
        if hasattr(self.sparkSession, "_jsparkSession"):
            super()._handleOverwrite(path)
            return
        from pyspark.ml.connect.readwrite import RemoteMLWriter

        RemoteMLWriter.handleOverwrite(path, True)


class _Reader(MLReader):
    """Reads what `_Writer` wrote."""

    def load(self, path: str) -> MobileNetV2Features:
        """Load a stage and check its weights.

        Raises
        ------
        MismatchError
            If it is something else, or its format is newer.
        WeightsError
            If the weights were changed or damaged.
        """
        spark = self.sparkSession
        metadata = DefaultParamsReader.loadMetadata(path, spark)
        about = metadata.get("pomona") or {}
        if metadata["class"] not in (CLASS, *EARLIER_CLASSES) or not isinstance(
            about.get("format"), int
        ):
            raise MismatchError(f"{path} holds {metadata['class']}, not {CLASS}")
        if about["format"] > FORMAT:
            raise MismatchError(
                f"{path} has format {about['format']}, and this Pomona reads up to {FORMAT}: "
                "update Pomona"
            )
        found = _read_weights(spark, path, about)
        stage = MobileNetV2Features()
        stage._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(stage, metadata)
        stage._found = (stage.getWeights(), found)
        return stage


def _read_weights(spark: SparkSession, path: str, about: dict[str, Any]) -> Weights:
    try:
        rows = spark.read.parquet(f"{path}/weights").collect()
    except Exception as error:
        log.exception("no weights")
        raise MismatchError(f"{path}/weights can't be read: copy the whole folder") from error
    if len(rows) != 1:
        raise MismatchError(f"{path}/weights has {len(rows)} rows, not one: save the stage again")
    kind, content = str(rows[0]["kind"]), bytes(rows[0]["content"])
    return unpack(about["weights"], kind, content, about["digest"], path)
