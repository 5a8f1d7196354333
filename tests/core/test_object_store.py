"""Object stores that fail: what is tried again, what isn't, and who asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pomona.cli import spark_job
from pomona.core import object_store
from pomona.core.errors import RequestError, SourceError, WeightsError
from pomona.core.object_store import S3_ATTEMPTS, TRIES, connect, is_transient, retrying
from pomona.core.uris import refuse_uri
from pomona.photos.listing import list_files
from pomona.photos.reading import read
from pomona.photos.source import Source, arrange, open_source
from tests.conftest import photo
from tests.faults import KINDS, Proxy, share
from tests.object_stores import paths, table, upload


def contents_of(source: Source, *names: str) -> dict[str, bytes | None]:
    photos = arrange(table(*names)) if names else None
    photos = photos or arrange(list_files(source).files)
    batches = [b.slice(n, 8) for b in photos.to_batches() for n in range(0, b.num_rows, 8)]
    rows = [row for batch in read(iter(batches), source) for row in batch.to_pylist()]
    return {row["path"]: row["content"] for row in rows}


def test_faults_that_pass_cost_no_photo(store: str, through: Proxy) -> None:
    photos = {f"{n // 16}/{n}.jpg": photo(n, (32, 32)) for n in range(64)}
    upload(store, "flaky", photos)
    through.reset(share(25))
    assert contents_of(open_source(f"s3://flaky?{through.options}")) == photos
    assert set(through.faults) == set(KINDS), "every kind was met"


def test_only_the_key_that_keeps_failing_is_unreadable(
    store: str, through: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "TRIES", 2)
    upload(store, "failing", {"1.jpg": b"x", "2.jpg": b"y"})
    through.reset(lambda _, path, __: "slow down" if path.endswith("/1.jpg") else None)
    found = contents_of(open_source(f"s3://failing?{through.options}"))
    assert found == {"1.jpg": None, "2.jpg": b"y"}
    assert through.asked["HEAD", "/failing/1.jpg"] == 2 * S3_ATTEMPTS, "bounded"


def test_what_cannot_pass_is_asked_once(store: str, through: Proxy) -> None:
    upload(store, "closed", {"1.jpg": b"x", "2.jpg": b"y"})
    through.reset(lambda _, path, __: "denied" if path.endswith("/1.jpg") else None)
    source = open_source(f"s3://closed?{through.options}")
    assert contents_of(source, "1.jpg", "2.jpg", "no.jpg") == {
        "1.jpg": None,
        "2.jpg": b"y",
        "no.jpg": None,
    }
    assert through.asked["HEAD", "/closed/1.jpg"] == 1
    assert through.asked["HEAD", "/closed/no.jpg"] == 1


def test_a_listing_is_tried_again(store: str, through: Proxy) -> None:
    upload(store, "listed", {"a/1.jpg": b"x", "a/2.jpg": b"y"})
    times = S3_ATTEMPTS + 1  # more than the client tries by itself
    through.reset(lambda _, path, n: "internal" if "list-type" in path and n < times else None)
    found = list_files(open_source(f"s3://listed?{through.options}"))
    assert paths(found.files) == ["a/1.jpg", "a/2.jpg"]


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate.", True),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response", True),
        ("AWS Error UNKNOWN (HTTP status 429) during HeadObject operation: No response", True),
        ("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 28, Timeout", True),
        ("for key 'NO_SUCH_.jpg' in 'b': AWS Error INTERNAL_FAILURE during GetObject", True),
        ("google::cloud::Status(UNAVAILABLE: Retry policy exhausted", True),
        ("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation", False),
        ("AWS Error INVALID_ACCESS_KEY_ID during ListObjectsV2 operation", False),
        ("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response", False),
        ("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation: No response", False),
        ("google::cloud::Status(PERMISSION_DENIED: Permanent error", False),
    ],
)
def test_what_may_pass(text: str, passes: bool) -> None:
    assert is_transient(OSError(text)) is passes


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pomona.core.object_store.time.sleep", lambda _: None)
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise OSError("AWS Error SLOW_DOWN")

    with pytest.raises(OSError, match="SLOW_DOWN"):
        retrying(fail)
    assert len(tries) == TRIES
    monkeypatch.setattr(object_store, "PATIENCE", -1.0)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        retrying(fail)
    assert len(tries) == TRIES + 1


def test_google_is_given_seconds_and_not_a_quarter_of_an_hour() -> None:
    assert connect("gs://anonymous@bucket")
    with pytest.raises(SourceError, match="gs://bucket: Unexpected query parameter"):
        connect("gs://anonymous@bucket?foo=1")


def test_credentials_in_a_uri_are_not_in_its_name() -> None:
    found = open_source("s3://KEY:SECRET@bucket/a@b/c")
    assert (found.root, found.name) == ("bucket/a@b/c", "s3://bucket/a@b/c")
    assert found.store == "s3://KEY:SECRET@bucket"
    assert open_source("s3a://KEY:SECRET@bucket/a").name == "s3a://bucket/a"
    assert open_source("abfss://c@host/a").name == "abfss://c@host/a"
    with pytest.raises(SourceError) as caught:
        connect("s3://KEY:SECRET@bucket?foo=1")
    assert "SECRET" not in str(caught.value)


def test_credentials_are_not_in_what_is_refused(tmp_path: Path) -> None:
    for place in ("s3://KEY:SECRET@b/o", "s3a://KEY:SEC/RET@b/o", "abfss://u:SEC@b/o?sig=SEC"):
        with pytest.raises(RequestError, match=r"not [a-z3]+://b/o: ") as caught:
            refuse_uri(place, "--out")
        assert "SEC" not in str(caught.value)
    for text in ("s3://KEY:SECRET@", "s3://KEY:SECRET@?region=x"):
        with pytest.raises(SourceError, match="names no bucket") as refused:
            open_source(text)
        assert "SECRET" not in str(refused.value)
    with pytest.raises(SourceError, match="s3://b/o has a / in its secret: write %2F"):
        open_source("s3://KEY:SEC/RET@b/o")
    with pytest.raises(SourceError, match="s3://b: Cannot parse URI: 's3://b' due") as odd:
        connect("s3://KEY:SEC RET@b")
    assert "SEC" not in str(odd.value)
    for uri in ("s3://KEY:SECRET@b/w?foo=SECRET", "s3://KEY:SEC RET@b/w"):
        with pytest.raises(WeightsError, match="weights at s3://b/w can't") as weights:
            spark_job._fetch(uri, tmp_path)
        assert "SEC" not in str(weights.value)


def test_credentials_come_from_the_standard_chain(
    store: str, through: Proxy, tmp_path: Path
) -> None:
    upload(store, "signed", {"1.jpg": b"x"})
    file = tmp_path / "credentials"
    lines = "[{}]\naws_access_key_id = {}\naws_secret_access_key = s\n"
    file.write_text(lines.format("default", "FILE") + lines.format("other", "OTHER"))
    uri = f"s3://signed?{through.options}"
    code = (
        "from pomona.photos.listing import list_files\n"
        "from pomona.photos.source import open_source\n"
        f"print(list_files(open_source({uri!r})).files)"
    )
    bare = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    bare |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    profile = {"AWS_SHARED_CREDENTIALS_FILE": str(file)}
    keys = {"AWS_ACCESS_KEY_ID": "ENV", "AWS_SECRET_ACCESS_KEY": "s"}
    for given, user in (
        (profile, "FILE"),
        ({**profile, "AWS_PROFILE": "other"}, "OTHER"),
        ({**profile, **keys}, "ENV"),
    ):
        through.reset()
        subprocess.run([sys.executable, "-c", code], env={**bare, **given}, check=True, timeout=300)
        assert through.users == {user}
