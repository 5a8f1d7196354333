"""Answer what is on photos: here and now, or as a service."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

import pomona
from pomona.cli import render
from pomona.cli.options import (
    ANSWER,
    CsvSafe,
    Device,
    ErrorRate,
    Master,
    SparkConf,
    Workers,
    cluster,
    command,
)
from pomona.cli.work import progress, show
from pomona.core.errors import MissingError, RequestError
from pomona.core.printable import escaped
from pomona.core.uris import is_store, refuse_uri

if TYPE_CHECKING:
    from pomona.serving.app import Settings

MOST_IN_A_TABLE = 2000
"""Photos whose answers a person may read."""

ModelName = Annotated[
    str | None,
    "A model: OUT/model, its URI (s3://, gs://), or models:/NAME@champion. [default: the one in "
    "the package]",
]

Verify = Annotated[
    str | None,
    "Take the model only if this signer signed it: a public key's file, or "
    "IDENTITY@https://ISSUER.",
]


def _open_model(name: str | None, verify: str | None) -> pomona.Model:
    if name is None:
        from pomona.model.artifact import PACKAGED

        return pomona.load_model(PACKAGED, verify=verify)
    if is_store(name):
        from pomona.workspace.remote import fetch_model

        return pomona.load_model(fetch_model(name), verify=verify)
    if name.startswith(("models:/", "runs:/")):
        from pomona.registry.publish import fetch

        return pomona.load_model(fetch(name, verify), verify=verify)
    return pomona.load_model(name, verify=verify)


@command(ANSWER)
def predict(
    photos: Annotated[
        list[str], Argument(help="Photos, folders, URIs (s3://, gs://), or - for standard input.")
    ],
    *,
    model: ModelName = None,
    verify: Verify = None,
    top: Annotated[int, "How many labels to give for each photo."] = 3,
    out: Annotated[str | None, "A new folder for the answers, as Parquet."] = None,
    device: Device = "auto",
    workers: Workers = None,
    master: Master = None,
    spark_conf: SparkConf = None,
    error_rate: ErrorRate,
    as_json: Annotated[bool, Option("--json", help="One JSON object a line.")] = False,
    as_csv: Annotated[bool, Option("--csv", help="CSV with a header.")] = False,
    csv_safe: CsvSafe = False,
) -> None:
    """Say what is on photos. Killed, with --out, it goes on where it stopped."""
    from pomona.cli import answers
    from pomona.photos import isolation
    from pomona.pipeline.predict import PredictOptions, predict

    if out:
        refuse_uri(out, "--out")
    if as_json and as_csv:
        raise RequestError("--json or --csv, not both")
    if csv_safe and not as_csv:
        raise RequestError("--csv-safe goes with --csv")
    most = None if as_json or as_csv else MOST_IN_A_TABLE
    where = cluster(workers, master, spark_conf)
    options = PredictOptions(top, device, out, most, where)
    if master is None:
        isolation.start()  # while the model is read
    opened = _open_model(model, verify)
    if model is None:
        typer.echo(f"pomona: {escaped(render.which(opened))}", err=True)
    printer = answers.printer(sys.stdout, opened, as_json=as_json, as_csv=as_csv, csv_safe=csv_safe)
    with printer as on_answers, progress() as on_tick:
        record = predict(photos, opened, options, on_tick, on_answers)
    if out:
        show(record, as_json, answers.summary)
    error_rate.exit_if_above(record)


@dataclass(frozen=True)
class ServeArguments:
    """Whom the service answers, and how much it takes."""

    model: ModelName = None
    verify: Verify = None
    host: Annotated[str, "The address to answer at."] = "127.0.0.1"
    port: Annotated[int, "The port; 0: any that is free."] = 8000
    api_key: Annotated[
        list[str] | None,
        "A key that requests must bring; repeatable. Others on this machine can see it: "
        "POMONA_API_KEYS (with commas between) is better.",
    ] = None
    public: Annotated[bool, "Answer everybody who reaches --host, without a key."] = False
    workers: Annotated[int | None, "Photos processed at a time. [default: one per core]"] = None
    queue: Annotated[int | None, "Photos that may wait; beyond, 503. [default: 16 a worker]"] = None
    max_mb: Annotated[float, "Largest request, in MB."] = 20
    max_photos: Annotated[int, "Most photos in a request."] = 16
    max_megapixels: Annotated[
        float,
        "Pixels that a photo is decoded to at most, in millions; JPEGs are decoded at a fraction.",
    ] = 24
    watch: Annotated[float, "Seconds between checks for another model; 0: none."] = 0
    allow_origin: Annotated[
        list[str] | None, "A web site whose pages may ask (CORS), https://…; repeatable."
    ] = None
    allow_host: Annotated[
        list[str] | None,
        "Without keys: a name that requests may call the service by, as a proxy passes it on; "
        "repeatable; *: any. Its addresses, localhost and --host always are.",
    ] = None
    isolate: Annotated[
        bool,
        "Decode all photos in child processes, not only costly ones: one that crashes the decoder "
        "harms no other.",
    ] = False
    device: Device = "auto"
    quiet: Annotated[bool, "No access log."] = False

    def settings(self) -> Settings:
        """Return the service's settings; keys also come from ``POMONA_API_KEYS``."""
        from pomona.serving.app import Settings
        from pomona.serving.server import own_names
        from pomona.serving.uploads import Limits

        counts = [n for n in (self.workers, self.queue, self.max_photos) if n is not None]
        sizes = 0 < self.max_mb <= 128 and 0 < self.max_megapixels <= 64
        if min(counts) < 1 or not sizes or self.watch < 0:
            raise RequestError(
                "--workers, --queue and --max-photos are at least 1, --max-mb is above 0 and up to "
                "128, --max-megapixels above 0 and up to 64, --watch isn't negative"
            )
        from_environment = os.environ.get("POMONA_API_KEYS", "").split(",")
        given = (*(self.api_key or ()), *(key.strip() for key in from_environment))
        keys = tuple(filter(None, given))
        return Settings(
            keys=keys,
            limits=Limits(int(self.max_mb * 1e6), self.max_photos),
            queue=self.queue,
            workers=self.workers,
            device=self.device,
            watch=self.watch,
            origins=tuple(self.allow_origin or ()),
            hosts=own_names(self.host, self.allow_host or (), keys),
            guard="child" if self.isolate else "",
            pixels=int(self.max_megapixels * 1e6),
        )


@command(ANSWER)
def serve(arguments: ServeArguments) -> None:
    """Answer over HTTP, with a page to try it. Ends calmly on Ctrl-C or SIGTERM."""
    try:
        from pomona.serving import server
        from pomona.serving.app import create
    except ImportError as error:
        raise MissingError(
            f"serve needs more packages ({error.name}): pip install 'pomona[serve]'"
        ) from error

    settings = arguments.settings()
    server.check_access(arguments.host, settings.keys, public=arguments.public)
    server.log_to_stderr(access=not arguments.quiet)
    with server.listen(arguments.host, arguments.port) as socket:
        app = create(lambda: _open_model(arguments.model, arguments.verify), settings)

        def on_start() -> None:
            model = app.state.service.pool.loaded.model
            url = server.address(socket)
            typer.echo(f"pomona: {escaped(render.which(model))}", err=True)
            typer.echo(f"pomona: {url} answers; the page is there too. Ctrl-C ends it.", err=True)

        server.serve(app, socket, on_start)
