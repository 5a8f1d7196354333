"""The commands ``pomona cloud …``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pomona.cli.options import AsJson, SparkConf, cluster, progress, show, tick
from pomona.core.errors import PomonaError, RequestError

cloud = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Pomona on a cluster.")
emr = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Pomona on Amazon EMR.")
cloud.add_typer(emr, name="emr")

StackName = Annotated[
    str, typer.Option("--stack", help="The CloudFormation stack of deploy/emr/template.yaml.")
]
Region = Annotated[str | None, typer.Option(help="[default: AWS's own setting, or eu-central-1]")]
JobId = Annotated[str, typer.Argument(help="The id that submit printed.")]


@emr.command("submit")
def emr_submit(
    source: Annotated[str, typer.Argument(help="Photos: s3://BUCKET/FOLDER.")],
    out: Annotated[str, typer.Option("--out", help="Results: s3://BUCKET/FOLDER.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(help="After --: further options of pomona run.", metavar="RUN_OPTIONS"),
    ] = None,
    stack: StackName = "pomona",
    region: Region = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="As for run, or s3://…; a file is uploaded. "
            "[default: POMONA_WEIGHTS, or imagenet]",
            show_default=False,
        ),
    ] = None,
    executors: Annotated[int, typer.Option(help="At most so many, of 4 vCPUs each.")] = 8,
    spark_conf: SparkConf = None,
    timeout_minutes: Annotated[
        int, typer.Option(help="EMR Serverless ends the job after that.")
    ] = 720,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job is over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run `pomona run` as a job on EMR Serverless or an EMR cluster."""
    from pomona.cli import render
    from pomona.cloud.stack import find_stack
    from pomona.cloud.submit import JobRequest, submit

    request = JobRequest(
        source,
        out,
        tuple(options or ()),
        weights,
        executors,
        cluster("", spark_conf).conf,
        timeout_minutes,
    )
    found = find_stack(stack, region)
    with progress() as on_tick:
        record = submit(found, request, lambda done, total: on_tick(tick("weights", done, total)))
    if wait:
        record |= _wait(found, record["job"])
    show(record, as_json, render.cloud_job)


def _wait(stack: Any, job: str) -> dict[str, Any]:
    from pomona.cli import render
    from pomona.cloud.jobs import wait as wait_for

    seen: list[str] = []

    def on_state(record: dict[str, Any]) -> None:
        line = render.cloud_state(record)
        if line not in seen[-1:]:
            seen.append(line)
            typer.echo(line, err=True)

    try:
        return wait_for(stack, job, on_state)
    except KeyboardInterrupt:
        raise PomonaError(
            f"the job goes on without you: pomona cloud emr status {job} --stack {stack.name}"
        ) from None


@emr.command("status")
def emr_status(
    job: Annotated[
        str | None, typer.Argument(help="The id that submit printed. [default: the last ten]")
    ] = None,
    stack: StackName = "pomona",
    region: Region = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a job is, or the last jobs."""
    from pomona.cli import render
    from pomona.cloud.jobs import recent, status
    from pomona.cloud.stack import find_stack

    found = find_stack(stack, region)
    if job:
        show(status(found, job), as_json, render.cloud_job)
    else:
        listed = {"stack": stack, "mode": found.mode, "jobs": recent(found)}
        show(listed, as_json, render.cloud_jobs)


@emr.command("logs")
def emr_logs(
    job: JobId,
    stack: StackName = "pomona",
    region: Region = None,
    lines: Annotated[int, typer.Option(help="The last so many of each file; 0 for all.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Show what a job's driver printed."""
    from pomona.cloud.jobs import logs
    from pomona.cloud.stack import find_stack

    found = logs(find_stack(stack, region), job)
    if as_json:
        typer.echo(json.dumps([{"file": name, "text": text} for name, text in found]))
        return
    for name, text in found:
        typer.echo(f"==> {name} <==", err=True)
        typer.echo("\n".join(text.splitlines()[-lines if lines > 0 else 0 :]))


@emr.command("teardown")
def emr_teardown(
    stack: StackName,
    region: Region = None,
    delete_data: Annotated[
        bool,
        typer.Option("--delete-data", help="Delete what is in the stack's buckets, for good."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """End a stack's jobs and delete all that it made, and nothing else."""
    from pomona.cli import render
    from pomona.cloud.stack import find_stack
    from pomona.cloud.teardown import check_empty, holdings, teardown

    found = find_stack(stack, region)
    held = holdings(found)
    if not delete_data:
        check_empty(held)
    if not yes:
        typer.echo(render.cloud_holdings(held), err=True)
        _confirm("Delete it?")
    told = teardown(found, delete_data, lambda step: typer.echo(step, err=True))
    show(told, as_json, lambda record: f"{record['stack']} is gone")


def _confirm(question: str) -> None:
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        agreed = False
    if not agreed:
        raise RequestError("nothing was touched: answer y, or say --yes")
