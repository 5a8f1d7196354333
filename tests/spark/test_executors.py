"""Decisions about executors, without a cluster: a session that says what it is told to say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pomona.backbone.spec import BackboneSpec
from pomona.core.errors import CrashError, JobError, RequestError, SourceError
from pomona.photos.source import open_source
from pomona.spark import executors, tasks
from pomona.spark.resources import slots
from pomona.spark.session import Cluster, session
from tests.conftest import photo


def far_away(**conf: str) -> Any:
    known = {"spark.master": "spark://host:7077", **conf}
    return SimpleNamespace(conf=SimpleNamespace(get=lambda key, other=None: known.get(key, other)))


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the probe answer something."""

    def answers(sees: bool = True, missing: tuple[str, ...] = (), trouble: str = "") -> None:
        answer = {"sees": sees, "missing": list(missing), "trouble": trouble}
        monkeypatch.setattr(executors, "_run_probe", lambda spark, probe: [answer])

    return answers


def test_a_source_that_only_hadoop_reads_isnt_tried(probe: Callable[..., None]) -> None:
    probe()
    for uri in ("hdfs://name/photos", "dbfs:/photos", "abfss://c@a.dfs.core.windows.net/p"):
        executors.check(far_away(), "onnx", open_source(uri), ["a.jpg"])


def test_what_executors_lack_is_named(probe: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo())
    source = open_source(tmp_path)
    probe(missing=("onnxruntime",))
    with pytest.raises(RequestError, match="has no onnxruntime"):
        executors.check(far_away(), "onnx", source, ["a.jpg"])
    probe(trouble="[Errno 2] No such file")
    with pytest.raises(SourceError, match="the executors can't read"):
        executors.check(far_away(), "onnx", source, ["a.jpg"])


@dataclass
class Task:
    """A task whose files are a set."""

    there: set[int] = field(default_factory=set)
    is_careful: bool = False
    chunks: str = ""
    folder: str = ""

    def done(self) -> set[int]:
        return self.there

    def with_spec(self, change: Callable[[BackboneSpec], BackboneSpec]) -> Task:
        return Task(self.there, change(BackboneSpec("x", "x")).guard == "child")


Calls = list[tuple[list[int], bool, bool]]
"""(chunks, whether executors see the folder, whether photos are decoded in child processes)"""


def run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, failures: list[JobError | None]
) -> tuple[Task, Calls]:
    calls: Calls = []

    def attempt(task: Task, numbers: Any, shared: bool) -> None:
        calls.append((list(numbers), shared, task.is_careful))
        task.there |= {len(calls) - 1}
        failure = failures.pop(0)
        if failure:
            raise failure

    def run_tasks(spark: Any, chunks: tasks.SharedChunks, count: int, poll: Any) -> None:
        assert count == len(chunks.numbers)
        attempt(chunks.task, chunks.numbers, True)  # type: ignore[arg-type]

    def send_chunks(spark: Any, task: Task, numbers: Any, poll: Any) -> None:
        attempt(task, numbers, False)

    monkeypatch.setattr(tasks, "run_tasks", run_tasks)
    monkeypatch.setattr(tasks, "send_chunks", send_chunks)
    task = Task()
    executors.run_chunks(far_away(), task, range(4), folder)  # type: ignore[arg-type]
    return task, calls


def test_some_executors_dont_see_out(
    monkeypatch: pytest.MonkeyPatch, probe: Callable[..., None], tmp_path: Path
) -> None:
    probe(sees=True)
    lost = JobError(f"Spark gave up: FileNotFoundError: No such file: {tmp_path}/_work/todo.arrow")
    _, calls = run(monkeypatch, tmp_path, [lost, None])
    assert calls == [([0, 1, 2, 3], True, False), ([1, 2, 3], False, False)]


def test_workers_that_die_get_a_second_try_and_no_third(
    monkeypatch: pytest.MonkeyPatch, probe: Callable[..., None], tmp_path: Path
) -> None:
    probe(sees=False)
    _, calls = run(monkeypatch, tmp_path, [CrashError("gone"), None])
    assert calls == [([0, 1, 2, 3], False, False), ([1, 2, 3], False, True)]
    with pytest.raises(CrashError):
        run(monkeypatch, tmp_path, [CrashError("gone"), CrashError("gone again")])
    with pytest.raises(JobError, match="another reason"):
        run(monkeypatch, tmp_path, [JobError("another reason")])


def test_a_cluster_that_grows_isnt_taken_for_small() -> None:
    grows = {"spark.dynamicAllocation.enabled": "true", "spark.executor.cores": "4"}
    assert slots(far_away(**grows)) == 64
    assert slots(far_away(**grows, **{"spark.dynamicAllocation.maxExecutors": "3"})) == 12


def test_a_session_of_another_thread_is_used_and_left(spark: Any) -> None:
    sessions: list[Any] = []

    def work() -> None:
        with session(Cluster()) as theirs:
            sessions.append(theirs)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert sessions == [spark]
    assert spark.range(3).count() == 3
