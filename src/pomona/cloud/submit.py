"""Start ``pomona run`` as a job of a stack: EMR Serverless job run, or step of an EMR cluster."""

from __future__ import annotations

import base64
import hashlib
import re
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pomona.backbone.weights import OnBytes, default, load_weights, pack
from pomona.cloud.jobs import status
from pomona.cloud.stack import Stack, aws_errors
from pomona.core.errors import RequestError
from pomona.core.uris import redacted

ENTRY = '''"""Start Pomona, which is installed on the cluster, on the session of spark-submit."""

from pomona.cli.spark_job import main

main()
'''

PYTHON = "/opt/pomona/bin/python"
"""Python of ``deploy/emr/Dockerfile`` (the image) and ``deploy/emr/bootstrap.sh`` (the nodes)."""

CORES = 4
"""vCPUs of an executor and of the driver. A Python worker takes half a GB per core, outside the JVM
(docs/scaling.md)."""


@dataclass(frozen=True)
class JobRequest:
    """What `submit` starts; see ``pomona cloud emr submit --help``."""

    source: str
    out: str
    options: tuple[str, ...] = ()
    weights: str | None = None
    executors: int = 8
    conf: tuple[tuple[str, str], ...] = ()
    timeout_minutes: int = 720


def submit(stack: Stack, request: JobRequest, on_bytes: OnBytes | None = None) -> dict[str, Any]:
    """Start ``pomona run SOURCE --out OUT`` on the stack's application or cluster.

    The entry script and the weights are uploaded to the stack's bucket first, because jobs run
    without access to the internet. Returns what `pomona.cloud.jobs.status` does, and ``command``:
    the arguments of ``pomona``, with options and credentials removed from URIs.

    Raises RequestError if the stack runs no jobs yet, an argument is wrong, or AWS refuses, and
    WeightsError if the weights can't be had.
    """
    _check(stack, request)
    name = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
    with aws_errors():
        s3 = stack.client("s3")
        entry = f"jobs/{name}/entry.py"
        weights = _upload_weights(stack, s3, request.weights, on_bytes)
        source, out, weights = (
            _with_region(stack, uri) for uri in (request.source, request.out, weights)
        )
        command = ["run", source, "--out", out, *request.options, "--weights", weights]
        s3.put_object(Bucket=stack.data, Key=entry, Body=ENTRY.encode())
        start = _start_job_run if stack.mode == "serverless" else _start_step
        job = start(stack, request, name, f"s3://{stack.data}/{entry}", command)
    return {**status(stack, job), "command": [redacted(word) for word in command]}


def _check(stack: Stack, request: JobRequest) -> None:
    if stack.mode == "prepare":
        raise RequestError(
            f"the stack {stack.name} has Mode=prepare, which runs no jobs: deploy it again with "
            "Mode=serverless or Mode=ec2 (docs/cloud.md)"
        )
    for option, uri in (("SOURCE", request.source), ("--out", request.out)):
        if not re.match(r"s3://[^/]+", uri):
            raise RequestError(
                f"{option} is s3://BUCKET/FOLDER for a job on EMR, not {redacted(uri)}"
            )
    for option in ("--weights", "--out", "--master", "--spark-conf"):
        if any(word.split("=")[0] == option for word in request.options):
            raise RequestError(f"{option} stands before --, as an option of submit")
    if any(re.search(r"\s|^$", part) for setting in request.conf for part in setting):
        raise RequestError("--spark-conf is KEY=VALUE without blanks")
    if request.executors < 1:
        raise RequestError(f"--executors is at least 1, not {request.executors}")
    if request.timeout_minutes < 5:
        raise RequestError(f"--timeout-minutes is at least 5, not {request.timeout_minutes}")


def _with_region(stack: Stack, uri: str) -> str:
    """Add the stack's region to an S3 URI without one.

    Arrow would ask S3's global endpoint for it, which the private subnets can't reach.
    """
    if not uri.startswith("s3://") or re.search(r"[?&]region=", uri):
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}region={stack.region}"


def _upload_weights(stack: Stack, s3: Any, name: str | None, on_bytes: OnBytes | None) -> str:
    """Return the value of ``--weights`` on the cluster; a file is uploaded once.

    What is in the bucket is known by the checksum that S3 computed: an object that was emptied or
    replaced is uploaded again.
    """
    name = name or default()
    if name.startswith(("random:", "s3://")):
        return name
    weights = load_weights(name, on_bytes)
    suffix = "onnx" if weights.onnx is not None else "safetensors"
    key = f"weights/{Path(weights.name).stem}-{weights.digest[:16]}.{suffix}"
    content = pack(weights)
    checksum = base64.b64encode(hashlib.sha256(content).digest()).decode()
    if _checksum(s3, stack.data, key) != checksum:
        s3.put_object(Bucket=stack.data, Key=key, Body=content, ChecksumSHA256=checksum)
    return f"s3://{stack.data}/{key}"


def _checksum(s3: Any, bucket: str, key: str) -> str | None:
    """Return an object's SHA-256 in base64; None without one, or where there is no object."""
    from botocore.exceptions import ClientError

    try:
        head = s3.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
            return None
        raise
    checksum: str | None = head.get("ChecksumSHA256")
    return checksum


def spark_conf(stack: Stack, request: JobRequest) -> dict[str, str]:
    """Return the Spark settings of a job; those of the request come last."""
    conf = {
        "spark.driver.cores": str(CORES),
        "spark.driver.memory": "6g",
        # Python on the driver: 1 GB per million photos, and training.
        "spark.driver.memoryOverhead": "8g",
        "spark.executor.cores": str(CORES),
        "spark.executor.memory": "4g",
        "spark.executor.memoryOverhead": "4g",
        # All executors start at once; idle ones are released while train runs on the driver alone.
        "spark.dynamicAllocation.enabled": "true",
        "spark.dynamicAllocation.initialExecutors": str(request.executors),
        "spark.dynamicAllocation.maxExecutors": str(request.executors),
        "spark.executorEnv.OMP_NUM_THREADS": "1",
        "spark.executorEnv.PYSPARK_PYTHON": PYTHON,
        # No catalog is needed, and none can be reached from the private subnets.
        "spark.sql.catalogImplementation": "in-memory",
    }
    # POMONA_CACHE is where the driver works on OUT before it is copied to the bucket.
    if stack.mode == "serverless":
        conf |= {
            "spark.emr-serverless.driverEnv.PYSPARK_DRIVER_PYTHON": PYTHON,
            "spark.emr-serverless.driverEnv.PYSPARK_PYTHON": PYTHON,
            "spark.emr-serverless.driverEnv.POMONA_CACHE": "/tmp/pomona",
            "spark.emr-serverless.driver.disk": "100g",
        }
    else:
        conf |= {
            "spark.yarn.appMasterEnv.PYSPARK_PYTHON": PYTHON,
            "spark.yarn.appMasterEnv.POMONA_CACHE": "/mnt/tmp/pomona",  # on the large volume
        }
    return conf | dict(request.conf)


def _start_job_run(
    stack: Stack, request: JobRequest, name: str, entry: str, command: list[str]
) -> str:
    settings = spark_conf(stack, request).items()
    logs = {"s3MonitoringConfiguration": {"logUri": f"s3://{stack.logs}/serverless/"}}
    started = stack.client("emr-serverless").start_job_run(
        applicationId=stack.compute,
        executionRoleArn=stack.role,
        name=f"pomona-{name}",
        executionTimeoutMinutes=request.timeout_minutes,
        jobDriver={
            "sparkSubmit": {
                "entryPoint": entry,
                "entryPointArguments": command,
                "sparkSubmitParameters": " ".join(f"--conf {k}={v}" for k, v in settings),
            }
        },
        configurationOverrides={"monitoringConfiguration": logs},
        tags={"project": "pomona"},
    )
    return str(started["jobRunId"])


def _start_step(
    stack: Stack, request: JobRequest, name: str, entry: str, command: list[str]
) -> str:
    words = ["spark-submit", "--deploy-mode", "cluster"]
    for key, value in spark_conf(stack, request).items():
        words += ["--conf", f"{key}={value}"]
    step = {
        "Name": f"pomona-{name}",
        "ActionOnFailure": "CONTINUE",
        "HadoopJarStep": {"Jar": "command-runner.jar", "Args": [*words, entry, *command]},
    }
    emr = stack.client("emr")
    return str(emr.add_job_flow_steps(JobFlowId=stack.compute, Steps=[step])["StepIds"][0])
