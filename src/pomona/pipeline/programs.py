"""What programs and notebooks call beside the stages: read OUT, list photos, ask a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pomona.backbone.spec import find_device
from pomona.core.errors import RequestError
from pomona.core.files import read_json
from pomona.core.schema import FEATURES_TABLE, SPLITS
from pomona.model.artifact import PACKAGED, Model, load_model
from pomona.model.pca_table import FOLDERS, Photos, read_photos
from pomona.model.projection import Projection, load_projection
from pomona.model.recogniser import answer_photos, for_driver, make_recogniser
from pomona.photos.source import arrange, open_source
from pomona.pipeline.engines import open_engine
from pomona.pipeline.extract import list_source
from pomona.pipeline.predict import PredictOptions
from pomona.pipeline.predict import predict as predict_files
from pomona.pipeline.status import status
from pomona.registry.tracking import store_of, without_password
from pomona.spark.resources import local_master
from pomona.spark.session import Cluster, session
from pomona.workspace import feature_table, layout


@dataclass(frozen=True)
class Results:
    """A folder OUT, to read from. Each call reads what is there then; nothing is kept.

    Attributes
    ----------
    folder
        The folder's absolute path.
    """

    folder: Path

    @property
    def report(self) -> Path:
        """The report, an HTML page that needs no network."""
        return layout.Out(self.folder).report / "report.html"

    @property
    def model_folder(self) -> Path:
        """The model's folder, as `load_model` and ``pomona serve --model`` take it."""
        return layout.Out(self.folder).model

    def status(self) -> dict[str, Any]:
        """Return ``photos``, ``done``, ``rejected``, ``todo`` and more, as ``pomona status``."""
        return status(self.folder)

    def manifest(self) -> dict[str, Any]:
        """Return what ran: settings, versions, digests, counts and timings by stage."""
        return read_json(layout.Out(self.folder).manifest)

    def metrics(self) -> dict[str, Any]:
        """Return every figure of the model with its interval; {} before ``train``."""
        return read_json(layout.Out(self.folder).metrics)

    def mlflow_store(self) -> str:
        """Return where runs of this OUT are recorded, as it may be shown."""
        return without_password(store_of(layout.Out(self.folder)))

    def features(self, rows: int | None = None) -> pa.Table:
        """Return the table of features, or its first ``rows`` rows (docs/formats.md).

        ``features`` is a list of 1280 float32, null where ``error`` holds a code. 5 kB a photo.
        """
        hive = ds.partitioning(pa.schema([FEATURES_TABLE.field("split")]), flavor="hive")
        files = [str(path) for path in sorted(layout.Out(self.folder).features.rglob("*.parquet"))]
        dataset = ds.dataset(files, FEATURES_TABLE, partitioning=hive)
        names = FEATURES_TABLE.names
        return dataset.to_table(names) if rows is None else dataset.head(rows, columns=names)

    def rejected(self) -> pa.Table:
        """Return ``path``, ``split``, ``label`` and ``error`` of the photos without features."""
        out = layout.Out(self.folder)
        rows = feature_table.index(out, out.work / "none", damaged="skip").rows
        return rows.filter(pc.is_valid(rows["error"])).select(["path", "split", "label", "error"])

    def pca(self, split: str = "Training", rows: int = 1_000_000) -> Photos:
        """Return ``paths``, ``labels`` and ``z``, the pca_features, float32 [n, k], of one split.

        Above ``rows`` it is a sample, stratified by label.
        """
        if split not in FOLDERS:
            raise RequestError(f"a split is {' or '.join(SPLITS)}, not {split}")
        return read_photos(layout.Out(self.folder), FOLDERS[split], rows)

    def projection(self) -> Projection:
        """Return scaler and PCA: ``mean``, ``explained_variance_ratio``, ``transform`` and more."""
        return load_projection(layout.Out(self.folder).projection)

    def model(self) -> Model:
        """Return the model, checked, as `load_model` does."""
        return load_model(self.model_folder)


def open_out(out: str | Path, *, must_exist: bool = True) -> Results:
    """Open a folder OUT; with ``must_exist=False`` it is made if it isn't there.

    Raises
    ------
    RequestError
        If it isn't there, can't be made, or holds results of something else.
    """
    return Results(layout.open_out(out, must_exist=must_exist).root)


def list_photos(
    source: str | Path, label: str = "parent", test_fraction: float | None = None
) -> pa.Table:
    """List a source: ``path``, ``split``, ``label``, ``filename``, ``size``, ``modified``.

    No photo is read. A source that only Hadoop knows takes Spark: the active session, or a new one.

    Parameters
    ----------
    label, test_fraction
        As ``pomona extract`` takes them.
    """
    place = open_source(source)
    with open_engine(Cluster(), needs_spark=place.kind == "hadoop") as engine:
        listing = list_source(place, engine)
    return arrange(listing.files, label, test_fraction, root=place.folder)


@contextlib.contextmanager
def spark_session(
    master: str = "local[*]", conf: Mapping[str, str] | None = None, log_file: Path | None = None
) -> Iterator[Any]:
    """Give the active Spark session, left running afterwards, or a new one, stopped then.

    Parameters
    ----------
    master
        Spark's master; where a GPU is seen, ``local[*]`` has as many slots as it serves.
    conf
        Further settings of Spark.
    log_file
        Takes what the JVM and the workers print.
    """
    master = local_master(master, find_device("onnx", "auto"))
    with session(Cluster(master, tuple((conf or {}).items()), log_file)) as spark:
        yield spark


def predict(
    photos: str | Path | bytes | Sequence[str | Path | bytes],
    model: Model | str | Path | None = None,
    top: int = 3,
) -> list[dict[str, Any]]:
    """Say what photos show.

    Parameters
    ----------
    photos
        One or more: files, folders, URIs (``s3://``, ``gs://``), or a photo's bytes.
    model
        What `load_model` returned, or a model's folder; by default the model in the package.
    top
        How many labels to give for each photo.

    Returns
    -------
    list of dict
        One for each photo: ``path`` (None for bytes), ``label`` (None: unknown, or the photo can't
        be used), ``probability``, ``unknown``, ``reason``, ``score``, ``nearest``,
        ``probabilities``, ``error`` (a code, or None).

    Raises
    ------
    RequestError
        If there is no such photo or model. A photo that can't be used is an answer with an error.

    Examples
    --------
    >>> import io
    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (100, 100), "white").save(file, "PNG")
    >>> [answer["unknown"] for answer in predict([file.getvalue(), file.getvalue()])]
    [True, True]
    """
    if not isinstance(model, Model):
        model = load_model(model or PACKAGED)
    items = [photos] if isinstance(photos, str | Path | bytes) else list(photos)
    recogniser = for_driver(make_recogniser(model, top))
    answers: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, bytes):
            answers += [{"path": None, **row} for row in answer_photos([item], recogniser)]
        else:
            batches: list[pa.RecordBatch] = []
            predict_files([str(item)], model, PredictOptions(top), on_answers=batches.append)
            answers += [row for batch in batches for row in batch.to_pylist()]
    return answers
