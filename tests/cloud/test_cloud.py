"""Jobs on Amazon EMR, against moto: the real template, the real commands.

moto knows neither ``AWS::EMRServerless::Application`` in templates (added below, on moto's own
application), nor bucket policies, budgets and rules in them (passed over), nor deletes a VPC with
its route table (left out), and its jobs are done at once (their state is set by hand).
"""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pomona.backbone import weights
from pomona.cli.spark_job import local_weights
from pomona.cloud import emr as emr_module
from pomona.core.errors import JobError, MissingError, PomonaError, RequestError, WeightsError
from pomona.core.uris import redacted as shown
from tests.conftest import fill

boto3 = pytest.importorskip("boto3")

from moto import mock_aws  # noqa: E402
from moto.cloudformation import parsing  # noqa: E402
from moto.cloudformation.models import cloudformation_backends  # noqa: E402
from moto.core import DEFAULT_ACCOUNT_ID  # noqa: E402
from moto.core.common_models import CloudFormationModel  # noqa: E402
from moto.ec2.models.vpcs import VPC  # noqa: E402
from moto.emr.models import emr_backends  # noqa: E402
from moto.emrserverless.models import emrserverless_backends  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (ROOT / "deploy" / "emr" / "template.yaml").read_text(encoding="utf-8")
EU = "eu-central-1"
PHOTOS, RESULTS = "s3://photos/fruit", "s3://results/out"

pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse:UserWarning")


class Application(CloudFormationModel):  # type: ignore[misc]
    """What moto lacks: the application as a resource of a template."""

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
        given = cloudformation_json["Properties"]
        assert given["AutoStopConfiguration"]["Enabled"]
        return cls(application(given["Name"], region_name))

    @classmethod
    def delete_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str
    ) -> None:
        emrserverless_backends[account_id][region_name].delete_application(resource_name)


def application(name: str, region: str = EU) -> str:
    # moto's list of releases ends before Spark 4.
    made = client("emr-serverless", region).create_application(
        name=name, releaseLabel="emr-7.0.0", type="SPARK"
    )
    return str(made["applicationId"])


@pytest.fixture(autouse=True, scope="module")
def _amazon() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    for name in ("AWS_DEFAULT_REGION", "AWS_PROFILE"):
        patch.delenv(name, raising=False)
    patch.setattr(emr_module, "POLL_SECONDS", 0)
    patch.setattr(VPC, "delete_from_cloudformation_json", lambda *_, **__: None)
    logging.getLogger("moto").setLevel(logging.ERROR)
    for known in (parsing.get_model_list, parsing.get_model_map, parsing.get_name_type_map):
        known.cache_clear()
    mock = mock_aws()
    mock.start(reset=False)  # a server of another test may be running
    session = boto3.Session()  # one for all: each new one parses megabytes of JSON
    patch.setattr(boto3, "Session", lambda: session)
    yield
    mock.stop()
    patch.undo()


@functools.cache
def client(service: str, region: str = EU) -> Any:
    return boto3.Session().client(service, region_name=region)


numbers = itertools.count()


def deploy(mode: str, region: str = EU) -> str:
    """Make a stack of the template; returns its name."""
    name = f"fruit{next(numbers)}"
    # CloudFormation would make up a lower-case name, moto doesn't.
    template = TEMPLATE.replace("EmptyOnDelete:", f"RepositoryName: {name}\n      EmptyOnDelete:")
    given = {
        "Mode": mode,
        "BudgetEmail": "someone@example.org",
        "Image": f"{DEFAULT_ACCOUNT_ID}.dkr.ecr.{region}.amazonaws.com/{name}:1",
    }
    client("cloudformation", region).create_stack(
        StackName=name,
        TemplateBody=template,
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in given.items()],
        Capabilities=["CAPABILITY_IAM"],
    )
    return name


@pytest.fixture(scope="module")
def serverless() -> str:
    return deploy("serverless")


@pytest.fixture(scope="module")
def on_ec2() -> str:
    return deploy("ec2")


@pytest.fixture
def emr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call ``pomona cloud emr``; returns (code, stdout, stderr)."""
    from pomona.cli.main import main

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pomona", "cloud", "emr", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return call


def submit_words(stack: str, *further: str) -> list[str]:
    words = ["submit", PHOTOS, "--out", RESULTS, "--stack", stack, "--weights", "random:0"]
    return [*words, *further]


def run_of(stack: emr_module.Stack, job: str) -> Any:
    """moto's own record of a serverless job."""
    backend = emrserverless_backends[DEFAULT_ACCOUNT_ID][stack.region]
    return next(run for run in backend.job_runs[stack.compute] if run.id == job)


def step_of(stack: emr_module.Stack, job: str) -> Any:
    cluster = emr_backends[DEFAULT_ACCOUNT_ID][stack.region].clusters[stack.compute]
    return next(step for step in cluster.steps if step.id == job)


def put(bucket: str, key: str, text: str) -> None:
    body = gzip.compress(text.encode()) if key.endswith(".gz") else text.encode()
    client("s3").put_object(Bucket=bucket, Key=key, Body=body)


# --- submit ------------------------------------------------------------------------------------


def test_a_job_on_serverless(emr: Any, serverless: str) -> None:
    options = ["--executors", "3", "--spark-conf", "spark.executor.memory=5g", "--json"]
    code, told, errors = emr(*submit_words(serverless, *options, "--", "--label", "top"))
    assert code == 0, errors
    record = json.loads(told)
    stack = emr_module.find(serverless)
    spark = run_of(stack, record["job"]).job_driver["sparkSubmit"]
    region = f"?region={EU}"
    words = ["run", PHOTOS + region, "--out", RESULTS + region, "--label", "top"]
    assert spark["entryPointArguments"] == [*words, "--weights", "random:0"]
    assert record["command"] == [word.removesuffix(region) for word in spark["entryPointArguments"]]
    settings = dict(
        pair.split("=", 1) for pair in spark["sparkSubmitParameters"].split(" ") if "=" in pair
    )
    assert settings["spark.dynamicAllocation.maxExecutors"] == "3"
    assert settings["spark.executor.memory"] == "5g"
    assert settings["spark.emr-serverless.driverEnv.PYSPARK_PYTHON"] == emr_module.PYTHON
    bucket, key = spark["entryPoint"].removeprefix("s3://").split("/", 1)
    assert bucket == stack.data
    entry = client("s3").get_object(Bucket=bucket, Key=key)["Body"].read().decode()
    assert entry == emr_module.ENTRY
    assert "pomona.cli.spark_job" in entry
    assert run_of(stack, record["job"]).execution_role_arn == stack.role


def test_a_job_on_ec2(emr: Any, on_ec2: str) -> None:
    code, told, errors = emr(*submit_words(on_ec2))
    assert code == 0, errors
    stack = emr_module.find(on_ec2)
    job = told.split()[1]
    assert job.startswith("s-")
    words = step_of(stack, job).args
    assert words[:3] == ["spark-submit", "--deploy-mode", "cluster"]
    assert f"spark.yarn.appMasterEnv.PYSPARK_PYTHON={emr_module.PYTHON}" in words
    place = words.index("run")
    assert words[place - 1].startswith(f"s3://{stack.data}/jobs/")
    told_words = told.split("pomona ", 1)[1].split()
    assert [shown(word) for word in words[place:]] == told_words


def test_secrets_are_not_printed(emr: Any, serverless: str) -> None:
    """EMR gets them, since the job needs them; neither the table nor the JSON shows them."""
    places = ["s3://KEY:HUSH@photos/fruit", "--out", "s3://KEY:HU/SH@results/out?secret_key=HUSH"]
    words = [*places, "--stack", serverless, "--weights", "s3://KEY:HUSH@w/mine.onnx?region=HUSH"]
    for further in ([], ["--json"]):
        code, told, errors = emr("submit", *words, *further)
        assert code == 0, errors
        assert "HU" not in told + errors
        assert "KEY" not in told + errors
    command = json.loads(told)["command"]
    shown = ["run", PHOTOS, "--out", RESULTS, "--weights", "s3://w/mine.onnx"]
    assert command == shown
    _, told, errors = emr("submit", "https://KEY:HUSH@x/y", *words[1:])
    assert "not https://x/y" in errors
    assert "HU" not in told + errors


def test_weights_are_uploaded_once(serverless: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "mine.safetensors"
    state = weights.load_weights("random:7").state
    assert state is not None
    save_file(state, file)
    stack = emr_module.find(serverless)
    told = [
        emr_module.submit(stack, emr_module.Job(PHOTOS, RESULTS, weights=str(file)))
        for _ in range(2)
    ]
    place = told[0]["command"][-1]
    assert place == told[1]["command"][-1]
    assert place.startswith(
        f"s3://{stack.data}/weights/mine-{weights.load_weights(str(file)).digest[:16]}"
    )
    s3 = client("s3")
    listed = s3.list_object_versions(Bucket=stack.data, Prefix="weights/")["Versions"]
    assert len(listed) == 1
    s3.download_file(stack.data, listed[0]["Key"], str(tmp_path / "copy.safetensors"))
    copy = load_file(tmp_path / "copy.safetensors")
    assert sorted(copy) == sorted(state)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["submit", "photos", "--out", RESULTS], "SOURCE is s3://BUCKET/FOLDER"),
        (["submit", PHOTOS, "--out", "out"], "--out is s3://BUCKET/FOLDER"),
        (["submit", PHOTOS, "--out", RESULTS, "--", "--master", "yarn"], "stands before --"),
        (["submit", PHOTOS, "--out", RESULTS, "--executors", "0"], "--executors is at least 1"),
        (["submit", PHOTOS, "--out", RESULTS, "--timeout-minutes", "1"], "at least 5"),
        (["submit", PHOTOS, "--out", RESULTS, "--spark-conf", "a=b c"], "without blanks"),
        (["submit", PHOTOS, "--out", RESULTS, "--weights", "nowhere.onnx"], "no weights at"),
        (["status", "s-123"], "lists them"),
        (["logs", "s-123"], "lists them"),
    ],
)
def test_wrong_requests(emr: Any, serverless: str, words: list[str], rule: str) -> None:
    place = words.index("--") if "--" in words else len(words)
    code, _, errors = emr(*words[:place], "--stack", serverless, *words[place:])
    assert code == 2
    assert rule in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_a_stack_that_runs_no_jobs(emr: Any) -> None:
    name = deploy("prepare")
    assert "Mode=serverless or Mode=ec2" in emr(*submit_words(name))[2]
    assert "has no jobs yet" in emr("status", "--stack", name)[1]
    assert "and so no jobs" in emr("logs", "00f1", "--stack", name)[2]


def test_other_stacks_are_refused(emr: Any, serverless: str) -> None:
    code, _, errors = emr("status", "--stack", "nothing")
    assert (code, "there is no stack nothing in eu-central-1" in errors) == (2, True)
    code, _, errors = emr("status", "--stack", serverless, "--region", "eu-west-1")
    assert (code, "in eu-west-1" in errors) == (2, True)
    foreign = {"Resources": {"DataBucket": {"Type": "AWS::S3::Bucket"}}}
    client("cloudformation").create_stack(StackName="foreign", TemplateBody=json.dumps(foreign))
    code, _, errors = emr("teardown", "--stack", "foreign", "--yes", "--delete-data")
    assert (code, "was not made by Pomona's" in errors) == (2, True)
    made = client("cloudformation").list_stack_resources(StackName="foreign")
    bucket = made["StackResourceSummaries"][0]["PhysicalResourceId"]
    client("s3").head_bucket(Bucket=bucket)


def test_without_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(MissingError, match=r"pip install 'pomona\[aws\]'"):
        emr_module.find("any")


def test_what_amazon_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """With botocore's own stubber: moto checks no rights, and knows no missing credentials."""
    from botocore.exceptions import NoCredentialsError
    from botocore.stub import Stubber

    session = boto3.Session()
    formation = session.client("cloudformation", region_name=EU)
    monkeypatch.setattr(session, "client", lambda *_, **__: formation)
    with Stubber(formation) as stub:
        stub.add_client_error("describe_stacks", "AccessDenied", "User: x\nis not authorized")
        with pytest.raises(RequestError, match=r"AWS refused: .*AccessDenied"):
            emr_module.find("any")

    def no_credentials(*_: Any, **__: Any) -> None:
        raise NoCredentialsError

    monkeypatch.setattr(boto3, "Session", no_credentials)
    with pytest.raises(RequestError, match="aws configure"):
        emr_module.find("any")


# --- status, logs ------------------------------------------------------------------------------


def test_waiting(emr: Any, serverless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = emr_module.find(serverless)
    job = emr_module.submit(stack, emr_module.Job(PHOTOS, RESULTS, weights="random:0"))["job"]
    run, states = run_of(stack, job), iter(["RUNNING", "FAILED"])
    run.state, run.state_details = "PENDING", "exit\n code 1"
    seen: list[str] = []

    def on_state(record: dict[str, Any]) -> None:
        seen.append(record["state"])
        run.state = next(states, run.state)

    with pytest.raises(
        JobError, match=f"ended as FAILED: exit code 1; pomona cloud emr logs {job}"
    ):
        emr_module.wait(stack, job, on_state)
    assert seen == ["PENDING", "RUNNING", "FAILED"]
    code, told, _ = emr("status", job, "--stack", serverless, "--json")
    assert (code, json.loads(told)["ok"]) == (0, False)
    assert json.loads(told)["billed"]["vCPUHour"] == 0
    listed = json.loads(emr("status", "--stack", serverless, "--json")[1])["jobs"]
    assert job in [each["job"] for each in listed]
    assert f"{job}  FAILED" in emr("status", "--stack", serverless)[1]


def test_submit_waits_until_it_is_done_or_interrupted(
    emr: Any, serverless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, told, errors = emr(*submit_words(serverless, "--wait", "--json"))
    assert (code, json.loads(told)["state"]) == (0, "SUCCESS")
    assert "SUCCESS after 0:00:00" in errors

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(emr_module, "wait", interrupt)
    code, _, errors = emr(*submit_words(serverless, "--wait"))
    assert (code, "the job goes on without you" in errors) == (1, True)


def test_a_failed_step(on_ec2: str) -> None:
    stack = emr_module.find(on_ec2)
    job = emr_module.submit(stack, emr_module.Job(PHOTOS, RESULTS, weights="random:0"))["job"]
    step_of(stack, job).state = "CANCEL_PENDING"
    assert emr_module.status(stack, job)["ok"] is None
    step_of(stack, job).state = "FAILED"
    with pytest.raises(JobError, match="ended as FAILED"):
        emr_module.wait(stack, job, lambda _: None)
    assert {each["job"]: each["ok"] for each in emr_module.recent(stack)}[job] is False


def test_logs_of_serverless(emr: Any, serverless: str) -> None:
    stack = emr_module.find(serverless)
    code, _, errors = emr("logs", "00f1", "--stack", serverless)
    assert (code, "no logs of 00f1" in errors) == (2, True)
    base = f"serverless/applications/{stack.compute}/jobs"
    put(stack.logs, f"{base}/00f1/SPARK_DRIVER/stderr.gz", "starting\nextracting features")
    put(stack.logs, f"{base}/00f1/SPARK_DRIVER/stdout.gz", "48 photos")
    put(stack.logs, f"{base}/00f1/SPARK_EXECUTOR/1/stderr.gz", "an executor's")
    put(stack.logs, f"{base}/00f10/SPARK_DRIVER/stdout.gz", "another job's")
    code, told, _ = emr("logs", "00f1", "--stack", serverless, "--lines", "1")
    assert (code, told) == (0, "extracting features\n48 photos\n")
    found = json.loads(emr("logs", "00f1", "--stack", serverless, "--json")[1])
    assert [each["text"] for each in found] == ["starting\nextracting features", "48 photos"]


def test_logs_of_ec2(on_ec2: str) -> None:
    stack = emr_module.find(on_ec2)
    base = f"ec2/{stack.compute}"
    step = "tracking URL: http://ip-10-77-0-9:8088/proxy/application_1700_0001/"
    put(stack.logs, f"{base}/steps/s-1AB/stderr.gz", step)
    inside = f"{base}/containers/application_1700_0001/container_1700_0001_01"
    put(stack.logs, f"{inside}_000001/stdout.gz", "48 photos")
    put(stack.logs, f"{inside}_000002/stdout.gz", "an executor's")
    put(stack.logs, f"{base}/containers/application_1700_0002/x_000001/stdout.gz", "another's")
    assert [text for _, text in emr_module.logs(stack, "s-1AB")] == [step, "48 photos"]


# --- teardown ----------------------------------------------------------------------------------


def test_teardown_touches_only_what_the_stack_made(
    emr: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign bucket, application, job and stack stay as they are."""
    s3, apps, serverless = client("s3"), client("emr-serverless"), deploy("serverless")
    stack, other = emr_module.find(serverless), emr_module.find(deploy("serverless"))
    s3.create_bucket(
        Bucket=f"{serverless}-photos", CreateBucketConfiguration={"LocationConstraint": EU}
    )
    put(f"{serverless}-photos", "apple.jpg", "x")
    put(other.data, "apple.jpg", "x")
    foreign = application("foreign")
    role = f"arn:aws:iam::{DEFAULT_ACCOUNT_ID}:role/x"
    foreign_job = apps.start_job_run(applicationId=foreign, executionRoleArn=role)["jobRunId"]
    for each in (stack, other):
        job = emr_module.submit(each, emr_module.Job(PHOTOS, RESULTS, weights="random:0"))["job"]
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

    code, told, errors = emr("teardown", "--stack", serverless, "--delete-data", "--yes")
    assert (code, f"{serverless} is gone" in told) == (0, True), errors
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
    assert emr_module.find(other.name).id == other.id


def test_teardown_of_a_cluster() -> None:
    stack, ec2 = emr_module.find(deploy("ec2")), client("ec2")
    foreign = client("emr").run_job_flow(
        Name="foreign", Instances={"KeepJobFlowAliveWhenNoSteps": True, "InstanceCount": 1}
    )["JobFlowId"]
    assert len(stack.groups) == 3
    for one, two in itertools.permutations(stack.groups, 2):  # as EMR does
        ec2.authorize_security_group_ingress(
            GroupId=one,
            IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": two}]}],
        )
    emr_module.teardown(stack)  # its buckets are empty: no --delete-data is needed
    clusters = emr_backends[DEFAULT_ACCOUNT_ID][EU].clusters
    assert clusters[stack.compute].state == "TERMINATED"
    assert clusters[foreign].state != "TERMINATED"
    left = {group["GroupId"] for group in ec2.describe_security_groups()["SecurityGroups"]}
    assert not left & set(stack.groups)


def test_teardown_of_what_stands_still() -> None:
    """An application that was stopped, a job that is being cancelled, a cluster that idled out."""
    stack = emr_module.find(deploy("serverless"))
    job = emr_module.submit(stack, emr_module.Job(PHOTOS, RESULTS, weights="random:0"))["job"]
    run, seen = run_of(stack, job), []
    run.state = "CANCELLING"
    client("emr-serverless").stop_application(applicationId=stack.compute)

    def on_step(step: str) -> None:
        seen.append(step)

    with pytest.MonkeyPatch.context() as patch:

        def finish(_: float) -> None:
            run.state = "CANCELLED"

        patch.setattr(time, "sleep", finish)
        emr_module.teardown(stack, delete_data=True, on_step=on_step)
    assert seen == ["emptying the stack's buckets", "deleting the stack"]
    on_ec2, seen = emr_module.find(deploy("ec2")), []
    client("emr").terminate_job_flows(JobFlowIds=[on_ec2.compute])
    emr_module.teardown(on_ec2, on_step=on_step)
    assert seen == ["deleting the stack"]


def test_a_log_that_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """moto deletes at once, so that CloudFormation's answer is given by hand."""
    stack, told = emr_module.find(deploy("prepare")), iter(["the bucket is not empty", ""])

    def delete(_: emr_module.Stack) -> str:
        why = next(told)
        put(stack.logs, "late.gz", "x") if why else None
        return why

    monkeypatch.setattr(emr_module, "_delete", delete)
    emr_module.teardown(stack, delete_data=True)
    assert "Versions" not in client("s3").list_object_versions(Bucket=stack.logs)
    monkeypatch.setattr(emr_module, "_delete", lambda _: "a reason")
    with pytest.raises(PomonaError, match=r"could not delete .*: a reason"):
        emr_module.teardown(stack, delete_data=True)


def test_teardown_again_where_one_bucket_is_gone(emr: Any) -> None:
    """moto can't fail halfway, so that its record of the stack is made to say so."""
    name = deploy("prepare")
    before = emr_module.find(name)
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
        emr_module.find(name)
    record.status = "DELETE_FAILED"
    again = emr_module.find(name)
    assert (again.data, again.logs) == ("", before.logs)
    assert emr_module.holdings(again)["objects"] == {before.logs: 1}
    code, told, errors = emr("teardown", "--stack", name, "--delete-data", "--yes")
    assert (code, f"{name} is gone" in told) == (0, True), errors
    assert before.logs not in [each["Name"] for each in client("s3").list_buckets()["Buckets"]]


def test_a_failed_deletion_is_told(serverless: str) -> None:
    """With botocore's own stubber: in moto a deletion can't fail."""
    from botocore.stub import Stubber

    formation = boto3.Session().client("cloudformation", region_name=EU)

    class Session:
        def client(self, *_: Any, **__: Any) -> Any:
            return formation

    stack = emr_module.find(serverless)
    with Stubber(formation) as stub:
        about = {"StackName": stack.name, "CreationTime": 0, "StackId": stack.id}
        stub.add_response("delete_stack", {}, {"StackName": stack.id})
        for status in ("DELETE_IN_PROGRESS", "DELETE_FAILED"):
            answer = {**about, "StackStatus": status, "StackStatusReason": "a reason"}
            stub.add_response("describe_stacks", {"Stacks": [answer]}, {"StackName": stack.id})
        assert emr_module._delete(replace(stack, session=Session())) == "a reason"
        stub.assert_no_pending_responses()


# --- inside the job ----------------------------------------------------------------------------


def test_weights_come_from_a_bucket(store: str) -> None:
    endpoint = dict(each.split("=") for each in store.split("&"))["endpoint_override"]
    s3 = boto3.Session().client("s3", region_name="us-east-1", endpoint_url=endpoint)
    s3.create_bucket(Bucket="for-jobs")
    s3.put_object(Bucket="for-jobs", Key="weights/mine-1.onnx", Body=b"content")
    words = ["run", "x", "--weights", f"s3://for-jobs/weights/mine-1.onnx?{store}", "--out", "y"]
    with local_weights(words) as local:
        assert [local[n] for n in (0, 1, 2, 4, 5)] == [words[n] for n in (0, 1, 2, 4, 5)]
        assert Path(local[3]).name == "mine-1.onnx"
        assert Path(local[3]).read_bytes() == b"content"
    assert not Path(local[3]).exists()
    with local_weights(["run", "--weights", "random:0"]) as local:
        assert local == ["run", "--weights", "random:0"]
    words[3] = f"s3://for-jobs/nothing.onnx?{store}"
    with pytest.raises(WeightsError, match="can't be read"), local_weights(words):
        pass


@pytest.mark.parametrize(
    "uri", ["s3://KEY:HUSH@x:99999/y.onnx?scheme=HUSH", "s3://KEY:HU/SH@w/y.onnx?secret_key=HUSH"]
)
def test_an_address_of_weights_is_told_without_secrets(uri: str) -> None:
    """Arrow repeats what it can't parse."""
    with (
        pytest.raises(WeightsError, match="can't be read") as told,
        local_weights(["--weights", uri]),
    ):
        pass
    assert not re.search("HU|SH|KEY", str(told.value)), told.value


def test_a_job_takes_the_session_of_spark_submit(tmp_path: Path) -> None:
    """As a cluster starts it: spark-submit with the file that jobs name. --master isn't used."""
    import pyspark

    source = fill(tmp_path / "source", labels=1, each=3)
    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    words = ["extract", source, "--out", tmp_path / "out", "--master", "nonsense"]
    quick = ["--weights", "random:0", "--image-size", "32", "--device", "cpu"]
    settings = ["--master", "local[1]", "--conf", "spark.ui.enabled=false"]
    environment = {
        **os.environ,
        "SPARK_HOME": str(submit.parents[1]),
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
    }
    file = ROOT / "deploy" / "job.py"
    told = subprocess.run(
        list(map(str, [submit, *settings, file, *words, *quick])),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-2000:]
    assert "6 (3 Training, 3 Test)" in told.stdout
