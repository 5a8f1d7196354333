"""The commands ``pomona cloud …``: runs on other people's machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument

from pomona.cli import render
from pomona.cli.options import OPERATE, AsJson, SparkConf, app, spark_pairs, with_options
from pomona.cli.work import counter, progress, show
from pomona.cloud import jobs
from pomona.cloud.stack import Stack, find_stack
from pomona.cloud.teardown import check_empty, holdings, teardown
from pomona.core.errors import PomonaError, RequestError
from pomona.core.printable import escaped, json_line

if TYPE_CHECKING:
    from rich.table import Table

cloud = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Run on a cluster: Amazon EMR."
)
emr = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Pomona on Amazon EMR.")
cloud.add_typer(emr, name="emr")
app.add_typer(cloud, name="cloud", rich_help_panel=OPERATE)

StackName = Annotated[str, "The CloudFormation stack of deploy/emr/template.yaml."]
Region = Annotated[str | None, "[default: AWS's own setting, or eu-central-1]"]


@emr.command("submit")
@with_options
def emr_submit(
    source: Annotated[str, Argument(help="Photos: s3://BUCKET/FOLDER.")],
    out: Annotated[str, "Results: s3://BUCKET/FOLDER."],
    options: Annotated[
        list[str] | None,
        Argument(help="After --: further options of pomona run.", metavar="RUN_OPTIONS"),
    ] = None,
    stack: StackName = "pomona",
    region: Region = None,
    weights: Annotated[
        str | None,
        "As for run, or s3://…; a file is uploaded. [default: POMONA_WEIGHTS, or imagenet]",
    ] = None,
    executors: Annotated[int, "At most so many, of 4 vCPUs each."] = 8,
    spark_conf: SparkConf = None,
    timeout_minutes: Annotated[int, "EMR Serverless ends the job after that."] = 720,
    wait: Annotated[bool, "Wait until the job is over."] = False,
    as_json: AsJson = False,
) -> None:
    """Run `pomona run` as a job on EMR Serverless or an EMR cluster."""
    from pomona.cloud.submit import JobRequest, submit

    run_options, conf = tuple(options or ()), spark_pairs(spark_conf)
    request = JobRequest(source, out, run_options, weights, executors, conf, timeout_minutes)
    target = find_stack(stack, region)
    with progress() as on_tick:
        record = submit(target, request, counter(on_tick, "weights"))
    if wait:
        record |= _wait(target, record["job"])
    show(record, as_json, _job)


def _wait(stack: Stack, job: str) -> dict[str, Any]:
    last = ""

    def on_state(record: dict[str, Any]) -> None:
        nonlocal last
        if (line := _state(record)) != last:
            last = line
            typer.echo(line, err=True)

    try:
        return jobs.wait(stack, job, on_state)
    except KeyboardInterrupt:
        raise PomonaError(
            f"the job goes on without you: pomona cloud emr status {job} --stack {stack.name}"
        ) from None


@emr.command("status")
@with_options
def emr_status(
    job: Annotated[
        str | None, Argument(help="The id that submit printed. [default: the last ten]")
    ] = None,
    stack: StackName = "pomona",
    region: Region = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a job is, or the last jobs."""
    target = find_stack(stack, region)
    if job:
        show(jobs.status(target, job), as_json, _job)
    else:
        last = {"stack": stack, "mode": target.mode, "jobs": jobs.recent(target)}
        show(last, as_json, _jobs)


@emr.command("logs")
@with_options
def emr_logs(
    job: Annotated[str, Argument(help="The id that submit printed.")],
    stack: StackName = "pomona",
    region: Region = None,
    lines: Annotated[int, "The last so many of each file; 0 for all."] = 100,
    as_json: AsJson = False,
) -> None:
    """Show what a job's driver printed."""
    files = jobs.logs(find_stack(stack, region), job)
    if as_json:
        typer.echo(json_line([{"file": name, "text": text} for name, text in files]))
        return
    for name, text in files:
        typer.echo(f"==> {escaped(name)} <==", err=True)
        shown = text.splitlines()[-lines if lines > 0 else 0 :]
        typer.echo("\n".join(escaped(line.expandtabs()) for line in shown))


@emr.command("teardown")
@with_options
def emr_teardown(
    stack: StackName,
    region: Region = None,
    delete_data: Annotated[bool, "Delete what is in the stack's buckets, for good."] = False,
    yes: Annotated[bool, "Don't ask."] = False,
    as_json: AsJson = False,
) -> None:
    """End a stack's jobs and delete all that it made, and nothing else."""
    target = find_stack(stack, region)
    held = holdings(target)
    if not delete_data:
        check_empty(held)
    if not yes:
        typer.echo(_holdings(held), err=True)
        try:
            typer.confirm("Delete it?", abort=True, err=True)
        except typer.Abort:
            raise RequestError("nothing was touched: answer y, or say --yes") from None
    record = teardown(target, delete_data, lambda step: typer.echo(step, err=True))
    show(record, as_json, lambda _: f"{record['stack']} is gone")


def _state(record: dict[str, Any]) -> str:
    """Return one line: a job's state and, once it is over, how long it took.

    >>> _state({"job": "00f1", "state": "SUCCESS", "ok": True, "seconds": 3723})
    '00f1 SUCCESS after 1:02:03'
    """
    took = f" after {_duration(record['seconds'])}" if record["ok"] is not None else ""
    return f"{record['job']} {record['state']}{took}"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _job(record: dict[str, Any]) -> render.Rows:
    names = ("job", "state", "why", "started")
    rows = [(name, str(record[name])) for name in names if record[name]]
    if record["seconds"]:
        rows.append(("took", _duration(record["seconds"])))
    rows += [(name, f"{used:.3f}") for name, used in (record["billed"] or {}).items()]
    if "command" in record:
        rows.append(("command", f"pomona {' '.join(record['command'])}"))
    return rows


def _jobs(record: dict[str, Any]) -> Table | str:
    if not record["jobs"]:
        return f"{record['stack']} ({record['mode']}) has no jobs yet"
    table = render.table("job", "state", "started", "took")
    for job in record["jobs"]:
        render.add_row(
            table, job["job"], job["state"], job["started"] or "", _duration(job["seconds"])
        )
    return table


def _holdings(held: dict[str, Any]) -> str:
    """Return lines that say what ``teardown`` is about to delete."""
    lines = [f"the stack {held['stack']} in {held['region']}, with"]
    if held["compute"]:
        lines.append(f"  {held['compute']}, where {len(held['jobs'])} jobs are not over")
    lines += [f"  s3://{name}, {count:,} objects" for name, count in held["objects"].items()]
    return "\n".join(lines)
