"""``pomona cloud emr status`` and ``logs``, and waiting."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pomona.cloud import jobs
from pomona.cloud.stack import find_stack
from pomona.cloud.submit import JobRequest, submit
from pomona.core.errors import JobError
from tests.cloud.conftest import PHOTOS, RESULTS, put, run_of, step_of, submit_words

pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse:UserWarning")


def test_waiting(emr: Any, serverless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = find_stack(serverless)
    job = submit(stack, JobRequest(PHOTOS, RESULTS, weights="random:0"))["job"]
    run, states = run_of(stack, job), iter(["RUNNING", "FAILED"])
    run.state, run.state_details = "PENDING", "exit\n code 1"
    seen: list[str] = []

    def on_state(record: dict[str, Any]) -> None:
        seen.append(record["state"])
        run.state = next(states, run.state)

    with pytest.raises(
        JobError, match=f"ended as FAILED: exit code 1; pomona cloud emr logs {job}"
    ):
        jobs.wait(stack, job, on_state)
    assert seen == ["PENDING", "RUNNING", "FAILED"]
    code, output, _ = emr("status", job, "--stack", serverless, "--json")
    assert (code, json.loads(output)["ok"]) == (0, False)
    assert json.loads(output)["billed"]["vCPUHour"] == 0
    listed = json.loads(emr("status", "--stack", serverless, "--json")[1])["jobs"]
    assert job in [each["job"] for each in listed]
    assert f"{job}  FAILED" in emr("status", "--stack", serverless)[1]


def test_submit_waits_until_it_is_done_or_interrupted(
    emr: Any, serverless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output, errors = emr(*submit_words(serverless, "--wait", "--json"))
    assert (code, json.loads(output)["state"]) == (0, "SUCCESS")
    assert "SUCCESS after 0:00:00" in errors

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "wait", interrupt)
    code, _, errors = emr(*submit_words(serverless, "--wait"))
    assert (code, "the job goes on without you" in errors) == (1, True)


def test_a_failed_step(on_ec2: str) -> None:
    stack = find_stack(on_ec2)
    job = submit(stack, JobRequest(PHOTOS, RESULTS, weights="random:0"))["job"]
    step_of(stack, job).state = "CANCEL_PENDING"
    assert jobs.status(stack, job)["ok"] is None
    step_of(stack, job).state = "FAILED"
    with pytest.raises(JobError, match="ended as FAILED"):
        jobs.wait(stack, job, lambda _: None)
    assert {each["job"]: each["ok"] for each in jobs.recent(stack)}[job] is False


def test_logs_of_serverless(emr: Any, serverless: str) -> None:
    stack = find_stack(serverless)
    code, _, errors = emr("logs", "00f1", "--stack", serverless)
    assert (code, "no logs of 00f1" in errors) == (2, True)
    base = f"serverless/applications/{stack.compute}/jobs"
    put(stack.logs, f"{base}/00f1/SPARK_DRIVER/stderr.gz", "starting\nextracting features")
    put(stack.logs, f"{base}/00f1/SPARK_DRIVER/stdout.gz", "48 photos")
    put(stack.logs, f"{base}/00f1/SPARK_EXECUTOR/1/stderr.gz", "an executor's")
    put(stack.logs, f"{base}/00f10/SPARK_DRIVER/stdout.gz", "another job's")
    code, output, _ = emr("logs", "00f1", "--stack", serverless, "--lines", "1")
    assert (code, output) == (0, "extracting features\n48 photos\n")
    found = json.loads(emr("logs", "00f1", "--stack", serverless, "--json")[1])
    assert [each["text"] for each in found] == ["starting\nextracting features", "48 photos"]


def test_logs_of_ec2(on_ec2: str) -> None:
    stack = find_stack(on_ec2)
    base = f"ec2/{stack.compute}"
    step = "tracking URL: http://ip-10-77-0-9:8088/proxy/application_1700_0001/"
    put(stack.logs, f"{base}/steps/s-1AB/stderr.gz", step)
    inside = f"{base}/containers/application_1700_0001/container_1700_0001_01"
    put(stack.logs, f"{inside}_000001/stdout.gz", "48 photos")
    put(stack.logs, f"{inside}_000002/stdout.gz", "an executor's")
    put(stack.logs, f"{base}/containers/application_1700_0002/x_000001/stdout.gz", "another's")
    assert [text for _, text in jobs.logs(stack, "s-1AB")] == [step, "48 photos"]
