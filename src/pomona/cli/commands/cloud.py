"""The commands ``pomona cloud …``: runs on other people's machines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from pomona.cli.app import OPERATE, app, with_options
from pomona.cli.options import AsJson, SparkConf, spark_pairs
from pomona.cli.progress import counter, progress
from pomona.cli.work import show
from pomona.core.errors import PomonaError, RequestError

if TYPE_CHECKING:
    from pomona.cloud.emr import Stack

cloud = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Run on a cluster: Amazon EMR."
)
emr = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Pomona on Amazon EMR.")
cloud.add_typer(emr, name="emr")
app.add_typer(cloud, name="cloud", rich_help_panel=OPERATE)

StackName = Annotated[
    str, Option("--stack", help="The CloudFormation stack of deploy/emr/template.yaml.")
]
Region = Annotated[str | None, Option(help="[default: AWS's own setting, or eu-central-1]")]


@dataclass(frozen=True)
class StackArguments:
    """Where jobs run."""

    stack: StackName = "pomona"
    region: Region = None

    def find(self) -> Stack:
        """Ask AWS for the stack."""
        from pomona.cloud.emr import find

        return find(self.stack, self.region)


@emr.command("submit")
@with_options
def emr_submit(
    source: Annotated[str, Argument(help="Photos: s3://BUCKET/FOLDER.")],
    out: Annotated[str, Option("--out", help="Results: s3://BUCKET/FOLDER.")],
    where: StackArguments,
    options: Annotated[
        list[str] | None,
        Argument(help="After --: further options of pomona run.", metavar="RUN_OPTIONS"),
    ] = None,
    weights: Annotated[
        str | None,
        Option(
            help="As for run, or s3://…; a file is uploaded. "
            "[default: POMONA_WEIGHTS, or imagenet]",
            show_default=False,
        ),
    ] = None,
    executors: Annotated[int, Option(help="At most so many, of 4 vCPUs each.")] = 8,
    spark_conf: SparkConf = None,
    timeout_minutes: Annotated[int, Option(help="EMR Serverless ends the job after that.")] = 720,
    wait: Annotated[bool, Option("--wait", help="Wait until the job is over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run `pomona run` as a job on EMR Serverless or an EMR cluster."""
    from pomona.cli.render import cloud_job
    from pomona.cloud.emr import Job, submit

    run_options, conf = tuple(options or ()), spark_pairs(spark_conf)
    job = Job(source, out, run_options, weights, executors, conf, timeout_minutes)
    stack = where.find()
    with progress() as on_tick:
        record = submit(stack, job, counter(on_tick, "weights"))
    if wait:
        record |= _wait(stack, record["job"])
    show(record, as_json, cloud_job)


def _wait(stack: Stack, job: str) -> dict[str, Any]:
    from pomona.cli.render import cloud_state
    from pomona.cloud.emr import wait

    last = ""

    def on_state(record: dict[str, Any]) -> None:
        nonlocal last
        line = cloud_state(record)
        if line != last:
            last = line
            typer.echo(line, err=True)

    try:
        return wait(stack, job, on_state)
    except KeyboardInterrupt:
        raise PomonaError(
            f"the job goes on without you: pomona cloud emr status {job} --stack {stack.name}"
        ) from None


@emr.command("status")
@with_options
def emr_status(
    where: StackArguments,
    job: Annotated[
        str | None, Argument(help="The id that submit printed. [default: the last ten]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a job is, or the last jobs."""
    from pomona.cli import render
    from pomona.cloud.emr import recent, status

    stack = where.find()
    if job:
        show(status(stack, job), as_json, render.cloud_job)
    else:
        jobs = {"stack": where.stack, "mode": stack.mode, "jobs": recent(stack)}
        show(jobs, as_json, render.cloud_jobs)


@emr.command("logs")
@with_options
def emr_logs(
    job: Annotated[str, Argument(help="The id that submit printed.")],
    where: StackArguments,
    lines: Annotated[int, Option(help="The last so many of each file; 0 for all.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Show what a job's driver printed."""
    from pomona.cloud.emr import logs

    files = logs(where.find(), job)
    if as_json:
        typer.echo(json.dumps([{"file": name, "text": text} for name, text in files]))
        return
    for name, text in files:
        typer.echo(f"==> {name} <==", err=True)
        typer.echo("\n".join(text.splitlines()[-lines if lines > 0 else 0 :]))


@emr.command("teardown")
def emr_teardown(
    stack: StackName,
    region: Region = None,
    delete_data: Annotated[
        bool, Option("--delete-data", help="Delete what is in the stack's buckets, for good.")
    ] = False,
    yes: Annotated[bool, Option("--yes", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """End a stack's jobs and delete all that it made, and nothing else."""
    from pomona.cli.render import cloud_holdings
    from pomona.cloud.emr import check_empty, find, holdings, teardown

    target = find(stack, region)
    held = holdings(target)
    if not delete_data:
        check_empty(held)
    if not yes:
        typer.echo(cloud_holdings(held), err=True)
        _confirm("Delete it?")
    record = teardown(target, delete_data, lambda step: typer.echo(step, err=True))
    show(record, as_json, lambda _: f"{record['stack']} is gone")


def _confirm(question: str) -> None:
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        agreed = False
    if not agreed:
        raise RequestError("nothing was touched: answer y, or say --yes")
