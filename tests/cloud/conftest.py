"""Amazon's services as moto plays them, and stacks of the real template on them.

moto knows neither ``AWS::EMRServerless::Application`` in templates (added here, on moto's own
application), nor bucket policies, budgets and rules in them (ignored), nor deletes a VPC with its
route table (left out), and its jobs are finished at once (tests set their state by hand).
"""

from __future__ import annotations

import functools
import gzip
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from moto.cloudformation import parsing
from moto.core import DEFAULT_ACCOUNT_ID
from moto.core.common_models import CloudFormationModel
from moto.ec2.models.vpcs import VPC
from moto.emr.models import emr_backends
from moto.emrserverless.models import emrserverless_backends

from pomona.cloud import jobs, teardown
from pomona.cloud.stack import Stack

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (ROOT / "deploy" / "emr" / "template.yaml").read_text(encoding="utf-8")
EU = "eu-central-1"
PHOTOS, RESULTS = "s3://photos/fruit", "s3://results/out"


class Application(CloudFormationModel):  # type: ignore[misc]
    """The EMR Serverless application as a resource of a template, which moto lacks."""

    def __init__(self, identity: str) -> None:
        self.physical_resource_id = identity

    @staticmethod
    def cloudformation_name_type() -> str:
        return "Name"

    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::EMRServerless::Application"

    @classmethod
    def create_from_cloudformation_json(
        cls,
        resource_name: str,
        cloudformation_json: Any,
        account_id: str,
        region_name: str,
        **_: Any,
    ) -> Application:
        properties = cloudformation_json["Properties"]
        assert properties["AutoStopConfiguration"]["Enabled"]
        return cls(make_application(properties["Name"], region_name))

    @classmethod
    def delete_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str
    ) -> None:
        emrserverless_backends[account_id][region_name].delete_application(resource_name)


def make_application(name: str, region: str = EU) -> str:
    # moto's list of releases ends before Spark 4.
    application = client("emr-serverless", region).create_application(
        name=name, releaseLabel="emr-7.0.0", type="SPARK"
    )
    return str(application["applicationId"])


@pytest.fixture(autouse=True, scope="package")
def _amazon() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    for name in ("AWS_DEFAULT_REGION", "AWS_PROFILE"):
        patch.delenv(name, raising=False)
    for module in (jobs, teardown):
        patch.setattr(module, "POLL_SECONDS", 0)
    patch.setattr(VPC, "delete_from_cloudformation_json", lambda *_, **__: None)
    logging.getLogger("moto").setLevel(logging.ERROR)
    for known in (parsing.get_model_list, parsing.get_model_map, parsing.get_name_type_map):
        known.cache_clear()
    mock = mock_aws()
    mock.start(reset=False)  # a server of another test may be running
    session = boto3.Session()  # shared: each new one parses megabytes of JSON
    patch.setattr(boto3, "Session", lambda: session)
    yield
    mock.stop()
    patch.undo()


@functools.cache
def client(service: str, region: str = EU) -> Any:
    return boto3.Session().client(service, region_name=region)


numbers = itertools.count()


def deploy(mode: str, region: str = EU) -> str:
    """Make a stack of the template and return its name."""
    name = f"fruit{next(numbers)}"
    # CloudFormation invents a lower-case name, moto doesn't.
    template = TEMPLATE.replace("EmptyOnDelete:", f"RepositoryName: {name}\n      EmptyOnDelete:")
    parameters = {
        "Mode": mode,
        "BudgetEmail": "someone@example.org",
        "Image": f"{DEFAULT_ACCOUNT_ID}.dkr.ecr.{region}.amazonaws.com/{name}:1",
    }
    client("cloudformation", region).create_stack(
        StackName=name,
        TemplateBody=template,
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in parameters.items()],
        Capabilities=["CAPABILITY_IAM"],
    )
    return name


@pytest.fixture(scope="package")
def serverless() -> str:
    return deploy("serverless")


@pytest.fixture(scope="package")
def on_ec2() -> str:
    return deploy("ec2")


@pytest.fixture
def emr(command: Any) -> Any:
    """Call ``pomona cloud emr``; returns (code, stdout, stderr)."""
    return functools.partial(command, "cloud", "emr")


def submit_words(stack: str, *further: str) -> list[str]:
    words = ["submit", PHOTOS, "--out", RESULTS, "--stack", stack, "--weights", "random:0"]
    return [*words, *further]


def run_of(stack: Stack, job: str) -> Any:
    """Return moto's own record of a serverless job."""
    backend = emrserverless_backends[DEFAULT_ACCOUNT_ID][stack.region]
    return next(run for run in backend.job_runs[stack.compute] if run.id == job)


def step_of(stack: Stack, job: str) -> Any:
    cluster = emr_backends[DEFAULT_ACCOUNT_ID][stack.region].clusters[stack.compute]
    return next(step for step in cluster.steps if step.id == job)


def put(bucket: str, key: str, text: str) -> None:
    body = gzip.compress(text.encode()) if key.endswith(".gz") else text.encode()
    client("s3").put_object(Bucket=bucket, Key=key, Body=body)
