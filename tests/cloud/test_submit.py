"""``pomona cloud emr submit``, and which stacks are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest

from pomona.backbone import weights
from pomona.cloud.stack import find_stack
from pomona.cloud.submit import ENTRY, PYTHON, JobRequest, submit
from pomona.core.errors import MissingError, RequestError
from pomona.core.uris import redacted
from tests.cloud.conftest import (
    EU,
    PHOTOS,
    RESULTS,
    client,
    deploy,
    run_of,
    step_of,
    submit_words,
)

pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse:UserWarning")


def test_a_job_on_serverless(emr: Any, serverless: str) -> None:
    options = ["--executors", "3", "--spark-conf", "spark.executor.memory=5g", "--json"]
    code, output, errors = emr(*submit_words(serverless, *options, "--", "--label", "top"))
    assert code == 0, errors
    record = json.loads(output)
    stack = find_stack(serverless)
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
    assert settings["spark.emr-serverless.driverEnv.PYSPARK_PYTHON"] == PYTHON
    bucket, key = spark["entryPoint"].removeprefix("s3://").split("/", 1)
    assert bucket == stack.data
    entry = client("s3").get_object(Bucket=bucket, Key=key)["Body"].read().decode()
    assert entry == ENTRY
    assert "pomona.cli.spark_job" in entry
    assert run_of(stack, record["job"]).execution_role_arn == stack.role


def test_a_job_on_ec2(emr: Any, on_ec2: str) -> None:
    code, output, errors = emr(*submit_words(on_ec2))
    assert code == 0, errors
    stack = find_stack(on_ec2)
    job = output.split()[1]
    assert job.startswith("s-")
    words = step_of(stack, job).args
    assert words[:3] == ["spark-submit", "--deploy-mode", "cluster"]
    assert f"spark.yarn.appMasterEnv.PYSPARK_PYTHON={PYTHON}" in words
    place = words.index("run")
    assert words[place - 1].startswith(f"s3://{stack.data}/jobs/")
    words_shown = output.split("pomona ", 1)[1].split()
    assert [redacted(word) for word in words[place:]] == words_shown


def test_secrets_are_not_printed(emr: Any, serverless: str) -> None:
    """EMR gets them, since the job needs them; neither the table nor the JSON shows them."""
    places = ["s3://KEY:HUSH@photos/fruit", "--out", "s3://KEY:HU/SH@results/out?secret_key=HUSH"]
    words = [*places, "--stack", serverless, "--weights", "s3://KEY:HUSH@w/mine.onnx?region=HUSH"]
    for further in ([], ["--json"]):
        code, output, errors = emr("submit", *words, *further)
        assert code == 0, errors
        assert "HU" not in output + errors
        assert "KEY" not in output + errors
    command = json.loads(output)["command"]
    shown = ["run", PHOTOS, "--out", RESULTS, "--weights", "s3://w/mine.onnx"]
    assert command == shown
    _, output, errors = emr("submit", "https://KEY:HUSH@x/y", *words[1:])
    assert "not https://x/y" in errors
    assert "HU" not in output + errors


def test_weights_are_uploaded_once(serverless: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "mine.safetensors"
    state = weights.load_weights("random:7").state
    assert state is not None
    save_file(state, file)
    stack = find_stack(serverless)
    records = [submit(stack, JobRequest(PHOTOS, RESULTS, weights=str(file))) for _ in range(2)]
    place = records[0]["command"][-1]
    assert place == records[1]["command"][-1]
    assert place.startswith(
        f"s3://{stack.data}/weights/mine-{weights.load_weights(str(file)).digest[:16]}"
    )
    s3 = client("s3")
    listed = s3.list_object_versions(Bucket=stack.data, Prefix="weights/")["Versions"]
    assert len(listed) == 1
    s3.download_file(stack.data, listed[0]["Key"], str(tmp_path / "copy.safetensors"))
    copy = load_file(tmp_path / "copy.safetensors")
    assert sorted(copy) == sorted(state)
    for damaged in (b"", b"x" * (tmp_path / "copy.safetensors").stat().st_size):
        s3.put_object(Bucket=stack.data, Key=listed[0]["Key"], Body=damaged)
        submit(stack, JobRequest(PHOTOS, RESULTS, weights=str(file)))
        again = s3.get_object(Bucket=stack.data, Key=listed[0]["Key"])["Body"].read()
        assert again == (tmp_path / "copy.safetensors").read_bytes()


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
        find_stack("any")


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
            find_stack("any")

    def no_credentials(*_: Any, **__: Any) -> None:
        raise NoCredentialsError

    monkeypatch.setattr(boto3, "Session", no_credentials)
    with pytest.raises(RequestError, match="aws configure"):
        find_stack("any")
