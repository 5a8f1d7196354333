"""What is done with a finished OUT: export, publish, look at it, copy it, erase photos from it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Annotated

import typer
from typer import Argument, Option

import pomona
from pomona.cli import render
from pomona.cli.options import MOVE, OPERATE, AsJson, OutDir, SparkArguments, command
from pomona.cli.work import log_to, progress, show, working_in
from pomona.core.errors import RequestError


@dataclass(frozen=True)
class ExportArguments:
    """What is exported, and what it is judged by: `pomona.export.export.ExportOptions`."""

    int8: Annotated[bool, "8-bit integers too, if they pass."] = False
    half: Annotated[bool, "Half-precision weights too, if they pass."] = False
    dest: Annotated[str | None, "The folder for the files. [default: OUT/export]"] = None
    calibration: Annotated[int, "Training photos that 8-bit ranges are measured on."] = 256
    held_out: Annotated[int, "Photos that smaller files are judged by, at most."] = 2000
    web: Annotated[
        str | None, "A new folder for the page that runs the smallest file, for any host."
    ] = None


@command(OPERATE)
def export(out: OutDir, arguments: ExportArguments, as_json: AsJson = False) -> None:
    """Write files for the phone. A smaller one is kept only if it answers like the model."""
    with working_in(out) as (home, on_tick):
        options = pomona.ExportOptions(**vars(arguments))
        record = pomona.export_model(home.folder, options, on_tick)
    show({**record, "folder": home.shown(record["folder"])}, as_json, render.exported)


@command(OPERATE)
def sign(
    model: Annotated[str, Argument(help="A model's folder, such as OUT/model.")],
    key: Annotated[
        str, "A private EC key, as PEM; its password, if any, is in POMONA_KEY_PASSWORD."
    ],
    as_json: AsJson = False,
) -> None:
    """Sign a model: predict and serve check who made it, with --verify."""
    from pomona.model import signature

    opened = pomona.load_model(model)
    path = signature.sign(opened.folder, opened.files, key)
    record = {"model": opened.version, "signature": str(path), "bytes": path.stat().st_size}
    show(record, as_json, render.signed)


@command(OPERATE)
def publish(
    out: OutDir,
    name: Annotated[str, "The model's name in MLflow's registry."] = "pomona",
    promote: Annotated[
        str | None, "Make it the champion whatever the comparison says; the reason why."
    ] = None,
    sign: Annotated[str | None, "Sign it first, with this private key: pomona sign."] = None,
    as_json: AsJson = False,
) -> None:
    """Register OUT/model in MLflow. Challenger, and champion if it beats the present one."""
    from pomona.registry.publish import PublishOptions, publish

    with working_in(out) as (home, on_tick):
        record = publish(home.folder, PublishOptions(name, promote, sign), on_tick)
    show(record, as_json, render.published)


@command(OPERATE)
def status(out: OutDir, as_json: AsJson = False) -> None:
    """Show how far OUT is: photos done, rejected by code, to do."""
    from pomona.pipeline.status import status
    from pomona.workspace.remote import opened

    with progress() as on_tick, opened(out, on_tick, look_only=True) as home:
        record = status(home.folder)
    record["running"] |= home.running
    show(record, as_json, render.status)


@command(MOVE)
def push(
    out: Annotated[str, Argument(help="The folder of a finished run.")],
    place: Annotated[str, Argument(help="Where to: a URI (s3://, gs://), or a folder.")],
    replace: Annotated[bool, "The place may hold what another OUT pushed."] = False,
    as_json: AsJson = False,
) -> None:
    """Copy OUT to an object store: only what isn't there. Killed, it goes on."""
    from pomona.workspace.remote import push

    with progress() as on_tick:
        record = push(out, place, on_tick, replace=replace)
    show(record, as_json, render.moved)


@command(MOVE)
def pull(
    place: Annotated[str, Argument(help="Where OUT was pushed to.")],
    out: Annotated[str, Argument(help="The folder that takes it.")],
    as_json: AsJson = False,
) -> None:
    """Copy OUT back, and check every file. Killed, it goes on."""
    from pomona.workspace.remote import pull

    with progress() as on_tick:
        record = pull(place, out, on_tick)
    show(record, as_json, render.moved)


@dataclass(frozen=True)
class ForgetArguments:
    """Which photos are erased, and what of the models made from them."""

    photos: Annotated[
        list[str] | None,
        Argument(
            help="Paths as in the column path, or patterns in quotes: * stays within a folder, ** "
            "crosses folders. Without any, a forget that was killed is ended."
        ),
    ] = None
    listed: Annotated[
        str | None,
        Option("--list", help="A file with one exact path a line; - for standard input."),
    ] = None
    allow: Annotated[bool, "The reverse: extract may take these photos again."] = False
    no_rebuild: Annotated[bool, "Remove what was made from the photos, and don't remake it."] = (
        False
    )
    retire: Annotated[bool, "Delete versions in OUT/mlflow.db that were trained with them."] = False
    missing_ok: Annotated[bool, "Accept exact paths that are in no table and no source."] = False
    dry_run: Annotated[bool, "Show what would go, and change nothing."] = False
    yes: Annotated[bool, "Don't ask."] = False


@command(MOVE)
def forget(
    out: OutDir, selected: ForgetArguments, spark: SparkArguments, as_json: AsJson = False
) -> None:
    """Erase photos from all of OUT. They are never taken in again; see docs/privacy.md."""
    from pomona.privacy import forget
    from pomona.workspace.remote import opened

    photos = selected.photos or []
    listed = forget.read_list(selected.listed) if selected.listed else ()
    options = forget.ForgetOptions(
        listed, not selected.no_rebuild, selected.retire, selected.missing_ok, selected.dry_run
    )
    named = (*photos, *listed)
    ask = bool(named) and not (selected.allow or selected.yes or selected.dry_run)
    if ask and not (sys.stdin.isatty() and selected.listed != "-"):
        raise RequestError("forget can't be undone, and there is nobody to ask: add --yes")
    with opened(out) as home:
        if selected.allow:
            show(forget.allow(home.folder, named), as_json, render.allowed)
            return
        if ask:  # before the bar, which would write over the question
            plan = forget.forget(home.folder, photos, replace(options, dry_run=True))
            if not as_json:
                show(plan, False, render.forget_plan)
            typer.confirm("This can't be undone. Forget them?", abort=True, err=True)
        with progress() as on_tick, log_to(home.folder):
            record = forget.forget(
                home.folder, photos, options, spark.cluster(), home.ticks(on_tick), home.after
            )
    show(record, as_json, render.forget_plan if selected.dry_run else render.forgotten)
