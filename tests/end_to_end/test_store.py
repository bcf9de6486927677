"""The pipeline with data on an object store, runs in a folder and credentials in a profile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from configs.schema import StorageConfig
from sharding.storage.base import Storage
from sharding.storage.local import DiskStorage
from sharding.storage.object_store import ObjectStorage
from tests.end_to_end.pipeline import Pipeline, read_json, read_metrics
from tests.sharding.ceph import ceph_server, has_ceph
from tests.sharding.servers import s3_server

pytestmark = pytest.mark.slow

SHORT = ("training.epochs=1", "training.run_name=short", "tracking.wandb=off", "eval.bootstrap=10")


def contents(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name in storage.names()}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of an S3 server with a bucket ``films``: Ceph's gateway where installed, else moto."""
    with ceph_server(tmp_path / "ceph", "k", "s") if has_ceph() else s3_server() as url:
        login = {"aws_access_key_id": "k", "aws_secret_access_key": "s"}
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **login)
        client.create_bucket(Bucket="films")
        yield url


def test_every_stage_gives_the_same_result_on_an_object_store_as_in_a_folder(
    demo: Pipeline, demo_data: Path, server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    aws = demo.folder / ".aws"  # the HOME of the stages
    aws.mkdir(exist_ok=True)
    (aws / "credentials").write_text("[lab]\naws_access_key_id = k\naws_secret_access_key = s\n")
    (aws / "config").write_text("[profile lab]\nregion = eu-central-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(aws / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(aws / "config"))
    remote_data = (
        "data.root=s3://films/demo",
        f"data.runs={tmp_path}",
        f"storage.endpoint_url={server}",
        "storage.profile=lab",
        *SHORT,
    )
    demo.run("sharding", "build", "sharding.workers=2", *remote_data)
    demo.run("encoders", "run", *remote_data)
    demo.run("training", "run", *remote_data, ranks=2)
    demo.run("eval", "report", *remote_data)
    assert ": ok" in demo.run("sharding", "verify", *remote_data)
    config = StorageConfig(endpoint_url=server, profile="lab")
    for kind in ("frames", "features/demo"):
        local = contents(DiskStorage(demo_data / kind))
        remote = contents(ObjectStorage(f"s3://films/demo/{kind}", config))
        differing = [name for name in local if remote.get(name) != local[name]]
        assert [name for name in differing if not name.endswith(".json")] == []
        assert remote["manifest.json"] == local["manifest.json"]
    demo.run("training", "run", *SHORT, f"data.runs={tmp_path / 'local'}", ranks=2)
    losses = [
        [record["loss"] for record in read_metrics(runs / "short", "train")]
        for runs in (tmp_path, tmp_path / "local")
    ]
    assert losses[0] == losses[1]
    assert read_json(tmp_path / "short" / "report" / "val" / "report.json")["genres"]
