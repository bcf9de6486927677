from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from configs.errors import ConfigError, MachineError
from configs.schema import StorageConfig
from sharding.storage.base import Range
from sharding.storage.object_store import ObjectStorage
from sharding.storage.patterns import expand
from tests.sharding.servers import free_port, nginx

pytestmark = pytest.mark.slow

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


# --- endpoints and certificates as boto3 finds them -----------------------------------------------


class Institute(NamedTuple):
    """A store over TLS, whose certificate is signed by a private authority."""

    endpoint: str
    plain: str
    authority: Path


@pytest.fixture(scope="module")
def institute(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Institute]:
    folder = tmp_path_factory.mktemp("institute")
    # With anonymous requests, path style and one file, a web server answers like any store.
    for parent in ("films", "account/films"):
        (folder / "root" / parent / "set").mkdir(parents=True)
        (folder / "root" / parent / "set" / "a.tar").write_bytes(CONTENT)

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Institute")
    openssl(
        "req", "-x509", *key, "-keyout", "s.key", "-out", "s.pem", "-subj", "/CN=localhost",
        "-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=DNS:localhost",
        "-addext", "basicConstraints=critical,CA:FALSE",
    )  # fmt: skip
    port = free_port()
    settings = (
        f"listen 127.0.0.1:{port} ssl; ssl_certificate {folder}/s.pem; "
        f"ssl_certificate_key {folder}/s.key; "
    )
    with nginx(folder / "nginx", folder / "root", settings) as url:
        yield Institute(f"https://localhost:{port}", url, folder / "ca.pem")


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without login and certificates; return the file of AWS profiles."""
    for name in os.environ:
        if name.startswith("AWS_") or name == "REQUESTS_CA_BUNDLE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path / "config"


def store(**options: object) -> ObjectStorage:
    config = {"region": "us-east-1", "timeout": 20, **options}
    return ObjectStorage("s3://films/set", StorageConfig.model_validate(config))


needs_tls = pytest.mark.skipif(
    shutil.which("openssl") is None or bool(needs_nginx.args[0]), reason="no openssl or nginx"
)


@needs_tls
@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize("bundle", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
@pytest.mark.parametrize("endpoint", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", None])
def test_endpoint_and_certificate_are_read_from_the_environment(
    institute: Institute,
    monkeypatch: pytest.MonkeyPatch,
    bundle: str,
    endpoint: str | None,
) -> None:
    monkeypatch.setenv(bundle, str(institute.authority))
    if endpoint is None:
        check_read(store(endpoint_url=institute.endpoint))
        return
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere.invalid")
    monkeypatch.setenv(endpoint, institute.endpoint)
    check_read(store())


@needs_tls
@pytest.mark.parametrize(
    "endpoint",
    [
        "endpoint_url = {url}\n",
        "services = lab-services\n[services lab-services]\ns3 =\n  endpoint_url = {url}\n",
    ],
)
def test_endpoint_and_certificate_are_read_from_the_profile(
    aws: Path, institute: Institute, endpoint: str
) -> None:
    aws.write_text(
        f"[profile lab]\nca_bundle = {institute.authority}\n"
        + endpoint.format(url=institute.endpoint)
    )
    check_read(store(profile="lab"))


@needs_tls
@pytest.mark.usefixtures("aws")
def test_an_untrusted_certificate_is_reported_at_once_with_the_setting(
    institute: Institute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", institute.endpoint)
    begin = time.monotonic()
    with pytest.raises(MachineError, match=r"certificate is not trusted.*set AWS_CA_BUNDLE") as got:
        store(timeout=600).read("a.tar")
    assert f"AWS_ENDPOINT_URL_S3 ({institute.endpoint})" in str(got.value)
    web = ObjectStorage(f"{institute.endpoint}/films/set", StorageConfig(timeout=600))
    with pytest.raises(MachineError, match=r"certificate is not trusted.*set REQUESTS_CA_BUNDLE"):
        web.size("a.tar")
    assert time.monotonic() - begin < 300
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nowhere/ca.pem")
    with pytest.raises(ConfigError, match=r"AWS_CA_BUNDLE: got /nowhere/ca\.pem: No such file"):
        store().read("a.tar")


@needs_tls
@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize("url", ["az://films/set", "gs://films/set"])
@pytest.mark.parametrize("over_tls", [False, True])
def test_azure_and_google_are_reached_at_the_configured_endpoint(
    institute: Institute, monkeypatch: pytest.MonkeyPatch, url: str, *, over_tls: bool
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(institute.authority))
    endpoint = institute.endpoint if over_tls else institute.plain
    if url.startswith("az"):
        endpoint += "/account"
    check_read(ObjectStorage(url, StorageConfig(endpoint_url=endpoint, timeout=20)))
