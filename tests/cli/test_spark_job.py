"""`pomona.cli.spark_job`: the command inside a job that spark-submit or a platform started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import boto3
import pytest

from pomona.cli.spark_job import local_weights
from pomona.core.errors import WeightsError
from tests.conftest import fill

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.slow
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
    done = subprocess.run(
        list(map(str, [submit, *settings, file, *words, *quick])),
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "6 (3 Training, 3 Test)" in done.stdout
