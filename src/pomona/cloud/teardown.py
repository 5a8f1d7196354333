"""Delete a stack with all that it made, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pomona.cloud.jobs import FINAL_STATES, POLL_SECONDS, job_runs, recent, status
from pomona.cloud.stack import Stack, aws_errors
from pomona.core.errors import PomonaError, RequestError

DELETE_TRIES = 3
"""Attempts to delete the stack: a log that EMR writes late makes its bucket non-empty again."""

MOST_JOBS = 1000
"""Unfinished jobs that are looked for."""

MOST_POLLS = 2400
"""How often the deletion is asked for: ten hours. boto3's own limit is one hour."""

STOPPED_STATES = ("CREATED", "STOPPED", "TERMINATED")
"""States in which an EMR Serverless application can be deleted."""

OnStep = Callable[[str], None]


def holdings(stack: Stack) -> dict[str, Any]:
    """Return what a teardown would end and delete. Raises RequestError if AWS refuses.

    It holds ``stack``, ``region``, ``compute``, ``jobs`` (ids of unfinished ones) and ``objects``
    (the count in each of its buckets, old versions and delete markers included).
    """
    jobs = [record["job"] for record in recent(stack, MOST_JOBS) if record["ok"] is None]
    with aws_errors():
        buckets = {bucket.name: bucket.object_versions for bucket in _buckets(stack)}
        objects = {name: sum(1 for _ in versions.all()) for name, versions in buckets.items()}
    names = {"stack": stack.name, "region": stack.region, "compute": stack.compute}
    return {**names, "jobs": jobs, "objects": objects}


def check_empty(held: dict[str, Any]) -> None:
    """Raise RequestError if the buckets hold anything."""
    full = [f"s3://{name} holds {n:,} objects" for name, n in held["objects"].items() if n]
    if full:
        raise RequestError(
            f"{' and '.join(full)}, which would be lost; nothing was touched. Copy away what you "
            "need, then say --delete-data"
        )


def teardown(
    stack: Stack, delete_data: bool = False, on_step: OnStep = lambda _: None
) -> dict[str, Any]:
    """End the stack's jobs and delete what it made, and nothing else. Waits until it is gone.

    ``delete_data`` empties the stack's two buckets, old versions too; without it a bucket that
    holds anything raises RequestError, before anything is touched. ``on_step`` gets a description
    of each step. Returns what `holdings` returned before. Raises RequestError too if AWS refuses,
    and PomonaError if CloudFormation can't delete the stack.
    """
    held = holdings(stack)
    if not delete_data:
        check_empty(held)
    with aws_errors():
        _end_compute(stack, held["jobs"], on_step)
        _revoke_rules(stack)
        for _ in range(DELETE_TRIES if delete_data else 1):
            if delete_data:
                on_step("emptying the stack's buckets")
                _empty_buckets(stack)
            on_step("deleting the stack")
            reason = _delete_stack(stack)
            if reason is None:
                return held
    raise PomonaError(
        f"CloudFormation could not delete {stack.name}: {reason}; what it deleted is "
        "gone: say the same again, or look at the stack's events"
    )


def _end_compute(stack: Stack, jobs: Sequence[str], on_step: OnStep) -> None:
    """Cancel jobs and stop what runs them; EMR still writes logs until that is done."""
    if stack.mode == "serverless":
        client = stack.client("emr-serverless")
        for job in jobs:
            if status(stack, job)["state"] != "CANCELLING":
                on_step(f"cancelling {job}")
                client.cancel_job_run(applicationId=stack.compute, jobRunId=job)
        _poll_until(lambda: all(run["state"] in FINAL_STATES for run in job_runs(stack)))
        if _application_state(client, stack) not in (*STOPPED_STATES, "STOPPING"):
            on_step("stopping the application")
            client.stop_application(applicationId=stack.compute)
        _poll_until(lambda: _application_state(client, stack) in STOPPED_STATES)
    elif stack.mode == "ec2":
        client = stack.client("emr")
        if not _cluster_state(client, stack).startswith("TERMINAT"):
            on_step(f"ending the cluster and its {len(jobs)} unfinished jobs")
            client.terminate_job_flows(JobFlowIds=[stack.compute])
        # Not boto3's waiter, to which TERMINATED_WITH_ERRORS is a failure. (EMR Serverless has
        # no waiters.)
        _poll_until(lambda: _cluster_state(client, stack).startswith("TERMINATED"))


def _application_state(client: Any, stack: Stack) -> str:
    return str(client.get_application(applicationId=stack.compute)["application"]["state"])


def _cluster_state(client: Any, stack: Stack) -> str:
    return str(client.describe_cluster(ClusterId=stack.compute)["Cluster"]["Status"]["State"])


def _poll_until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        time.sleep(POLL_SECONDS)


def _revoke_rules(stack: Stack) -> None:
    """Revoke all rules of the stack's security groups: EMR added rules that name each other."""
    if not stack.groups:
        return
    ec2 = stack.client("ec2")
    for group in ec2.describe_security_groups(GroupIds=list(stack.groups))["SecurityGroups"]:
        for rules, revoke in (
            (group["IpPermissions"], ec2.revoke_security_group_ingress),
            (group["IpPermissionsEgress"], ec2.revoke_security_group_egress),
        ):
            if rules:
                revoke(GroupId=group["GroupId"], IpPermissions=rules)


def _buckets(stack: Stack) -> list[Any]:
    """Return boto3's resources of the stack's buckets that an earlier attempt didn't delete."""
    from botocore.exceptions import ClientError

    s3 = stack.session.resource("s3", region_name=stack.region)
    buckets = []
    for name in filter(None, (stack.data, stack.logs)):
        try:
            s3.meta.client.head_bucket(Bucket=name)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
                raise
        else:
            buckets.append(s3.Bucket(name))
    return buckets


def _empty_buckets(stack: Stack) -> None:
    for bucket in _buckets(stack):
        for response in bucket.object_versions.delete():
            for error in response.get("Errors", []):
                raise RequestError(
                    f"s3://{bucket.name}/{error['Key']} can't be deleted: {error['Code']}"
                )


def _delete_stack(stack: Stack) -> str | None:
    """Delete the stack and wait. Returns why CloudFormation failed, or None."""
    from botocore.exceptions import WaiterError

    cloudformation = stack.client("cloudformation")
    cloudformation.delete_stack(StackName=stack.id)
    polls = {"Delay": POLL_SECONDS, "MaxAttempts": MOST_POLLS}
    waiter = cloudformation.get_waiter("stack_delete_complete")
    try:
        waiter.wait(StackName=stack.id, WaiterConfig=polls)
    except WaiterError as error:
        if "Stacks" not in error.last_response:  # describe_stacks itself failed
            raise
        return str(error.last_response["Stacks"][0].get("StackStatusReason") or error)
    return None
