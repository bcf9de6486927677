from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import MachineError
from configs.schema import StorageConfig
from sharding.storage.base import Range
from sharding.storage.object_store import ObjectStorage
from sharding.storage.patterns import expand
from tests.sharding.servers import nginx

CONTENT = bytes(range(256)) * 40

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin") is None,
    reason="nginx is not installed",
)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose folders behave like servers in the field; yields its host and port."""
    folder = tmp_path_factory.mktemp("web")
    for name in ("signed", "login", "get-only", "mirrors"):
        (folder / "root" / name).mkdir(parents=True)
        (folder / "root" / name / "a.tar").write_bytes(CONTENT)
    (folder / "root" / "signed" / "names.txt").write_text("a.tar\nhttps://host/b.tar?sig=1\n")
    (folder / "users").write_text("ada:{PLAIN}p@55/\n")
    settings = f"""
        location /signed/ {{
            if ($request_method = HEAD) {{ return 403; }}
            if ($arg_sig != "ok%2F%2B=") {{ return 403; }}
        }}
        location /login/ {{ auth_basic films; auth_basic_user_file {folder}/users; }}
        location /get-only/ {{ if ($request_method = HEAD) {{ return 405; }} }}
        location /mirrors/ {{ etag off; add_header ETag '"$request_id"'; }}
    """
    with nginx(folder / "nginx", folder / "root", settings) as url:
        yield url.removeprefix("http://")


def storage(url: str) -> ObjectStorage:
    return ObjectStorage(url, StorageConfig(timeout=20))


def check_read(files: ObjectStorage) -> None:
    """Read a complete file and two ranges."""
    assert files.size("a.tar") == len(CONTENT)
    assert files.read("a.tar") == CONTENT
    for offset in (5, 5000):
        buffer = bytearray(100)
        files.read_into([Range("a.tar", offset)], [memoryview(buffer)])
        assert buffer == CONTENT[offset : offset + 100]


@needs_nginx
@pytest.mark.parametrize(
    "url",
    [
        "http://{web}/signed?sig=ok%2F%2B=",
        "http://ada:p%4055%2F@{web}/login",
        "http://{web}/get-only",
        "http://{web}/mirrors",
    ],
)
def test_files_are_read_from_servers_as_they_are(web: str, url: str) -> None:
    check_read(storage(url.format(web=web)))


@needs_nginx
def test_a_password_is_read_from_netrc(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ada password p@55/\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    check_read(storage(f"http://{web}/login"))


@needs_nginx
@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("http://{web}/signed?sig=5ec2et", "sign the URL again"),
        ("http://ada:5ec2et@{web}/login", "no valid credentials: 401; write USER:PASSWORD@ before"),
        ("http://{web}/login", "or add the host to ~/.netrc"),
    ],
)
def test_a_refusal_contains_the_remedy_and_no_secret(web: str, url: str, remedy: str) -> None:
    files = storage(url.format(web=web))
    with pytest.raises(MachineError, match=remedy) as caught:
        files.read("a.tar")
    assert "5ec2et" not in f"{caught.value} {files.location} {files._connection.location}"


@needs_nginx
def test_a_list_of_files_is_read_by_a_signed_url(web: str) -> None:
    names = expand(f"http://{web}/signed/names.txt?sig=ok%2F%2B=")
    # The signature of the list is not that of its files.
    assert names == [f"http://{web}/signed/a.tar", "https://host/b.tar?sig=1"]
