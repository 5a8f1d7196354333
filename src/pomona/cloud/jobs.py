"""Jobs of a stack: their state, waiting for one, and what its driver printed."""

from __future__ import annotations

import gzip
import re
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from pomona.cloud.stack import Stack, aws_errors
from pomona.core.errors import JobError, RequestError

POLL_SECONDS = 15.0

FINAL_STATES = {
    **dict.fromkeys(("SUCCESS", "COMPLETED"), True),
    **dict.fromkeys(("FAILED", "CANCELLED", "INTERRUPTED"), False),
}
"""States that a job doesn't leave, and whether it succeeded."""

OnState = Callable[[dict[str, Any]], None]


def status(stack: Stack, job: str) -> dict[str, Any]:
    """Return the record of a job.

    It holds ``job``, ``name``, ``state`` (EMR's word), ``ok`` (None while it isn't over), ``why``,
    ``started`` (UTC, or None), ``seconds``, and on EMR Serverless ``billed`` (vCPU hours and GB
    hours, None until EMR knows), beside ``stack``, ``region`` and ``mode``. Raises RequestError if
    the stack has no such job, or AWS refuses.
    """
    _check_id(stack, job)
    with aws_errors():
        if stack.mode == "serverless":
            client = stack.client("emr-serverless")
            run = client.get_job_run(applicationId=stack.compute, jobRunId=job)["jobRun"]
            return _run_record(stack, run)
        step = stack.client("emr").describe_step(ClusterId=stack.compute, StepId=job)["Step"]
        return _step_record(stack, step)


def recent(stack: Stack, count: int = 10) -> list[dict[str, Any]]:
    """Return the records of the last jobs, newest first, as `status` does but without ``billed``.

    Raises RequestError if AWS refuses.
    """
    records = []
    with aws_errors():
        if stack.mode == "serverless":
            records = [_run_record(stack, run) for run in job_runs(stack)]
        elif stack.mode == "ec2":
            paginator = stack.client("emr").get_paginator("list_steps")
            pages = paginator.paginate(ClusterId=stack.compute)
            records = [_step_record(stack, step) for page in pages for step in page["Steps"]]
    return sorted(records, key=lambda record: str(record["name"]), reverse=True)[:count]


def job_runs(stack: Stack) -> list[dict[str, Any]]:
    """Return EMR Serverless's own records of all job runs; none if the application is deleted."""
    client = stack.client("emr-serverless")
    try:
        pages = client.get_paginator("list_job_runs").paginate(applicationId=stack.compute)
        return [run for page in pages for run in page["jobRuns"]]
    except client.exceptions.ResourceNotFoundException:
        return []


def wait(stack: Stack, job: str, on_state: OnState) -> dict[str, Any]:
    """Wait until a job is over; ``on_state`` gets each record. Returns the last one.

    Raises JobError if the job failed or was cancelled.
    """
    while (record := status(stack, job))["ok"] is None:
        on_state(record)
        time.sleep(POLL_SECONDS)
    on_state(record)
    if not record["ok"]:
        raise JobError(
            f"the job {job} ended as {record['state']}: {record['why'] or 'EMR gives no reason'}; "
            f"pomona cloud emr logs {job} --stack {stack.name} shows what it printed"
        )
    return record


def _check_id(stack: Stack, job: str) -> None:
    if stack.mode == "prepare":
        raise RequestError(f"the stack {stack.name} has Mode=prepare, and so no jobs")
    if not re.fullmatch(r"s-[0-9A-Za-z]+" if stack.mode == "ec2" else r"[0-9a-zA-Z]{1,64}", job):
        raise RequestError(
            f"{job} is no job of {stack.name}: pomona cloud emr status --stack {stack.name} "
            "lists them"
        )


def _run_record(stack: Stack, run: dict[str, Any]) -> dict[str, Any]:
    job = str(run.get("jobRunId") or run.get("id"))
    billed = run.get("billedResourceUtilization")
    return {
        **_record(stack, job, run.get("name", ""), run["state"], run.get("stateDetails") or ""),
        "started": _utc(run.get("startedAt") or run.get("createdAt")),
        "seconds": run.get("totalExecutionDurationSeconds", 0),
        "billed": {key: float(value) for key, value in billed.items()} if billed else None,
    }


def _step_record(stack: Stack, step: dict[str, Any]) -> dict[str, Any]:
    state, times = step["Status"]["State"], step["Status"].get("Timeline", {})
    failure = step["Status"].get("FailureDetails", {})
    why = f"{failure.get('Reason', '')} {failure.get('Message', '')}"
    start, end = times.get("StartDateTime"), times.get("EndDateTime")
    now = datetime.now(timezone.utc)
    return {
        **_record(stack, step["Id"], step["Name"], state, why),
        "started": _utc(start or times.get("CreationDateTime")),
        "seconds": round(((end or now) - start).total_seconds()) if start else 0,
        "billed": None,
    }


def _record(stack: Stack, job: str, name: str, state: str, why: str) -> dict[str, Any]:
    return {
        "stack": stack.name,
        "region": stack.region,
        "mode": stack.mode,
        "job": job,
        "name": name,
        "state": state,
        "ok": FINAL_STATES.get(state),
        "why": " ".join(why.split()),
    }


def _utc(time: datetime | None) -> str | None:
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ") if time else None


def logs(stack: Stack, job: str) -> list[tuple[str, str]]:
    """Return what the driver printed: (URI, text) of each file, stderr before stdout.

    Raises RequestError if there is nothing (yet), or AWS refuses.
    """
    _check_id(stack, job)
    with aws_errors():
        s3 = stack.client("s3")
        keys = _log_keys(stack, s3, job)
        texts = [(f"s3://{stack.logs}/{key}", _read_text(s3, stack.logs, key)) for key in keys]
    if not texts:
        raise RequestError(
            f"no logs of {job} in s3://{stack.logs} yet: EMR writes them every few minutes, and "
            "deletes them after the stack's LogRetentionDays"
        )
    return texts


def _log_keys(stack: Stack, s3: Any, job: str) -> list[str]:
    if stack.mode == "serverless":
        keys = _list_keys(s3, stack.logs, f"serverless/applications/{stack.compute}/jobs/{job}/")
        return [key for key in keys if re.search(r"/SPARK_DRIVER/std(err|out)(\.gz)?$", key)]
    # In cluster mode the step's own files are those of spark-submit. They name the YARN
    # application, and the driver is the application's first container.
    base = f"ec2/{stack.compute}"
    keys = _list_keys(s3, stack.logs, f"{base}/steps/{job}/")
    text = "".join(_read_text(s3, stack.logs, key) for key in keys if "stderr" in key)
    for application in sorted(set(re.findall(r"application_\d+_\d+", text))):
        containers = _list_keys(s3, stack.logs, f"{base}/containers/{application}/")
        keys += [key for key in containers if re.search(r"_000001/std(err|out)(\.gz)?$", key)]
    return keys


def _list_keys(s3: Any, bucket: str, prefix: str) -> list[str]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return sorted(item["Key"] for page in pages for item in page.get("Contents", []))


def _read_text(s3: Any, bucket: str, key: str) -> str:
    content = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    if key.endswith(".gz"):
        content = gzip.decompress(content)
    return str(content.decode("utf-8", "replace"))
