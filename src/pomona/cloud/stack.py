"""The CloudFormation stack of ``deploy/emr/template.yaml``: find it, and list what it made.

The resources are asked of CloudFormation on every call, by logical name, so that nothing outside
the stack can be touched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pomona.core.errors import MissingError, RequestError, first_line

REGION = "eu-central-1"
"""Region of a stack when neither ``--region`` nor AWS's own settings name one."""


@dataclass(frozen=True)
class Stack:
    """A stack and the resources that it made."""

    name: str
    region: str
    id: str  # CloudFormation's, which stays valid while the stack is being deleted
    mode: Literal["prepare", "serverless", "ec2"]  # prepare: nothing is there yet that runs jobs
    data: str  # name of a bucket; empty if that is already deleted, as with `logs`
    logs: str
    role: str  # ARN of the role that jobs run as
    compute: str  # id of the EMR Serverless application, or of the EMR cluster
    groups: tuple[str, ...]  # ids of its security groups
    session: Any  # boto3's

    def client(self, service: str) -> Any:
        """Return boto3's client of a service in the stack's region."""
        return _client(self.session, service, self.region)


@functools.lru_cache(maxsize=16)  # boto3 parses a service's description for each new client
def _client(session: Any, service: str, region: str) -> Any:
    return session.client(service, region_name=region)


def find_stack(name: str, region: str | None = None) -> Stack:
    """Look a stack up.

    Raises RequestError if there is no such stack, it isn't one of Pomona's, or AWS refuses, and
    MissingError if boto3 isn't installed.
    """
    with aws_errors() as boto3:
        session = boto3.Session()
        region = region or session.region_name or REGION
        cloudformation = session.client("cloudformation", region_name=region)
        description = _describe(cloudformation, name, region)
        pages = cloudformation.get_paginator("list_stack_resources").paginate(StackName=name)
        ids = {
            (each["LogicalResourceId"], each["ResourceType"]): each["PhysicalResourceId"]
            for page in pages
            for each in page["StackResourceSummaries"]
            if each.get("PhysicalResourceId") and each["ResourceStatus"] != "DELETE_COMPLETE"
        }
    outputs = {each["OutputKey"]: each["OutputValue"] for each in description.get("Outputs", [])}
    data, logs = (ids.get((name, "AWS::S3::Bucket"), "") for name in ("DataBucket", "LogBucket"))
    # A teardown that failed halfway may have deleted a bucket, and must be able to go on.
    is_complete = (data and logs) or description["StackStatus"].startswith("DELETE_")
    if not outputs.get("Pomona", "").startswith("emr-") or not is_complete:
        raise RequestError(
            f"the stack {name} in {region} was not made by Pomona's deploy/emr/template.yaml: "
            "name another with --stack"
        )
    application = ids.get(("Application", "AWS::EMRServerless::Application"), "")
    cluster = ids.get(("Cluster", "AWS::EMR::Cluster"), "")
    return Stack(
        name=name,
        region=region,
        id=description["StackId"],
        mode="serverless" if application else "ec2" if cluster else "prepare",
        data=data,
        logs=logs,
        role=outputs.get("Role", ""),
        compute=application or cluster,
        groups=tuple(id_ for (_, kind), id_ in ids.items() if kind == "AWS::EC2::SecurityGroup"),
        session=session,
    )


def _describe(cloudformation: Any, name: str, region: str) -> dict[str, Any]:
    from botocore.exceptions import ClientError

    try:
        return dict(cloudformation.describe_stacks(StackName=name)["Stacks"][0])
    except ClientError as error:
        if "does not exist" not in str(error):
            raise
        raise RequestError(
            f"there is no stack {name} in {region}: docs/cloud.md tells how to deploy one; "
            "--stack and --region name others"
        ) from error


@contextlib.contextmanager
def aws_errors() -> Iterator[Any]:
    """Yield the module boto3, and turn AWS's errors into a RequestError of one line."""
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
