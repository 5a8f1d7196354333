"""Pomona on Amazon EMR: start a job, watch it, read its logs, take everything down.

::

    stack ── submit     the entry script (and weights) into the stack's bucket, then a job
          ├─ status     of one job, or of the last ones
          ├─ logs       what the driver printed, from the stack's log bucket
          └─ teardown   jobs, objects, security groups, stack: only what the stack made

A stack is one of ``deploy/emr/template.yaml``. What it made is asked of CloudFormation each time,
by logical name, so that nothing else can be touched. Runs where the command is typed; the job
itself starts in `pomona.cli.spark_job`. Needs the extra ``aws`` (boto3).
"""

from __future__ import annotations

import contextlib
import gzip
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pomona.backbone import weights
from pomona.backbone.weights import OnBytes
from pomona.core.errors import JobError, MissingError, PomonaError, RequestError, first_line
from pomona.core.uris import redacted

REGION = "eu-central-1"
"""Where a stack is looked for when neither ``--region`` nor AWS's own settings name a region."""

POLL_SECONDS = 15.0
PAGE = 1000
"""Objects in one request, as many as S3 takes."""

ENTRY = '''"""Start Pomona, which is installed on the cluster, on the session of spark-submit."""

from pomona.cli.spark_job import main

main()
'''

OVER = {
    **dict.fromkeys(("SUCCESS", "COMPLETED"), True),
    **dict.fromkeys(("FAILED", "CANCELLED", "INTERRUPTED"), False),
}
"""States that a job doesn't leave, and whether it did what it should."""

PYTHON = "/opt/pomona/bin/python"
"""Of the image (``deploy/emr/Dockerfile``) and of the nodes (``deploy/emr/bootstrap.sh``)."""

CORES = 4
"""Of an executor and of the driver. A Python worker takes half a GB for each core, outside the JVM
(docs/scaling.md)."""

OnState = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Stack:
    """What one stack made.

    Attributes
    ----------
    id
        CloudFormation's, which stays valid while the stack is being deleted.
    mode
        ``prepare``: there is nothing yet that runs jobs.
    compute
        The id of the EMR Serverless application, or of the cluster.
    data, logs
        Its buckets; empty where one is deleted already.
    groups
        Its security groups.
    """

    name: str
    region: str
    id: str
    mode: Literal["prepare", "serverless", "ec2"]
    data: str
    logs: str
    role: str
    compute: str
    groups: tuple[str, ...]
    session: Any

    def client(self, service: str) -> Any:
        """Return boto3's client of a service in the stack's region."""
        return self.session.client(service, region_name=self.region)


@dataclass(frozen=True)
class Job:
    """What ``submit`` starts; see ``pomona cloud emr submit --help``."""

    source: str
    out: str
    options: tuple[str, ...] = ()
    weights: str | None = None
    executors: int = 8
    conf: tuple[tuple[str, str], ...] = ()
    timeout_minutes: int = 720


def find(name: str, region: str | None = None) -> Stack:
    """Return what the stack of that name made.

    Raises
    ------
    RequestError
        If there is no such stack, it isn't one of Pomona's, or AWS refuses.
    MissingError
        If boto3 isn't installed.
    """
    with _amazon() as boto3:
        session = boto3.Session()
        region = region or session.region_name or REGION
        cloudformation = session.client("cloudformation", region_name=region)
        about = _described(cloudformation, name, region)
        pages = cloudformation.get_paginator("list_stack_resources").paginate(StackName=name)
        made = {
            found["LogicalResourceId"]: found
            for page in pages
            for found in page["StackResourceSummaries"]
            if found.get("PhysicalResourceId") and found["ResourceStatus"] != "DELETE_COMPLETE"
        }
    outputs = {each["OutputKey"]: each["OutputValue"] for each in about.get("Outputs", [])}
    mark = outputs.get("Pomona", "")
    buckets = [_made(made, bucket, "AWS::S3::Bucket") for bucket in ("DataBucket", "LogBucket")]
    in_part = about["StackStatus"].startswith("DELETE_")  # a teardown that failed goes on
    if not mark.startswith("emr-") or not (in_part or all(buckets)):
        raise RequestError(
            f"the stack {name} in {region} was not made by Pomona's deploy/emr/template.yaml: "
            "name another with --stack"
        )
    application = _made(made, "Application", "AWS::EMRServerless::Application")
    cluster = _made(made, "Cluster", "AWS::EMR::Cluster")
    return Stack(
        name=name,
        region=region,
        id=about["StackId"],
        mode="serverless" if application else "ec2" if cluster else "prepare",
        data=buckets[0],
        logs=buckets[1],
        role=outputs.get("Role", ""),
        compute=application or cluster,
        groups=tuple(
            each["PhysicalResourceId"]
            for each in made.values()
            if each["ResourceType"] == "AWS::EC2::SecurityGroup"
        ),
        session=session,
    )


def _made(made: dict[str, Any], logical: str, kind: str) -> str:
    found = made.get(logical)
    return str(found["PhysicalResourceId"]) if found and found["ResourceType"] == kind else ""


def _described(cloudformation: Any, name: str, region: str) -> dict[str, Any]:
    from botocore.exceptions import ClientError

    try:
        found: dict[str, Any] = cloudformation.describe_stacks(StackName=name)["Stacks"][0]
    except ClientError as error:
        if "does not exist" not in str(error):
            raise
        raise RequestError(
            f"there is no stack {name} in {region}: docs/cloud.md tells how to deploy one; "
            "--stack and --region name others"
        ) from error
    return found


@contextlib.contextmanager
def _amazon() -> Iterator[Any]:
    """Give boto3; what goes wrong at AWS becomes one line."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise MissingError("boto3 isn't installed: pip install 'pomona[aws]'") from error
    try:
        yield boto3
    except ClientError as error:
        raise RequestError(f"AWS refused: {first_line(error)[:300]}") from error
    except BotoCoreError as error:
        raise RequestError(
            f"AWS can't be asked: {first_line(error)[:200]} (credentials come from aws configure, "
            "AWS_PROFILE or the environment; the region from --region)"
        ) from error


# --- submit ------------------------------------------------------------------------------------


def submit(stack: Stack, job: Job, on_bytes: OnBytes | None = None) -> dict[str, Any]:
    """Start ``pomona run SOURCE --out OUT`` on the stack's application or cluster.

    The entry script and the weights are put into the stack's bucket first: where jobs run there is
    no way to the internet.

    Returns
    -------
    dict
        What `status` returns, and ``command``: the words that Pomona gets, URIs without options and
        credentials.

    Raises
    ------
    RequestError
        If the stack runs no jobs yet, an argument is wrong, or AWS refuses.
    WeightsError
        If the weights can't be had.
    """
    _check(stack, job)
    name = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
    with _amazon():
        s3 = stack.client("s3")
        entry = f"jobs/{name}/entry.py"
        carried = _put_weights(stack, s3, job.weights, on_bytes)
        source, out, carried = (_regional(stack, place) for place in (job.source, job.out, carried))
        command = ["run", source, "--out", out, *job.options, "--weights", carried]
        s3.put_object(Bucket=stack.data, Key=entry, Body=ENTRY.encode())
        start = _start_run if stack.mode == "serverless" else _start_step
        identity = start(stack, job, name, f"s3://{stack.data}/{entry}", command)
    return {**status(stack, identity), "command": [redacted(word) for word in command]}


def _check(stack: Stack, job: Job) -> None:
    if stack.mode == "prepare":
        raise RequestError(
            f"the stack {stack.name} has Mode=prepare, which runs no jobs: deploy it again with "
            "Mode=serverless or Mode=ec2 (docs/cloud.md)"
        )
    for option, place in (("SOURCE", job.source), ("--out", job.out)):
        if not re.match(r"s3://[^/]+", place):
            raise RequestError(
                f"{option} is s3://BUCKET/FOLDER for a job on EMR, not {redacted(place)}"
            )
    for taken in ("--weights", "--out", "--master", "--spark-conf"):
        if any(word.split("=")[0] == taken for word in job.options):
            raise RequestError(f"{taken} stands before --, as an option of submit")
    if any(re.search(r"\s|^$", part) for pair in job.conf for part in pair):
        raise RequestError("--spark-conf is KEY=VALUE without blanks")
    if job.executors < 1:
        raise RequestError(f"--executors is at least 1, not {job.executors}")
    if job.timeout_minutes < 5:
        raise RequestError(f"--timeout-minutes is at least 5, not {job.timeout_minutes}")


def _regional(stack: Stack, place: str) -> str:
    """Name the bucket's region, which is the stack's.

    Arrow would ask S3's global address for it, out of reach from the private subnets.
    """
    if not place.startswith("s3://") or re.search(r"[?&]region=", place):
        return place
    return f"{place}{'&' if '?' in place else '?'}region={stack.region}"


def _put_weights(stack: Stack, s3: Any, name: str | None, on_bytes: OnBytes | None) -> str:
    """Return what ``--weights`` is on the cluster; a file is uploaded once."""
    name = name or weights.default()
    if name.startswith(("random:", "s3://")):
        return name
    found = weights.load_weights(name, on_bytes)
    suffix = "onnx" if found.onnx is not None else "safetensors"
    key = f"weights/{Path(found.name).stem}-{found.digest[:16]}.{suffix}"
    if not s3.list_objects_v2(Bucket=stack.data, Prefix=key).get("KeyCount"):
        with tempfile.TemporaryDirectory() as spare:
            file = Path(spare, "weights")
            file.write_bytes(weights.pack(found))
            s3.upload_file(str(file), stack.data, key)
    return f"s3://{stack.data}/{key}"


def _conf(stack: Stack, job: Job) -> dict[str, str]:
    conf = {
        "spark.driver.cores": str(CORES),
        "spark.driver.memory": "6g",
        "spark.driver.memoryOverhead": "8g",  # Python: a GB for each million photos, and training
        "spark.executor.cores": str(CORES),
        "spark.executor.memory": "4g",
        "spark.executor.memoryOverhead": "4g",
        # All at once, and idle ones are let go: train runs on the driver alone.
        "spark.dynamicAllocation.enabled": "true",
        "spark.dynamicAllocation.initialExecutors": str(job.executors),
        "spark.dynamicAllocation.maxExecutors": str(job.executors),
        "spark.executorEnv.OMP_NUM_THREADS": "1",
        "spark.executorEnv.PYSPARK_PYTHON": PYTHON,
        # No catalogue is needed, and from the private subnets none can be reached.
        "spark.sql.catalogImplementation": "in-memory",
    }
    if stack.mode == "serverless":
        conf |= {
            "spark.emr-serverless.driverEnv.PYSPARK_DRIVER_PYTHON": PYTHON,
            "spark.emr-serverless.driverEnv.PYSPARK_PYTHON": PYTHON,
            # OUT is worked on there before it goes to the bucket.
            "spark.emr-serverless.driverEnv.POMONA_CACHE": "/tmp/pomona",
            "spark.emr-serverless.driver.disk": "100g",
        }
    else:
        conf |= {
            "spark.yarn.appMasterEnv.PYSPARK_PYTHON": PYTHON,
            # The large volume: OUT is worked on there before it goes to the bucket.
            "spark.yarn.appMasterEnv.POMONA_CACHE": "/mnt/tmp/pomona",
        }
    return conf | dict(job.conf)


def _start_run(stack: Stack, job: Job, name: str, entry: str, command: list[str]) -> str:
    pairs = _conf(stack, job).items()
    started = stack.client("emr-serverless").start_job_run(
        applicationId=stack.compute,
        executionRoleArn=stack.role,
        name=f"pomona-{name}",
        executionTimeoutMinutes=job.timeout_minutes,
        jobDriver={
            "sparkSubmit": {
                "entryPoint": entry,
                "entryPointArguments": command,
                "sparkSubmitParameters": " ".join(f"--conf {key}={value}" for key, value in pairs),
            }
        },
        configurationOverrides={
            "monitoringConfiguration": {
                "s3MonitoringConfiguration": {"logUri": f"s3://{stack.logs}/serverless/"}
            }
        },
        tags={"project": "pomona"},
    )
    return str(started["jobRunId"])


def _start_step(stack: Stack, job: Job, name: str, entry: str, command: list[str]) -> str:
    words = ["spark-submit", "--deploy-mode", "cluster"]
    for key, value in _conf(stack, job).items():
        words += ["--conf", f"{key}={value}"]
    step = {
        "Name": f"pomona-{name}",
        "ActionOnFailure": "CONTINUE",
        "HadoopJarStep": {"Jar": "command-runner.jar", "Args": [*words, entry, *command]},
    }
    emr = stack.client("emr")
    return str(emr.add_job_flow_steps(JobFlowId=stack.compute, Steps=[step])["StepIds"][0])


# --- status ------------------------------------------------------------------------------------


def status(stack: Stack, job: str) -> dict[str, Any]:
    """Tell how far a job is.

    Returns
    -------
    dict
        ``job``, ``name``, ``state`` (EMR's word), ``ok`` (null while it isn't over), ``why``,
        ``started`` (UTC, or null), ``seconds``, and on EMR Serverless ``billed`` (hours and GB
        hours, null until EMR knows), beside ``stack``, ``region`` and ``mode``.

    Raises
    ------
    RequestError
        If the stack has no such job, or AWS refuses.
    """
    _check_id(stack, job)
    with _amazon():
        if stack.mode == "serverless":
            client = stack.client("emr-serverless")
            run = client.get_job_run(applicationId=stack.compute, jobRunId=job)["jobRun"]
            return _run_record(stack, run)
        step = stack.client("emr").describe_step(ClusterId=stack.compute, StepId=job)["Step"]
        return _step_record(stack, step)


def recent(stack: Stack, count: int = 10) -> list[dict[str, Any]]:
    """Return the records of the last jobs, newest first, as `status` does but without ``billed``.

    Raises
    ------
    RequestError
        If AWS refuses.
    """
    with _amazon():
        if stack.mode == "serverless":
            found = [_run_record(stack, run) for run in _runs(stack)]
        elif stack.mode == "ec2":
            pages = (
                stack.client("emr").get_paginator("list_steps").paginate(ClusterId=stack.compute)
            )
            found = [_step_record(stack, step) for page in pages for step in page["Steps"]]
        else:
            found = []
    return sorted(found, key=lambda each: str(each["name"]), reverse=True)[:count]


def _runs(stack: Stack) -> list[dict[str, Any]]:
    client = stack.client("emr-serverless")
    try:
        pages = client.get_paginator("list_job_runs").paginate(applicationId=stack.compute)
        return [run for page in pages for run in page["jobRuns"]]
    except client.exceptions.ResourceNotFoundException:  # the application has gone already
        return []


def wait(stack: Stack, job: str, on_state: OnState) -> dict[str, Any]:
    """Wait until a job is over; ``on_state`` gets each record. Returns the last one.

    Raises
    ------
    JobError
        If the job failed or was cancelled.
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


def _record(stack: Stack, job: str, name: str, state: str, why: str) -> dict[str, Any]:
    return {
        "stack": stack.name,
        "region": stack.region,
        "mode": stack.mode,
        "job": job,
        "name": name,
        "state": state,
        "ok": OVER.get(state),
        "why": " ".join(why.split()),
    }


def _run_record(stack: Stack, run: dict[str, Any]) -> dict[str, Any]:
    job = str(run.get("jobRunId") or run.get("id"))
    record = _record(stack, job, run.get("name", ""), run["state"], run.get("stateDetails") or "")
    used = run.get("billedResourceUtilization")
    return {
        **record,
        "started": _time(run.get("startedAt") or run.get("createdAt")),
        "seconds": run.get("totalExecutionDurationSeconds", 0),
        "billed": {key: float(value) for key, value in used.items()} if used else None,
    }


def _step_record(stack: Stack, step: dict[str, Any]) -> dict[str, Any]:
    state, times = step["Status"]["State"], step["Status"].get("Timeline", {})
    detail = step["Status"].get("FailureDetails", {})
    why = f"{detail.get('Reason', '')} {detail.get('Message', '')}"
    start, end = times.get("StartDateTime"), times.get("EndDateTime")
    now = datetime.now(timezone.utc)
    return {
        **_record(stack, step["Id"], step["Name"], state, why),
        "started": _time(start or times.get("CreationDateTime")),
        "seconds": round(((end or now) - start).total_seconds()) if start else 0,
        "billed": None,
    }


def _time(value: datetime | None) -> str | None:
    return value.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ") if value else None


# --- logs --------------------------------------------------------------------------------------


def logs(stack: Stack, job: str) -> list[tuple[str, str]]:
    """Return what the driver printed: (place, text) for each file, stdout after stderr.

    Raises
    ------
    RequestError
        If there is nothing (yet), or AWS refuses.
    """
    _check_id(stack, job)
    with _amazon():
        s3 = stack.client("s3")
        keys = _log_keys(stack, s3, job)
        found = [(f"s3://{stack.logs}/{key}", _text(s3, stack.logs, key)) for key in keys]
    if not found:
        raise RequestError(
            f"no logs of {job} in s3://{stack.logs} yet: EMR writes them every few minutes, and "
            "deletes them after the stack's LogRetentionDays"
        )
    return found


def _log_keys(stack: Stack, s3: Any, job: str) -> list[str]:
    if stack.mode == "serverless":
        keys = _keys(s3, stack.logs, f"serverless/applications/{stack.compute}/jobs/{job}/")
        return [key for key in keys if re.search(r"/SPARK_DRIVER/std(err|out)(\.gz)?$", key)]
    # In cluster mode the step's own files are those of spark-submit; they name YARN's application,
    # and the driver is its first container.
    base = f"ec2/{stack.compute}"
    keys = _keys(s3, stack.logs, f"{base}/steps/{job}/")
    texts = "".join(_text(s3, stack.logs, key) for key in keys if "stderr" in key)
    for application in sorted(set(re.findall(r"application_\d+_\d+", texts))):
        inside = _keys(s3, stack.logs, f"{base}/containers/{application}/")
        keys += [key for key in inside if re.search(r"_000001/std(err|out)(\.gz)?$", key)]
    return keys


def _keys(s3: Any, bucket: str, prefix: str) -> list[str]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return sorted(each["Key"] for page in pages for each in page.get("Contents", []))


def _text(s3: Any, bucket: str, key: str) -> str:
    content = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    if key.endswith(".gz"):
        content = gzip.decompress(content)
    return str(content.decode("utf-8", "replace"))


# --- teardown ----------------------------------------------------------------------------------

TRIES = 3
"""Of deleting the stack: a log that comes late fills its bucket again."""


STILL = ("CREATED", "STOPPED", "TERMINATED")
"""States of an application that can be deleted."""


def holdings(stack: Stack) -> dict[str, Any]:
    """Tell what a teardown would end and delete.

    Returns
    -------
    dict
        ``stack``, ``region``, ``compute``, ``jobs`` (ids that aren't over) and ``objects`` (the
        count for each of its buckets, old versions among them).

    Raises
    ------
    RequestError
        If AWS refuses.
    """
    jobs = [each["job"] for each in recent(stack, PAGE) if each["ok"] is None]
    with _amazon():
        s3 = stack.client("s3")
        objects = {
            bucket: sum(len(page) for page in _versions(s3, bucket))
            for bucket in _buckets(stack, s3)
        }
    return {
        "stack": stack.name,
        "region": stack.region,
        "compute": stack.compute,
        "jobs": jobs,
        "objects": objects,
    }


def check_empty(held: dict[str, Any]) -> None:
    """Raise RequestError if the buckets hold anything."""
    full = [f"s3://{name} holds {n:,} objects" for name, n in held["objects"].items() if n]
    if full:
        raise RequestError(
            f"{' and '.join(full)}, which would be lost; nothing was touched. Copy away what you "
            "need, then say --delete-data"
        )


def teardown(
    stack: Stack, delete_data: bool = False, on_step: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """End the stack's jobs and delete what it made, and nothing else. Waits until it is gone.

    Parameters
    ----------
    delete_data
        Empty the stack's two buckets, old versions too. Without it a bucket that holds anything is
        a refusal, before anything is touched.
    on_step
        Told what is being done.

    Returns
    -------
    dict
        What `holdings` returned before.

    Raises
    ------
    RequestError
        If the buckets hold something and ``delete_data`` is false, or AWS refuses.
    """
    tell = on_step or (lambda _: None)
    held = holdings(stack)
    if not delete_data:
        check_empty(held)
    with _amazon():
        _end_compute(stack, held["jobs"], tell)
        _loosen(stack)
        for tries_left in reversed(range(TRIES)):
            if delete_data:
                tell("emptying the stack's buckets")
                _empty(stack)
            tell("deleting the stack")
            why = _delete(stack)
            if not why:
                return held
            if not tries_left or not delete_data:
                raise PomonaError(
                    f"CloudFormation could not delete {stack.name}: {why}; what it deleted is "
                    "gone: say the same again, or look at the stack's events"
                )
    return held


def _end_compute(stack: Stack, jobs: Sequence[str], tell: Callable[[str], None]) -> None:
    """Cancel jobs and stop what runs them; logs are still written while that lasts."""
    if stack.mode == "serverless":
        client = stack.client("emr-serverless")
        for job in jobs:
            if status(stack, job)["state"] != "CANCELLING":
                tell(f"cancelling {job}")
                client.cancel_job_run(applicationId=stack.compute, jobRunId=job)
        _until(lambda: not [run for run in _runs(stack) if run["state"] not in OVER])
        if _application_state(client, stack) not in (*STILL, "STOPPING"):
            tell("stopping the application")
            client.stop_application(applicationId=stack.compute)
        _until(lambda: _application_state(client, stack) in STILL)
    elif stack.mode == "ec2":
        client = stack.client("emr")
        if not _cluster_state(client, stack).startswith("TERMINAT"):
            tell(f"ending the cluster and its {len(jobs)} unfinished jobs")
            client.terminate_job_flows(JobFlowIds=[stack.compute])
        _until(lambda: _cluster_state(client, stack).startswith("TERMINATED"))


def _application_state(client: Any, stack: Stack) -> str:
    return str(client.get_application(applicationId=stack.compute)["application"]["state"])


def _cluster_state(client: Any, stack: Stack) -> str:
    return str(client.describe_cluster(ClusterId=stack.compute)["Cluster"]["Status"]["State"])


def _until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        time.sleep(POLL_SECONDS)


def _loosen(stack: Stack) -> None:
    """Take the rules of the stack's security groups away: EMR let them name each other."""
    ec2 = stack.client("ec2")
    if not stack.groups:
        return
    for group in ec2.describe_security_groups(GroupIds=list(stack.groups))["SecurityGroups"]:
        for rules, revoke in (
            (group["IpPermissions"], ec2.revoke_security_group_ingress),
            (group["IpPermissionsEgress"], ec2.revoke_security_group_egress),
        ):
            if rules:
                revoke(GroupId=group["GroupId"], IpPermissions=rules)


def _versions(s3: Any, bucket: str) -> Iterator[list[dict[str, str]]]:
    """Give what a bucket holds, old versions and deletion marks too, in pages."""
    pages = s3.get_paginator("list_object_versions").paginate(
        Bucket=bucket, PaginationConfig={"PageSize": PAGE}
    )
    for page in pages:
        found = [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
        if found:
            yield [{"Key": each["Key"], "VersionId": each["VersionId"]} for each in found]


def _buckets(stack: Stack, s3: Any) -> list[str]:
    """Return the stack's buckets without those that a try before this one deleted."""
    return [bucket for bucket in (stack.data, stack.logs) if bucket and _exists(s3, bucket)]


def _empty(stack: Stack) -> None:
    s3 = stack.client("s3")
    for bucket in _buckets(stack, s3):
        for page in _versions(s3, bucket):
            told = s3.delete_objects(Bucket=bucket, Delete={"Objects": page, "Quiet": True})
            if errors := told.get("Errors"):
                first = errors[0]
                raise RequestError(
                    f"s3://{bucket}/{first['Key']} can't be deleted: {first['Code']}"
                )


def _exists(s3: Any, bucket: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        s3.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        return False
    return True


def _delete(stack: Stack) -> str:
    """Delete the stack and wait. Returns why it failed, or nothing."""
    cloudformation = stack.client("cloudformation")
    cloudformation.delete_stack(StackName=stack.id)
    while True:
        found = cloudformation.describe_stacks(StackName=stack.id)["Stacks"][0]
        if found["StackStatus"] == "DELETE_COMPLETE":
            return ""
        if found["StackStatus"] == "DELETE_FAILED":
            return str(found.get("StackStatusReason") or "no reason is given")
        time.sleep(POLL_SECONDS)
