"""``pomona cloud emr teardown``: what goes, and what stays."""

from __future__ import annotations

import io
import itertools
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from moto.cloudformation.models import cloudformation_backends
from moto.core import DEFAULT_ACCOUNT_ID
from moto.emr.models import emr_backends
from moto.emrserverless.models import emrserverless_backends

from pomona.cloud import teardown
from pomona.cloud.stack import Stack, find_stack
from pomona.cloud.submit import JobRequest, submit
from pomona.core.errors import PomonaError, RequestError
from tests.cloud.conftest import EU, PHOTOS, RESULTS, client, deploy, make_application, put, run_of

pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse:UserWarning")


def test_teardown_touches_only_what_the_stack_made(
    emr: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign bucket, application, job and stack stay as they are."""
    s3, apps, serverless = client("s3"), client("emr-serverless"), deploy("serverless")
    stack, other = find_stack(serverless), find_stack(deploy("serverless"))
    s3.create_bucket(
        Bucket=f"{serverless}-photos", CreateBucketConfiguration={"LocationConstraint": EU}
    )
    put(f"{serverless}-photos", "apple.jpg", "x")
    put(other.data, "apple.jpg", "x")
    foreign = make_application("foreign")
    role = f"arn:aws:iam::{DEFAULT_ACCOUNT_ID}:role/x"
    foreign_job = apps.start_job_run(applicationId=foreign, executionRoleArn=role)["jobRunId"]
    for each in (stack, other):
        job = submit(each, JobRequest(PHOTOS, RESULTS, weights="random:0"))["job"]
        run_of(each, job).state = "RUNNING"
    runs = emrserverless_backends[DEFAULT_ACCOUNT_ID][EU].job_runs
    runs[foreign][0].state = "RUNNING"
    s3.put_bucket_versioning(Bucket=stack.data, VersioningConfiguration={"Status": "Enabled"})
    put(stack.data, "out/a", "1")
    put(stack.data, "out/a", "2")  # an old version
    s3.delete_object(Bucket=stack.data, Key="out/a")  # and a mark
    put(stack.logs, "serverless/x.gz", "x")

    def state(identity: str) -> str:
        return str(apps.get_application(applicationId=identity)["application"]["state"])

    # Refused, with nothing touched: the buckets hold something; then nobody says yes.
    code, _, errors = emr("teardown", "--stack", serverless, "--yes")
    assert (code, f"s3://{stack.data} holds" in errors) == (2, True)
    assert "then say --delete-data" in errors
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, _, errors = emr("teardown", "--stack", serverless, "--delete-data")
    assert (code, "nothing was touched: answer y, or say --yes" in errors) == (2, True)
    assert f"{stack.compute}, where 1 jobs are not over" in errors
    assert (state(stack.compute), runs[stack.compute][0].state) == ("STARTED", "RUNNING")
    assert len(s3.list_object_versions(Bucket=stack.data)["Versions"]) >= 2

    code, output, errors = emr("teardown", "--stack", serverless, "--delete-data", "--yes")
    assert (code, f"{serverless} is gone" in output) == (0, True), errors
    assert runs[stack.compute][0].state == "CANCELLED"
    assert state(stack.compute) == "TERMINATED"
    left = [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]
    assert stack.data not in left
    assert stack.logs not in left
    assert "there is no stack" in emr("status", "--stack", serverless)[2]

    assert s3.list_objects_v2(Bucket=f"{serverless}-photos")["KeyCount"] == 1
    assert s3.list_objects_v2(Bucket=other.data)["KeyCount"] == 2  # and its job's entry script
    assert (state(foreign), state(other.compute)) == ("STARTED", "STARTED")
    assert apps.get_job_run(applicationId=foreign, jobRunId=foreign_job)["jobRun"]["state"] == (
        "RUNNING"
    )
    assert runs[other.compute][0].state == "RUNNING"
    assert find_stack(other.name).id == other.id


def test_teardown_of_a_cluster() -> None:
    stack, ec2 = find_stack(deploy("ec2")), client("ec2")
    foreign = client("emr").run_job_flow(
        Name="foreign", Instances={"KeepJobFlowAliveWhenNoSteps": True, "InstanceCount": 1}
    )["JobFlowId"]
    assert len(stack.groups) == 3
    for one, two in itertools.permutations(stack.groups, 2):  # as EMR does
        ec2.authorize_security_group_ingress(
            GroupId=one,
            IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": two}]}],
        )
    teardown.teardown(stack)  # its buckets are empty: no --delete-data is needed
    clusters = emr_backends[DEFAULT_ACCOUNT_ID][EU].clusters
    assert clusters[stack.compute].state == "TERMINATED"
    assert clusters[foreign].state != "TERMINATED"
    left = {group["GroupId"] for group in ec2.describe_security_groups()["SecurityGroups"]}
    assert not left & set(stack.groups)


def test_teardown_of_what_stands_still() -> None:
    """An application that was stopped, a job that is being cancelled, a cluster that idled out."""
    stack = find_stack(deploy("serverless"))
    job = submit(stack, JobRequest(PHOTOS, RESULTS, weights="random:0"))["job"]
    run, seen = run_of(stack, job), []
    run.state = "CANCELLING"
    client("emr-serverless").stop_application(applicationId=stack.compute)

    def on_step(step: str) -> None:
        seen.append(step)

    with pytest.MonkeyPatch.context() as patch:

        def finish(_: float) -> None:
            run.state = "CANCELLED"

        patch.setattr(time, "sleep", finish)
        teardown.teardown(stack, delete_data=True, on_step=on_step)
    assert seen == ["emptying the stack's buckets", "deleting the stack"]
    on_ec2, seen = find_stack(deploy("ec2")), []
    client("emr").terminate_job_flows(JobFlowIds=[on_ec2.compute])
    teardown.teardown(on_ec2, on_step=on_step)
    assert seen == ["deleting the stack"]


def test_a_log_that_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """moto deletes at once, so the test gives CloudFormation's answer."""
    stack, reasons = find_stack(deploy("prepare")), iter(["the bucket is not empty", None])

    def delete(_: Stack) -> str | None:
        reason = next(reasons)
        put(stack.logs, "late.gz", "x") if reason else None
        return reason

    monkeypatch.setattr(teardown, "_delete_stack", delete)
    teardown.teardown(stack, delete_data=True)
    assert "Versions" not in client("s3").list_object_versions(Bucket=stack.logs)
    monkeypatch.setattr(teardown, "_delete_stack", lambda _: "a reason")
    with pytest.raises(PomonaError, match=r"could not delete .*: a reason"):
        teardown.teardown(stack, delete_data=True)


def test_teardown_again_where_one_bucket_is_gone(emr: Any) -> None:
    """moto can't fail halfway, so the test edits its record of the stack."""
    name = deploy("prepare")
    before = find_stack(name)
    put(before.logs, "late.gz", "x")
    client("s3").delete_bucket(Bucket=before.data)
    record = cloudformation_backends[DEFAULT_ACCOUNT_ID][EU].stacks[before.id]
    record.resource_map._parsed_resources["DataBucket"] = SimpleNamespace(
        logical_resource_id="DataBucket",
        physical_resource_id="",
        cf_resource_type="AWS::S3::Bucket",
        delete=lambda *_: None,
    )
    with pytest.raises(RequestError, match="was not made by Pomona's"):
        find_stack(name)
    record.status = "DELETE_FAILED"
    again = find_stack(name)
    assert (again.data, again.logs) == ("", before.logs)
    assert teardown.holdings(again)["objects"] == {before.logs: 1}
    code, output, errors = emr("teardown", "--stack", name, "--delete-data", "--yes")
    assert (code, f"{name} is gone" in output) == (0, True), errors
    assert before.logs not in [each["Name"] for each in client("s3").list_buckets()["Buckets"]]


def test_a_failed_deletion_is_told(serverless: str) -> None:
    """With botocore's own stubber: in moto a deletion can't fail."""
    from botocore.stub import Stubber

    formation = boto3.Session().client("cloudformation", region_name=EU)

    class Session:
        def client(self, *_: Any, **__: Any) -> Any:
            return formation

    stack = find_stack(serverless)
    with Stubber(formation) as stub:
        about = {"StackName": stack.name, "CreationTime": 0, "StackId": stack.id}
        stub.add_response("delete_stack", {}, {"StackName": stack.id})
        for status in ("DELETE_IN_PROGRESS", "DELETE_FAILED"):
            answer = {**about, "StackStatus": status, "StackStatusReason": "a reason"}
            stub.add_response("describe_stacks", {"Stacks": [answer]}, {"StackName": stack.id})
        assert teardown._delete_stack(replace(stack, session=Session())) == "a reason"
        stub.assert_no_pending_responses()
