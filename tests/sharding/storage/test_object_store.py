from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.errors import ConfigError, DataError, MachineError, MovieNetError
from configs.load import load_config
from configs.schema import StorageConfig
from sharding.__main__ import main
from sharding.frames import open_frames
from sharding.storage.base import Range
from sharding.storage.object_store import ObjectStorage
from sharding.storage.open import open_storage
from sharding.storage.reads import REQUEST_BYTES
from sharding.storage.transfer import PART_BYTES
from tests.sharding.films import film, write_tar
from tests.sharding.servers import faulty_server, free_port, log, nginx, request, rule, s3_server

CHECKOUT = Path(__file__).parents[3]
DATA = random.Random(0).randbytes(300_000)
LARGE = random.Random(2).randbytes(3 * PART_BYTES + 5)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("aws_login")]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def faulty() -> Iterator[str]:
    with faulty_server() as url:
        yield url


def at(url: str, bucket: str, prefix: str = "a/set", **options: object) -> ObjectStorage:
    config = {"endpoint_url": url, "region": "us-east-1", "timeout": 20, **options}
    return ObjectStorage(f"s3://{bucket}/{prefix}", StorageConfig.model_validate(config))


@pytest.fixture
def bucket(s3: str) -> str:
    name = f"bucket-{random.SystemRandom().getrandbits(40)}"
    request(f"{s3}/{name}", "PUT")
    return name


@pytest.fixture
def storage(s3: str, bucket: str) -> ObjectStorage:
    return at(s3, bucket)


def read(storage: ObjectStorage, name: str, offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    storage.read_into([Range(name, offset)], [memoryview(buffer)])
    return bytes(buffer)


# --- the Storage interface, on moto's S3 ----------------------------------------------------------


def test_published_files_are_listed_and_read(storage: ObjectStorage) -> None:
    assert storage.names() == []
    storage.publish("b.tar", b"bytes")
    with storage.publishing("a.tar") as file:
        file.write(b"more ")
        file.write(b"bytes")
        assert storage.names() == ["b.tar"]
    storage.publish("empty", b"")
    assert storage.names() == ["a.tar", "b.tar", "empty"]
    assert (storage.size("a.tar"), storage.size("c.tar"), storage.size("empty")) == (10, None, 0)
    assert (storage.read("a.tar"), storage.read("empty")) == (b"more bytes", b"")
    with storage.open("a.tar") as file:
        file.seek(5)
        assert file.read() == b"bytes"
        assert file.seek(-2, os.SEEK_END) == 8
        assert (file.read(9), file.read()) == (b"es", b"")
    storage.remove("a.tar")
    storage.remove("a.tar")
    assert storage.names() == ["b.tar", "empty"]


def test_datasets_below_one_prefix_are_separate(s3: str, bucket: str) -> None:
    for prefix in ("", "a", "a/b", "ab"):
        at(s3, bucket, prefix).publish("x", prefix.encode())
    for prefix in ("", "a", "a/b", "ab"):
        assert at(s3, bucket, prefix).names() == ["x"]
        assert at(s3, bucket, prefix).read("x") == prefix.encode()


def test_a_failed_block_publishes_nothing(storage: ObjectStorage) -> None:
    storage.publish("a.tar", b"old")

    def fail(size: int) -> None:
        with storage.publishing("a.tar", replace=True) as file:
            file.write(bytes(size))
            raise OSError(5, "Input/output error")

    for size in (3, PART_BYTES + 1):
        with pytest.raises(OSError, match="Input/output"):
            fail(size)
    assert (storage.names(), storage.read("a.tar")) == (["a.tar"], b"old")


@pytest.mark.parametrize("size", [10, 2 * PART_BYTES + 5])
def test_an_existing_file_is_replaced_only_on_request(storage: ObjectStorage, size: int) -> None:
    storage.publish("a.tar", b"x" * size)
    with pytest.raises(DataError, match=r"a\.tar already exists; pass `--replace`"):
        storage.publish("a.tar", b"y" * size)
    assert storage.read("a.tar") == b"x" * size
    storage.publish("a.tar", b"y" * size, replace=True)
    assert storage.read("a.tar") == b"y" * size
    assert storage.names() == ["a.tar"]


@pytest.mark.parametrize("size", [1000, 2 * PART_BYTES + 5])
def test_of_two_publishers_only_the_first_to_finish_writes_the_file(
    s3: str, bucket: str, size: int
) -> None:
    first, second = at(s3, bucket), at(s3, bucket)

    def publish() -> None:
        with second.publishing("a.tar") as file:
            file.write(b"2" * size)
            first.publish("a.tar", b"1" * size)

    with pytest.raises(DataError, match=r"a\.tar already exists"):
        publish()
    assert first.read("a.tar") == b"1" * size
    assert second.names() == ["a.tar"]


def test_of_concurrent_publishers_exactly_one_writes_the_file(s3: str, bucket: str) -> None:
    start = threading.Barrier(4)

    def publish(number: int) -> None:
        with at(s3, bucket).publishing("a.tar") as file:
            file.write(bytes([number]) * 1000)
            start.wait()

    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(publish, number) for number in range(4)]
    errors = [task.exception() for task in tasks]
    assert errors.count(None) == 1
    assert sum(isinstance(error, DataError) for error in errors) == 3
    assert at(s3, bucket).read("a.tar") == bytes([errors.index(None)]) * 1000


def test_ranges_of_several_files_are_read_into_buffers(storage: ObjectStorage) -> None:
    large = random.Random(1).randbytes(2 * REQUEST_BYTES + 7)
    storage.publish("large", large)
    storage.publish("b", b"xyz")
    buffers = [bytearray(len(large) - 3), bytearray(0), bytearray(2)]
    ranges = [Range("large", 3), Range("large", 9), Range("b", 1)]
    storage.read_into(ranges, [memoryview(buffer) for buffer in buffers])
    assert buffers == [large[3:], b"", b"yz"]
    assert storage.read("large") == large
    with pytest.raises(ValueError, match="shorter"):
        storage.read_into(ranges, [memoryview(bytearray(1))])


@pytest.mark.parametrize(("offset", "got"), [(7, 3), (10, 0), (99, 0)])
def test_a_short_read_is_an_error_with_name_offset_and_lengths(
    storage: ObjectStorage, offset: int, got: int
) -> None:
    storage.publish("a.tar", bytes(10))
    with pytest.raises(DataError, match=rf"a\.tar: got {got} bytes at {offset}, want 8; the file"):
        read(storage, "a.tar", offset, 8)


def test_a_range_is_read_in_requests_of_request_bytes(storage: ObjectStorage) -> None:
    assert storage.request_bytes
    storage.publish("large", bytes(2 * storage.request_bytes + 1))
    before = storage.counts()["requests"]
    read(storage, "large", 0, 2 * storage.request_bytes + 1)
    assert storage.counts()["requests"] - before == 3


def test_a_missing_file_is_named(storage: ObjectStorage) -> None:
    for call in (storage.read, storage.open, lambda name: read(storage, name, 0, 1)):
        with pytest.raises(DataError, match=r"no file a\.tar"):
            call("a.tar")


@pytest.mark.parametrize("name", ["", "a/b", "../a", "/etc/passwd", ".hidden", "a\0b"])
def test_only_plain_names_reach_the_store(storage: ObjectStorage, name: str) -> None:
    for call in (storage.size, storage.read, storage.open, storage.remove):
        with pytest.raises(ValueError, match="want a plain name"):
            call(name)
    with pytest.raises(ValueError, match="want a plain name"):
        storage.publish(name, b"")


def test_more_threads_than_requests_in_flight_read_concurrently(s3: str, bucket: str) -> None:
    storage = at(s3, bucket, max_in_flight=4)
    storage.publish("a", DATA)
    places = [random.Random(k).randrange(len(DATA) - 100) for k in range(60)]
    with ThreadPoolExecutor(8) as pool:
        pieces = list(pool.map(lambda place: read(storage, "a", place, 100), places))
    assert pieces == [DATA[place : place + 100] for place in places]


# --- faults, on the faulty server -----------------------------------------------------------------

PROMPT_S = 90
"""Longer than any limit below plus the delays of a busy machine; without a limit it is minutes."""

FAULTS = ["cut", "long", "short", "ignore range", "wrong range", "other version"]


@pytest.fixture
def served(faulty: str) -> ObjectStorage:
    storage = at(faulty, "bucket", timeout=60)
    rule(faulty)
    storage.publish("a", DATA, replace=True)
    assert read(storage, "a", 0, 9) == DATA[:9]
    rule(faulty)
    return storage


@pytest.mark.parametrize("fault", FAULTS)
def test_an_invalid_response_is_a_failed_attempt_and_never_data(
    faulty: str, served: ObjectStorage, fault: str
) -> None:
    rule(faulty, {"do": fault, "times": 2})
    assert read(served, "a", 1000, 5000) == DATA[1000:6000]
    assert len(log(faulty)) == 3


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("long", "a: got a body of more than 5000 bytes, 4 times"),
        ("short", "a: got a body of 4999 bytes, want 5000, 4 times"),
        ("ignore range", "a: .*, 4 times; the server or a proxy sends"),
        ("wrong range", "a: .*, 4 times; the server or a proxy sends"),
        ("other version", "a: changed while it was read .*, 4 times"),
    ],
)
def test_a_server_that_sends_only_invalid_responses_is_a_one_line_error(
    faulty: str, served: ObjectStorage, fault: str, line: str
) -> None:
    rule(faulty, {"do": fault, "times": 99})
    with pytest.raises(DataError, match=line) as caught:
        read(served, "a", 1000, 5000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_requests_to_a_busy_server_are_retried_after_increasing_pauses(
    faulty: str, served: ObjectStorage, status: int
) -> None:
    rule(faulty, {"do": "refuse", "status": status, "code": "SlowDown", "times": 3})
    begin = time.monotonic()
    assert read(served, "a", 0, 50) == DATA[:50]
    assert time.monotonic() - begin > 0.05 + 0.1 + 0.2
    assert len(log(faulty)) == 4


def test_a_server_that_stays_busy_fails_within_the_timeout(faulty: str) -> None:
    storage = at(faulty, "bucket", timeout=3)
    rule(faulty, {"do": "refuse", "status": 503, "code": "SlowDown", "times": 999})
    begin = time.monotonic()
    with pytest.raises(MachineError, match=r"gave up after \d+ tries in 3 s .*503 SlowDown"):
        read(storage, "a", 0, 50)
    assert time.monotonic() - begin < PROMPT_S


def test_a_server_that_lacks_a_method_is_reported_at_once(faulty: str) -> None:
    storage = at(faulty, "bucket", timeout=60)
    rule(faulty, {"do": "refuse", "status": 501, "code": "NotImplemented", "times": 999})
    with pytest.raises(MachineError, match=r"refused: .*501 NotImplemented") as caught:
        read(storage, "a", 0, 50)
    assert "\n" not in str(caught.value)
    assert len(log(faulty)) == 1


@pytest.mark.usefixtures("served")
def test_a_stalled_request_is_cancelled_and_retried(faulty: str) -> None:
    storage = at(faulty, "bucket", timeout=8)
    rule(faulty, {"do": "stall", "seconds": 300})
    begin = time.monotonic()
    assert read(storage, "a", 0, 50) == DATA[:50]
    assert 2 <= time.monotonic() - begin < PROMPT_S


def test_a_slow_response_is_not_retried_while_it_progresses(faulty: str) -> None:
    storage = at(faulty, "bucket", timeout=16)
    rule(faulty)
    storage.publish("slow", LARGE[:REQUEST_BYTES], replace=True)
    rule(faulty, {"do": "slow", "seconds": 5, "method": "GET"})
    begin = time.monotonic()
    assert read(storage, "slow", 0, REQUEST_BYTES) == LARGE[:REQUEST_BYTES]
    assert time.monotonic() - begin > 4
    assert len(log(faulty)) == 1


def test_a_server_that_is_too_slow_fails_within_the_timeout(faulty: str) -> None:
    rule(faulty)
    at(faulty, "bucket").publish("slow", LARGE[:REQUEST_BYTES], replace=True)
    storage = at(faulty, "bucket", timeout=2)
    rule(faulty, {"do": "slow", "seconds": 6, "method": "GET", "times": 9})
    begin = time.monotonic()
    with pytest.raises(MachineError, match=r"slow: gave up after \d tries in 2 s"):
        read(storage, "slow", 0, REQUEST_BYTES)
    assert time.monotonic() - begin < PROMPT_S
    rule(faulty)


def test_a_server_that_never_responds_fails_within_the_timeout(faulty: str) -> None:
    storage = at(faulty, "bucket", timeout=2)
    rule(faulty, {"do": "stall", "seconds": 300, "times": 99})
    begin = time.monotonic()
    with pytest.raises(MachineError, match=r"gave up after \d tries in 2 s .* no response"):
        read(storage, "a", 0, 50)
    assert time.monotonic() - begin < PROMPT_S
    rule(faulty)


@pytest.mark.parametrize(
    "fault",
    [
        {"do": "refuse", "status": 500, "code": "InternalError", "times": 2},
        {"do": "stall", "seconds": 60},
    ],
)
def test_a_large_upload_is_complete_although_some_of_its_parts_fail(
    faulty: str, fault: dict[str, object]
) -> None:
    storage = at(faulty, "bucket", timeout=16)
    rule(faulty, fault | {"method": "PUT"})
    storage.publish("large", LARGE, replace=True)
    assert storage.read("large") == LARGE


def test_a_stalled_upload_fails_within_the_timeout(faulty: str) -> None:
    at(faulty, "bucket").remove("large")
    storage = at(faulty, "bucket", timeout=2)
    rule(faulty, {"do": "stall", "seconds": 300, "method": "PUT", "times": 999})
    begin = time.monotonic()
    with pytest.raises(MachineError, match=r"large: gave up after \d tries in 2 s .* no response"):
        storage.publish("large", LARGE, replace=True)
    assert time.monotonic() - begin < PROMPT_S
    rule(faulty)
    assert storage.size("large") is None


def test_a_successful_write_without_a_response_is_recognised(faulty: str) -> None:
    storage = at(faulty, "bucket")
    storage.remove("b")
    storage.publish("other", b"")
    rule(faulty, {"do": "forget", "method": "PUT"})
    storage.remove("other")
    storage.publish("b", b"mine")
    assert storage.read("b") == b"mine"


@pytest.mark.parametrize(
    "probe",
    [{"do": "overwrite"}, {"do": "refuse", "status": 501, "code": "NotImplemented"}],
)
def test_a_store_without_create_only_writes_causes_one_warning(
    faulty: str, probe: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    storage = at(faulty, "bucket")
    for name in ("c", "d"):
        storage.remove(name)
    rule(faulty, probe | {"method": "PUT", "times": 2})
    storage.publish("c", b"1")
    storage.publish("d", b"2")
    assert (storage.read("c"), storage.read("d")) == (b"1", b"2")
    with pytest.raises(DataError, match="c already exists"):
        storage.publish("c", b"3")
    assert [record.message for record in caplog.records if "create-only" in record.message] == [
        f"{storage.location}: the store has no create-only writes; existing files are still "
        "detected, but no two processes may publish the same name at once"
    ]
    assert not [name for name in storage.names() if name.startswith(".")]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "message", "kind", "line"),
    [
        (403, "AccessDenied", "no", MachineError, r"not permitted: 403 AccessDenied \(no\); req"),
        (400, "ExpiredToken", "old", MachineError, r"credentials have expired: 400 ExpiredToken"),
        (403, "InvalidToken", "old", MachineError, r"credentials have expired: 403 InvalidToken"),
        (301, "PermanentRedirect", "", ConfigError, "wrong region: storage.region is us-east-1"),
        (
            400,
            "AuthorizationHeaderMalformed",
            "the region 'us-east-1' is wrong; expecting 'eu-west-1'",
            ConfigError,
            "wrong region: .* expecting 'eu-west-1'.*; set storage.region to the bucket's",
        ),
        (404, "NoSuchBucket", "", DataError, "no bucket bucket; create it, or fix the URL"),
    ],
)
@pytest.mark.parametrize("call", ["size", "read", "names", "read_into", "publish"])
def test_a_refusal_is_an_immediate_one_line_error(
    faulty: str,
    status: int,
    code: str,
    message: str,
    kind: type[MovieNetError],
    line: str,
    call: str,
) -> None:
    storage = at(faulty, "bucket", prefix="refused")
    refusal = {"do": "refuse", "status": status, "code": code, "message": message, "times": 99}
    calls: dict[str, Callable[[], object]] = {
        "size": lambda: storage.size("a"),
        "read": lambda: storage.read("a"),
        "names": storage.names,
        "read_into": lambda: read(storage, "a", 0, 9),
        "publish": lambda: storage.publish("a", b"", replace=True),
    }
    rule(faulty, refusal)
    with pytest.raises(kind, match=line) as caught:
        calls[call]()
    requests = log(faulty)
    rule(faulty)
    assert "\n" not in str(caught.value)
    # Repeated only with credentials that were read again, and to get the text that HEAD lacks.
    assert len(requests) <= 3, "it was retried until the timeout"


def test_a_missing_bucket_is_named_with_every_kind_of_request(s3: str) -> None:
    storage = at(s3, "no-such-bucket")
    for call in (storage.names, lambda: storage.size("a"), lambda: storage.read("a")):
        with pytest.raises(DataError, match="no bucket no-such-bucket; create it, or fix the URL"):
            call()
    with pytest.raises(DataError, match="no bucket no-such-bucket"):
        storage.publish("a", b"")


@pytest.mark.parametrize(
    ("host", "cause"), [("127.0.0.1", "connection refused"), ("host.invalid", "unknown host")]
)
def test_an_unreachable_endpoint_fails_within_the_timeout(host: str, cause: str) -> None:
    storage = at(f"http://{host}:{free_port()}", "bucket", timeout=1)
    begin = time.monotonic()
    with pytest.raises(MachineError, match=rf"in 1 s .*{cause}; check storage\.endpoint_url"):
        storage.size("a")
    assert time.monotonic() - begin < PROMPT_S


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (400, "ExpiredToken", "credentials have expired"),
        (403, "InvalidAccessKeyId", "403 InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch", "403 SignatureDoesNotMatch"),
    ],
)
def test_a_login_that_expires_or_is_replaced_during_a_run_is_renewed(
    faulty: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    line: str,
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    credentials = tmp_path / "aws-credentials"

    def log_in(key: str) -> None:
        credentials.write_text(
            f"[work]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = t\n"
        )

    log_in("OLDKEY")
    storage = at(faulty, "bucket", profile="work")
    rule(faulty)
    storage.publish("t", DATA, replace=True)
    assert read(storage, "t", 0, 9) == DATA[:9]
    assert all("OLDKEY" in entry["signed"] for entry in log(faulty))
    refusal = {"do": "refuse", "status": status, "code": code, "key": "OLDKEY", "times": 99}
    rule(faulty, refusal)
    with pytest.raises(MachineError, match=line):
        read(storage, "t", 0, 9)
    log_in("NEWKEY")
    assert read(storage, "t", 9, 9) == DATA[9:18]
    assert storage.size("t") == len(DATA)
    rule(faulty)


@pytest.mark.parametrize(
    ("status", "code"), [(400, "RequestTimeout"), (403, "AccessDenied"), (404, "NoSuchKey")]
)
def test_a_stray_refusal_of_a_file_that_was_read_before_is_retried(
    served: ObjectStorage, faulty: str, status: int, code: str
) -> None:
    rule(faulty, {"do": "refuse", "status": status, "code": code, "times": 2})
    assert read(served, "a", 9, 9) == DATA[9:18]
    rule(faulty)


def test_a_file_that_is_deleted_while_it_is_read_is_named_when_time_is_up(faulty: str) -> None:
    storage = at(faulty, "bucket", timeout=3)
    rule(faulty)
    storage.publish("deleted", DATA, replace=True)
    assert read(storage, "deleted", 0, 9) == DATA[:9]
    at(faulty, "bucket").remove("deleted")
    with pytest.raises(DataError, match="no file deleted"):
        read(storage, "deleted", 9, 9)


def test_public_files_need_no_login_and_others_report_that_it_is_missing(
    faulty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule(faulty)
    at(faulty, "bucket").publish("public", b"bytes", replace=True)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    rule(faulty)
    assert at(faulty, "bucket").read("public") == b"bytes"
    assert [entry["signed"] for entry in log(faulty)] == [""]
    rule(faulty, {"do": "refuse", "status": 403, "code": "AccessDenied", "times": 9})
    with pytest.raises(MachineError, match=r"no valid credentials: 403 AccessDenied; log in, or"):
        at(faulty, "bucket").read("public")
    rule(faulty)


@pytest.mark.parametrize("endpoint", ["minio:9000", "localhost"])
def test_an_endpoint_without_a_scheme_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=rf"storage\.endpoint_url: got '{endpoint}', want http"):
        at(endpoint, "bucket").size("a")


def test_redundant_slashes_in_a_url_are_ignored(s3: str, bucket: str) -> None:
    at(s3, bucket, "a//b/").publish("x", b"1")
    assert at(s3, bucket, "a/b").read("x") == b"1"


@pytest.mark.parametrize("prefix", ["a/set", ""])
def test_a_key_with_two_slashes_does_not_fail_the_listing(
    s3: str, bucket: str, prefix: str
) -> None:
    folder = f"{prefix}/" if prefix else ""
    for key in ("x", "-y", "z/other", "/readme.txt", "", ".hidden"):
        request(f"{s3}/{bucket}/{folder}{key}", "PUT", b"x")
    storage = at(s3, bucket, prefix)
    assert storage.names() == ["-y", "x"]
    storage.publish("new", b"data")
    assert storage.names() == ["-y", "new", "x"]


def test_a_key_with_two_slashes_is_a_one_line_error_without_boto3(
    s3: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request(f"{s3}/{bucket}/a/set//readme.txt", "PUT", b"x")
    monkeypatch.setitem(sys.modules, "boto3", None)  # as where it is not installed
    with pytest.raises(DataError, match=r"a/set: cannot list it, .* '//'; remove that key, or"):
        at(s3, bucket).names()


def test_a_missing_profile_is_named(s3: str) -> None:
    storage = at(s3, "bucket", profile="missing")
    with pytest.raises(ConfigError, match=r"storage\.profile: got 'missing'.*could not be found"):
        storage.size("a")


# --- http -----------------------------------------------------------------------------------------

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin") is None,
    reason="nginx is not installed",
)


@needs_nginx
def test_ranges_are_read_from_a_web_server(tmp_path: Path) -> None:
    (tmp_path / "root" / "movies").mkdir(parents=True)
    (tmp_path / "root" / "movies" / "a.tar").write_bytes(DATA)
    (tmp_path / "root" / "movies" / "empty").write_bytes(b"")
    (tmp_path / "root" / "movies" / "a +ü.tar").write_bytes(b"special")
    with nginx(tmp_path / "nginx", tmp_path / "root") as url:
        storage = open_storage(f"{url}/movies", StorageConfig(timeout=20))
        assert (storage.size("a.tar"), storage.size("b.tar")) == (len(DATA), None)
        assert (storage.read("a.tar"), storage.read("empty")) == (DATA, b"")
        assert storage.read("a%20%2B%C3%BC.tar") == storage.read("a +ü.tar") == b"special"
        buffers = [bytearray(1000), bytearray(50)]
        places = [Range("a.tar", 777), Range("a.tar", 200_000)]
        storage.read_into(places, [memoryview(buffer) for buffer in buffers])
        assert buffers == [DATA[777:1777], DATA[200_000:200_050]]
        with storage.open("a.tar") as file:
            file.seek(299_990)
            assert file.read() == DATA[299_990:]
        with pytest.raises(DataError, match=r"no file b\.tar"):
            storage.read("b.tar")
        with pytest.raises(DataError, match=r"a\.tar: got 0 bytes at 300000, want 1"):
            storage.read_into([Range("a.tar", 300_000)], [memoryview(bytearray(1))])
        with pytest.raises(DataError, match="an HTTP server is read-only"):
            storage.publish("x", b"")
        with pytest.raises(DataError, match="an HTTP server is read-only"):
            storage.remove("x")
        with pytest.raises(DataError, match=r"does not list its files; give a \.txt file"):
            storage.names()


@needs_nginx
@pytest.mark.parametrize(("etag", "version"), [("on", "ETag"), ("off", "300000 bytes of 20")])
def test_a_file_replaced_on_a_web_server_is_not_mixed_with_the_old_one(
    tmp_path: Path, etag: str, version: str
) -> None:
    (tmp_path / "root").mkdir()
    path = tmp_path / "root" / "a.tar"
    path.write_bytes(DATA)
    os.utime(path, (10**9, 10**9))
    with nginx(tmp_path / "nginx", tmp_path / "root", f"etag {etag};") as url:
        storage = ObjectStorage(url, StorageConfig(timeout=20))
        assert read(storage, "a.tar", 0, 9) == DATA[:9]
        path.write_bytes(DATA[::-1])
        with pytest.raises(DataError, match=rf"a\.tar: changed while it was read \({version}"):
            read(storage, "a.tar", 9, 9)


# --- datasets on an object store ------------------------------------------------------------------


def _read_size(storage: ObjectStorage, results: multiprocessing.SimpleQueue[str]) -> None:
    try:
        results.put(repr(storage.size("a")))
    except MachineError as error:
        results.put(str(error))


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_storage_in_a_forked_process_is_a_one_line_error(
    s3: str, bucket: str, fresh: bool
) -> None:
    storage = at(s3, bucket)
    storage.publish("a", b"bytes")
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    used = at(s3, bucket) if fresh else storage
    child = context.Process(target=_read_size, args=(used, results))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert "connections do not survive a fork; start workers by spawn" in results.get()


KILLED_BUILD = """
import os, signal, sys
from sharding.__main__ import main
from sharding.storage.uploads import ObjectUploader

limit, steps = int(sys.argv[1]), 0

def limited(write):
    def step(*args, **options):
        global steps
        if steps == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1
        return write(*args, **options)
    return step

for name in ("put_small", "put_large", "remove"):
    setattr(ObjectUploader, name, limited(getattr(ObjectUploader, name)))
sys.exit(main(["build", "--quiet", "--config", sys.argv[2]]))
"""


def build_until(limit: int, config: Path) -> subprocess.CompletedProcess[str]:
    """Build in a process that is killed before it writes more than ``limit`` files."""
    command = [sys.executable, "-c", KILLED_BUILD, str(limit), str(config)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)


def configure(path: Path, root: str, url: str, **data: object) -> Path:
    lines = [f"  {key}: {value}" for key, value in {"root": root, **data}.items()]
    path.write_text(
        "version: 1\ndata:\n" + "\n".join(lines) + "\nsharding: {shard_bytes: 2kB}\n"
        f"storage: {{endpoint_url: '{url}', region: us-east-1, timeout: 20}}\n"
        "encoder: {name: x}\ntraining: {run_name: x}\ntracking: {wandb: 'off'}\n"
    )
    return path


def test_a_rerun_gives_the_same_bytes_after_a_kill_between_any_two_writes_to_a_store(
    s3: str, bucket: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "dump", "tt0000001", film("tt0000001"))
    folders = {"dump": tmp_path / "dump", "runs": tmp_path / "runs"}
    local = configure(tmp_path / "local.yaml", str(tmp_path / "root"), s3, **folders)
    assert build_until(1000, local).returncode == 0
    complete = {path.name: path.read_bytes() for path in (tmp_path / "root" / "frames").iterdir()}
    assert "frames-00000.tar" in complete
    for limit in range(1000):
        config = configure(tmp_path / "s3.yaml", f"s3://{bucket}/{limit}", s3, **folders)
        storage = at(s3, bucket, f"{limit}/frames")
        first = build_until(limit, config)
        if first.returncode == 0:
            break
        assert first.returncode == -signal.SIGKILL, first.stderr
        left = {name: storage.read(name) for name in storage.names()}
        assert "manifest.json" not in left or left == complete
        assert main(["build", "--quiet", "--config", str(config)]) == 0
        assert {name: storage.read(name) for name in storage.names()} == complete
    assert limit > 6


def test_a_dataset_is_planned_built_sealed_and_verified_on_a_store(
    s3: str, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "dump", "tt0000001", film("tt0000001"))
    root = f"s3://{bucket}/movies"
    config = configure(
        tmp_path / "c.yaml", root, s3, dump=tmp_path / "dump", runs=tmp_path / "runs"
    )
    for command in ("plan", "build", "seal", "status", "verify"):
        assert main([command, "--quiet", "--config", str(config)]) == 0
    assert f"{root}/frames: ok" in capsys.readouterr().out
    frames = open_frames(f"{root}/frames", load_config(config).storage)
    assert (frames.n_shards, frames.shard_movies(0)) == (1, ("tt0000001",))


def test_runs_need_a_folder_of_a_file_system(tmp_path: Path) -> None:
    config = configure(tmp_path / "c.yaml", "s3://bucket/movies", "http://h")
    with pytest.raises(ConfigError, match=r"data\.runs: got null with data\.root s3://bucket"):
        load_config(config)
    with pytest.raises(ConfigError, match=r"data\.runs: got s3://b/runs, want a folder"):
        load_config(config, ["data.runs=s3://b/runs"])


SLOW_DELIVERY = """
import sys, threading, time
from asyncio import selector_events
from configs.schema import StorageConfig
from sharding.storage.open import open_storage

deliver = selector_events.BaseSelectorEventLoop._write_to_self

def slow(loop):
    deliver(loop)
    if threading.get_ident() not in [thread.ident for thread in threading.enumerate()]:
        time.sleep(0.5)  # releases the interpreter lock, as a write to a socket does for a moment

selector_events.BaseSelectorEventLoop._write_to_self = slow
storage = open_storage("s3://bucket/exit", StorageConfig(endpoint_url=sys.argv[1], timeout=60))
print(storage.size("absent"))
"""


def test_a_process_that_ends_while_a_result_is_delivered_is_not_aborted(s3: str) -> None:
    request(f"{s3}/bucket", "PUT")
    done = subprocess.run(
        [sys.executable, "-c", SLOW_DELIVERY, s3], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
