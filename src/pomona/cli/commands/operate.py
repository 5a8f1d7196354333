"""Publish and operate: files for other devices, versions in MLflow, how far a run is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pomona.cli.app import OPERATE, command
from pomona.cli.options import AsJson, OutDir
from pomona.cli.progress import progress
from pomona.cli.work import show, working_in


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
    from pomona.cli.render import exported
    from pomona.export.export import ExportOptions, export

    with working_in(out) as (home, on_tick):
        record = export(home.folder, ExportOptions(**vars(arguments)), on_tick)
    show({**record, "folder": home.shown(record["folder"])}, as_json, exported)


@command(OPERATE)
def publish(
    out: OutDir,
    name: Annotated[str, "The model's name in MLflow's registry."] = "pomona",
    promote: Annotated[
        str | None, "Make it the champion whatever the comparison says; the reason why."
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Register OUT/model in MLflow. Challenger, and champion if it beats the present one."""
    from pomona.cli.render import published
    from pomona.registry.publish import PublishOptions, publish

    with working_in(out) as (home, on_tick):
        record = publish(home.folder, PublishOptions(name, promote), on_tick)
    show(record, as_json, published)


@command(OPERATE)
def status(out: OutDir, as_json: AsJson = False) -> None:
    """Show how far OUT is: photos done, rejected by code, to do."""
    from pomona.cli import summary
    from pomona.pipeline.status import status
    from pomona.workspace.remote import opened

    with progress() as on_tick, opened(out, on_tick, look_only=True) as home:
        record = status(home.folder)
    record["running"] |= home.running
    show(record, as_json, summary.status)
