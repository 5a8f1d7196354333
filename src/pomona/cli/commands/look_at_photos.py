"""Look at photos: what a source holds, a part of it, and rendered ones to try things with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument

import pomona
from pomona.cli import render
from pomona.cli.options import (
    PHOTOS,
    AsJson,
    Label,
    LocalOut,
    Master,
    SourceName,
    Workers,
    cluster,
    command,
)
from pomona.cli.work import counter, log_to, progress, show, show_run
from pomona.core.errors import RequestError
from pomona.core.progress import OnTick, Tick
from pomona.core.uris import refuse_uri

if TYPE_CHECKING:
    from pomona.photos.listing import Listing
    from pomona.photos.source import Source


@command(PHOTOS)
def inspect(source: SourceName, label: Label = "parent", as_json: AsJson = False) -> None:
    """Show what is in a source, before a long run."""
    from pomona.photos.inspect import inspect

    with progress() as on_tick:
        record = inspect(*_list(source, on_tick), label, counter(on_tick, "inspect"))
    show(record, as_json, render.inspection)


@command(PHOTOS)
def subset(
    source: SourceName,
    dest: Annotated[Path, Argument(help="A new folder.")],
    percentage: Annotated[float, "Share of the photos to take, in percent."] = 10,
    copy: Annotated[bool, "Copy the photos; links otherwise."] = False,
    as_json: AsJson = False,
) -> None:
    """Make a smaller source. Stratified by split and label, with at least one photo of each."""
    from pomona.photos.subset import subset

    with progress() as on_tick:
        opened, listing = _list(source, on_tick)
        count = subset(opened, listing, dest, percentage, copy=copy)
    record = {"photos": count, "of": listing.files.num_rows, "dest": str(dest)}
    show(record, as_json, lambda _: f"{count:,} of {record['of']:,} photos in {dest}")


def _list(source: str, on_tick: OnTick) -> tuple[Source, Listing]:
    from pomona.photos.listing import list_files
    from pomona.photos.source import open_source

    opened = open_source(source)
    if opened.kind == "hadoop":
        raise RequestError(f"{source}: this command reads local folders, s3:// and gs://")
    return opened, list_files(opened, lambda count: on_tick(Tick("list", count)))


@command(PHOTOS)
def synthesize(
    dest: Annotated[Path, Argument(help="The folder for the photos.")],
    classes: Annotated[int, "How many labels, 1 to 131."] = 131,
    images: Annotated[int, "How many photos."] = 90_483,
    seed: Annotated[int, "The same seed gives the same photos."] = 0,
    workers: Annotated[int | None, "Processes. [default: one per core]"] = None,
    as_json: AsJson = False,
) -> None:
    """Render photos of fruit on a turntable. Folders and names are those of Fruits-360."""
    with progress() as on_tick:
        on_photo = counter(on_tick, "synthesize")
        count = pomona.synthesize(
            dest, classes=classes, images=images, seed=seed, workers=workers, progress=on_photo
        )
    record = {"photos": count, "dest": str(dest)}
    show(record, as_json, lambda _: f"{count:,} photos in {dest}")


@command(PHOTOS)
def demo(
    out: LocalOut = "demo",
    classes: Annotated[int, "How many labels to render."] = 12,
    images: Annotated[int, "How many photos to render."] = 600,
    workers: Workers = None,
    master: Master = None,
    as_json: AsJson = False,
) -> None:
    """Render photos, some of them damaged, and run. Needs no network, no downloaded weights."""
    from pomona.workspace.remote import Home

    refuse_uri(out, "--out")
    photos, results = Path(out) / "photos", Path(out) / "out"
    with progress() as on_tick, log_to(str(results)):
        on_photo = counter(on_tick, "synthesize")
        pomona.synthesize(photos, classes=classes, images=images, progress=on_photo)
        pomona.add_damaged_photos(photos)
        options, where = pomona.ExtractOptions(weights="fruits"), cluster(workers, master)
        records = pomona.run(photos, results, options, cluster=where, on_tick=on_tick)
        records["mlflow"] = pomona.track(results, records)
    show_run(records, Home(str(results), str(results)), as_json)
