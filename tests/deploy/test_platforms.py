"""The files of deploy/, checked by validators of their formats and against the rest of the project.

Tests have none of these clouds: what passes here has the right shape, no more.
"""

from __future__ import annotations

import copy
import doctest
import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from pomona.cloud import submit
from pomona.cloud.stack import REGION, Stack
from pomona.cloud.submit import ENTRY, PYTHON, JobRequest, spark_conf
from tests.cloud.conftest import TEMPLATE
from tests.conftest import benchmark

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
EU = ["eu-central-1", "eu-west-1", "eu-west-3"]
COMMANDS = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def read(*parts: str) -> str:
    return DEPLOY.joinpath(*parts).read_text(encoding="utf-8")


def check_words(words: list[str]) -> None:
    """Each option of a command line exists."""
    section = COMMANDS.split(f"## pomona {words[0]}\n", 1)[1].split("\n##", 1)[0]
    for word in words:
        assert not word.startswith("--") or f"{word} " in section, word


# --- EMR ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    """The template as plain data: !Ref X is {"Ref": "X"}."""
    cfnlint = pytest.importorskip("cfnlint.decode.cfn_yaml")
    found: dict[str, Any] = cfnlint.loads(TEMPLATE)
    return found


def lint(text: str, regions: list[str]) -> list[str]:
    from cfnlint.api import lint as check
    from cfnlint.config import ManualArgs

    return [str(match) for match in check(text, config=ManualArgs(regions=regions))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cfn_lint_finds_nothing() -> None:
    assert lint(TEMPLATE, EU) == []
    wrong = TEMPLATE.replace("IdleTimeoutMinutes:", "IdleTimeoutHours:")
    assert any("IdleTimeoutHours" in line for line in lint(wrong, EU[:1]))


def of_kind(template: dict[str, Any], kind: str) -> dict[str, Any]:
    resources = template["Resources"].items()
    found = {name: each["Properties"] for name, each in resources if each["Type"] == kind}
    assert found, kind
    return found


def test_buckets_are_closed(template: dict[str, Any]) -> None:
    policies = of_kind(template, "AWS::S3::BucketPolicy")
    for name, bucket in of_kind(template, "AWS::S3::Bucket").items():
        assert bucket["BucketEncryption"]
        assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
        assert len(bucket["PublicAccessBlockConfiguration"]) == 4
        assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
        policy = next(each for each in policies.values() if each["Bucket"] == {"Ref": name})
        first = policy["PolicyDocument"]["Statement"][0]
        assert (first["Effect"], first["Principal"], first["Action"]) == ("Deny", "*", "s3:*")
        assert first["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
        assert len(first["Resource"]) == 2
    logs = template["Resources"]["LogBucket"]["Properties"]["LifecycleConfiguration"]["Rules"]
    assert logs[0]["ExpirationInDays"] == {"Ref": "LogRetentionDays"}


def test_roles_may_little(template: dict[str, Any]) -> None:
    """No wildcard in what is allowed: neither an action nor all resources."""
    policies = [
        *of_kind(template, "AWS::IAM::ManagedPolicy").values(),
        *of_kind(template, "AWS::IAM::Role")["ServiceRole"]["Policies"],
    ]
    for policy in policies:
        for statement in policy["PolicyDocument"]["Statement"]:
            actions, resource = statement["Action"], statement["Resource"]
            assert "*" not in "".join(actions if isinstance(actions, list) else [actions])
            assert resource != "*"
    source = of_kind(template, "AWS::IAM::ManagedPolicy")["SourcePolicy"]
    assert not re.search("Put|Delete", str(source))


def test_jobs_cannot_change_what_is_run(template: dict[str, Any]) -> None:
    statements = of_kind(template, "AWS::IAM::ManagedPolicy")["JobPolicy"]["PolicyDocument"]
    (deny,) = (each for each in statements["Statement"] if each["Effect"] == "Deny")
    assert set(deny["Action"]) == {"s3:PutObject", "s3:DeleteObject", "s3:DeleteObjectVersion"}
    places = {each["Fn::Sub"] for each in deny["Resource"]}
    assert places == {f"${{DataBucket.Arn}}/{name}/*" for name in ("packages", "jobs", "weights")}
    assert "Condition" not in deny
    # Those are the folders that the command and the bootstrap action name.
    code = Path(submit.__file__).read_text(encoding="utf-8")
    assert 'f"jobs/{' in code
    assert 'f"weights/{' in code


def test_the_network_is_closed(template: dict[str, Any]) -> None:
    kinds = {each["Type"] for each in template["Resources"].values()}
    assert not kinds & {"AWS::EC2::NatGateway", "AWS::EC2::InternetGateway", "AWS::EC2::Route"}
    for subnet in of_kind(template, "AWS::EC2::Subnet").values():
        assert subnet["MapPublicIpOnLaunch"] is False
    (endpoint,) = of_kind(template, "AWS::EC2::VPCEndpoint").values()
    assert endpoint["VpcEndpointType"] == "Gateway"


def test_regions_and_costs(template: dict[str, Any]) -> None:
    either = template["Rules"]["Region"]["Assertions"][0]["Assert"]["Fn::Or"]
    assert either[0] == {"Fn::Contains": [EU, {"Ref": "AWS::Region"}]}
    assert either[1] == {"Fn::Equals": [{"Ref": "OtherRegion"}, {"Ref": "AWS::Region"}]}
    assert template["Parameters"]["OtherRegion"]["Default"] == ""
    assert REGION in EU
    (application,) = of_kind(template, "AWS::EMRServerless::Application").values()
    assert application["AutoStopConfiguration"]["Enabled"] is True
    assert "InitialCapacity" not in application
    (cluster,) = of_kind(template, "AWS::EMR::Cluster").values()
    idle = cluster["AutoTerminationPolicy"]["IdleTimeout"]["Fn::FindInMap"]
    assert idle == ["Idle", {"Ref": "IdleMinutes"}, "Seconds"]
    seconds = template["Mappings"]["Idle"]
    assert {int(m): v["Seconds"] for m, v in seconds.items()} == {
        m: 60 * m for m in (5, 15, 30, 60)
    }
    assert list(seconds) == template["Parameters"]["IdleMinutes"]["AllowedValues"]
    (budget,) = of_kind(template, "AWS::Budgets::Budget").values()
    for alarm in budget["NotificationsWithSubscribers"]:
        assert alarm["Subscribers"][0]["Address"] == {"Ref": "BudgetEmail"}
    assert "Default" not in template["Parameters"]["BudgetEmail"]


def test_images_and_nodes_fit_the_commands(template: dict[str, Any]) -> None:
    """One Python, one release, one entry in template, images, bootstrap script and command."""
    label = template["Parameters"]["ReleaseLabel"]["Default"]
    emr, kubernetes = read("emr", "Dockerfile"), read("kubernetes", "Dockerfile")
    script = read("emr", "bootstrap.sh")
    assert f"/{label}:" in emr
    for text in (emr, kubernetes, script):
        assert PYTHON.removesuffix("/bin/python") in text
        assert "--require-hashes --requirement" in text
    for text, user in ((emr, "hadoop:hadoop"), (kubernetes, "185")):
        assert text.strip().splitlines()[-1] == f"USER {user}"
        ignored = read("emr" if text == emr else "kubernetes", "Dockerfile.dockerignore")
        for line in re.findall(r"^COPY (.+) \S+$", text, re.M):
            for source in line.split():
                assert source.startswith("dist/") or (ROOT / source).exists(), source
                assert f"\n!{source}\n" in ignored, source
    assert f"s3://${{DataBucket}}/packages/{Path('emr/bootstrap.sh').name}" in TEMPLATE
    assert (
        subprocess.run(["bash", "-n", DEPLOY / "emr" / "bootstrap.sh"], check=False).returncode == 0
    )
    body = ENTRY.split("\n\n", 1)[1]
    assert read("job.py").endswith(body)


def locked(name: str) -> dict[str, list[Requirement]]:
    """The entries of a lock by package; each has a hash."""
    entries: dict[str, list[Requirement]] = {}
    for entry in re.split(r"(?m)^(?=[a-z])", read(f"{name}.txt"))[1:]:
        pin, *hashes = re.split(r"\s+--hash=", entry.replace("\\\n", " ").strip())
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), pin
        requirement = Requirement(pin)
        entries.setdefault(requirement.name, []).append(requirement)
    return entries


def requirements_of(file: Path) -> list[Requirement]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def wanted(*extras: str) -> list[Requirement]:
    """What the package asks of the index, for some extras."""
    asked = [Requirement(line) for line in metadata.requires("pomona") or []]
    return [
        one
        for one in asked
        if one.name != "pomona"
        and (not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in extras))
    ]


def test_locks_are_what_the_package_wants_as_it_is_tested() -> None:
    """Versions of constraints.txt, each with hashes; `make lock` writes them again."""
    tested: dict[str, set[str]] = {}
    for one in requirements_of(ROOT / "constraints.txt"):
        tested.setdefault(one.name, set()).add(str(one.specifier))
    for name in ("cluster", "notebook", "gpu"):
        for package, entries in locked(name).items():
            versions = {str(one.specifier) for one in entries}
            assert versions <= tested.get(package, versions), (name, package)
    for name, extras in {
        "cluster": ("train", "report"),
        "notebook": ("notebook", "mlflow", "train", "report"),
    }.items():
        entries_of = locked(name)
        for one in wanted(*extras):
            if (name, one.name) == ("cluster", "pyspark"):  # the platform has its own
                assert one.name not in entries_of
                continue
            for entry in entries_of[one.name]:
                assert one.specifier.contains(str(entry.specifier).removeprefix("==")), entry
    assert {one.name for one in requirements_of(DEPLOY / "jupyter.txt")} <= entries_of.keys()


def test_base_images_are_pinned_by_what_the_registry_tells(tmp_path: Path) -> None:
    """With a docker that answers: tag and digest, also over an older digest."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    docker = tmp_path / "docker"
    docker.write_text(
        "#!/bin/sh\nfor tag; do :; done\necho sha256:$(echo $tag | sha256sum | cut -c-64)\n"
    )
    docker.chmod(0o755)
    words = [tmp_path / "deploy" / "pin.sh"]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for _ in range(2):
        subprocess.run(words, env=os.environ | path, check=True, capture_output=True)
        for file in (DEPLOY / "Dockerfile", *DEPLOY.glob("*/Dockerfile")):
            (base,) = re.findall("^ARG BASE=([^@\n]*)", file.read_text(), re.M)
            digest = hashlib.sha256(f"{base}\n".encode()).hexdigest()
            pinned = (tmp_path / "deploy" / file.relative_to(DEPLOY)).read_text()
            assert f"\nARG BASE={base}@sha256:{digest}\n" in pinned
    docker.write_text("#!/bin/sh\necho none\n")
    refused = subprocess.run(words, env=os.environ | path, check=False, capture_output=True)
    assert refused.returncode == 1


# --- Databricks --------------------------------------------------------------------------------


@pytest.fixture
def jobs() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(read("databricks", "resources", "pomona.job.yml"))
    return dict(found["resources"]["jobs"])


def test_jobs_have_the_shape_of_a_bundle(jobs: dict[str, Any]) -> None:
    """By databricks-bundles, which refuses keys that it doesn't know."""
    model = pytest.importorskip("databricks.bundles.jobs").Job
    for job in jobs.values():
        model.from_dict(job)
    wrong = copy.deepcopy(jobs["pomona"])
    wrong["tasks"][0]["python_wheel_task"]["arguments"] = []
    with pytest.raises(ValueError, match="Unexpected field 'arguments'"):
        model.from_dict(wrong)


def test_the_bundle_holds_together(jobs: dict[str, Any]) -> None:
    bundle = yaml.safe_load(read("databricks", "databricks.yml"))
    assert set(bundle) == {"bundle", "include", "artifacts", "sync", "variables", "targets"}
    assert [list((DEPLOY / "databricks").glob(each)) for each in bundle["include"]] != [[]]
    text = read("databricks", "resources", "pomona.job.yml") + str(bundle)
    used = set(re.findall(r"\$\{var\.(\w+)\}", text))
    assert used == set(bundle["variables"])
    folder = DEPLOY / "databricks" / "resources"
    notebook = folder / jobs["notebook"]["tasks"][0]["notebook_task"]["notebook_path"]
    assert notebook.resolve() == ROOT / "notebooks" / "pomona.ipynb"
    assert notebook.is_file()
    (cluster,) = jobs["notebook"]["job_clusters"]
    given = cluster["new_cluster"]["spark_env_vars"]
    assert all(name in notebook.read_text(encoding="utf-8") for name in given)
    assert not given["POMONA_OUT"].startswith("/Volumes")  # a volume refuses what OUT needs
    synced = [(DEPLOY / "databricks" / each).resolve() for each in bundle["sync"]["paths"]]
    assert notebook.resolve().parent in synced


def test_tasks_call_commands_that_exist(jobs: dict[str, Any]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tasks = jobs["pomona"]["tasks"]
    assert [task["task_key"] for task in tasks] == ["run", "train", "publish"]
    for before, task in zip([None, *tasks], tasks, strict=False):
        wheel = task["python_wheel_task"]
        assert f'{wheel["entry_point"]} = "pomona.cli.spark_job:main"' in project
        assert wheel["parameters"][0] == task["task_key"]
        check_words(wheel["parameters"])
        assert not before or task["depends_on"] == [{"task_key": before["task_key"]}]
        for library in task["libraries"]:
            assert "whl" in library or f'"{library["pypi"]["package"]}"' in project


# --- Kubernetes --------------------------------------------------------------------------------


@pytest.fixture
def manifest() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(read("kubernetes", "spark-application.yaml"))
    return found


def known(given: dict[str, Any]) -> dict[str, Any]:
    """What the Spark operator's own model keeps: it raises on types, and drops unknown keys."""
    api = pytest.importorskip("kubeflow_spark_api.models")
    kept: dict[str, Any] = api.SparkV1beta2SparkApplication.from_dict(given).to_dict()
    return kept


def test_the_operator_knows_every_key(manifest: dict[str, Any]) -> None:
    assert known(manifest) == manifest
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["executor"]["memoryOverheads"] = "4g"
    assert known(wrong) != wrong
    wrong["spec"]["executor"]["cores"] = "many"
    with pytest.raises(ValueError, match="cores"):
        known(wrong)


def test_the_manifest_fits_image_and_commands(manifest: dict[str, Any]) -> None:
    spec, image = manifest["spec"], read("kubernetes", "Dockerfile")
    assert f"spark:{spec['sparkVersion']}-" in image
    assert spec["mainApplicationFile"] == "local:///opt/pomona/job.py"
    assert "COPY deploy/job.py /opt/pomona/job.py" in image
    check_words(spec["arguments"])
    for place in [word for word in spec["arguments"] if word.startswith("s3://")]:
        assert "region=eu-" in place
    assert set(spec["sparkConf"].values()) == {"1", PYTHON}
    for role in ("driver", "executor"):
        pod = spec[role]
        assert pod["podSecurityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["allowPrivilegeEscalation"] is False
    stack = Stack("", "", "", "serverless", "", "", "", "", (), None)
    settings = spark_conf(stack, JobRequest("", ""))
    for role in ("driver", "executor"):
        for key in ("memory", "memoryOverhead", "cores"):
            assert settings[f"spark.{role}.{key}"] == str(spec[role][key]), (role, key)


def test_executors_have_none_of_the_drivers_rights(manifest: dict[str, Any]) -> None:
    kinds: dict[tuple[str, str], dict[str, Any]] = {
        (each["kind"], each["metadata"]["name"]): each
        for each in yaml.safe_load_all(read("kubernetes", "service-accounts.yaml"))
    }
    driver, executor = (manifest["spec"][role]["serviceAccount"] for role in ("driver", "executor"))
    assert driver != executor
    assert kinds["ServiceAccount", executor]["automountServiceAccountToken"] is False
    assert ("ServiceAccount", driver) in kinds
    bound = [each for (kind, _), each in kinds.items() if kind.endswith("Binding")]
    assert [each["subjects"] for each in bound] == [[{"kind": "ServiceAccount", "name": driver}]]
    assert not [kind for kind, _ in kinds if kind.startswith("Cluster")]
    (rule,) = kinds["Role", bound[0]["roleRef"]["name"]]["rules"]
    assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
    assert not {"secrets", "serviceaccounts", "roles"} & set(rule["resources"])


# --- costs -------------------------------------------------------------------------------------


def test_costs_of_the_docs_are_what_the_command_says(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "cloud.md").read_text(encoding="utf-8")
    blocks = re.findall(r"`python (benchmarks/costs\.py[^`]*)`[^`]*```text\n(.*?)```", page, re.S)
    assert blocks
    for command, shown in blocks:
        words = [sys.executable, *command.split()]
        told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert told.strip() == shown.strip(), command


def test_costs_are_computed_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its examples, and its rate is the measured one."""
    costs = benchmark("costs", monkeypatch)
    assert doctest.testmod(costs).failed == 0
    assert doctest.testmod(costs).attempted > 0
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"A vCPU does {costs.EXTRACT:g} photos/s in extract" in page
