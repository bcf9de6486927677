"""Sealing and verifying of complete and damaged feature sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.schema import Config
from encoders.__main__ import main
from encoders.frame_source import open_frame_source
from encoders.seal import seal, wanted_plan
from encoders.task import run_task
from sharding.build import plan_dump, publish_plan
from sharding.features import open_features
from sharding.label_files import relabel
from sharding.storage.open import open_storage
from tests.encoders.conftest import Build, Configure, digest, files

pytestmark = pytest.mark.slow


def test_a_sealed_set_contains_labels_and_provenance(config: Config) -> None:
    outcome = run_task(config)
    features = open_features(config.features_dir)
    assert features.digest == digest(outcome)
    assert features.dim == 16
    assert len(features.movie_ids) == 5
    assert len(features.manifest.shards) > 2
    encoder = features.manifest.provenance["encoder"]
    assert isinstance(encoder, dict)
    assert encoder["pretrained"] is None
    assert encoder["precision"] == "fp32"
    assert len(features.labels.movies("train")) == 3


def test_names_that_are_not_ids_are_recorded_in_the_manifest(
    configure: Configure, dump: Path, build: Build
) -> None:
    (dump / "tt0000003").rename(dump / "a movie")
    config = configure()
    build(config)
    run_task(config)
    assert open_features(config.features_dir).manifest.renamed == {"x_a_20movie": "a movie"}


def test_a_changed_split_is_reported_until_the_set_is_relabelled(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_task(config)
    run_task(config)
    assert "relabel" not in caplog.text
    split = json.loads((tmp_path / "split.json").read_text())
    split["val"].append(split["train"].pop())
    (tmp_path / "split.json").write_text(json.dumps(split))
    labels = (Path(config.features_dir) / "labels.npz").read_bytes()
    run_task(config)
    assert f"relabel --features {config.features_dir}" in caplog.text
    assert (Path(config.features_dir) / "labels.npz").read_bytes() == labels
    relabel(open_storage(config.features_dir), config.data)
    caplog.clear()
    run_task(config)
    assert "relabel" not in caplog.text


def test_replace_seals_again_even_if_no_shard_changes(
    config: Config, configure: Configure, build: Build
) -> None:
    run_task(config)
    other = configure("sharding.shard_bytes=20001")  # the same shards, another frame set
    frames = open_storage(config.frames_dir)
    publish_plan(frames, plan_dump(other), replace=True)
    build(other)
    plan = wanted_plan(open_storage(config.features_dir))
    with pytest.raises(
        DataError, match=r"planned for frames .*; run `movienet-encode run --replace"
    ):
        seal(other, open_storage(config.features_dir), plan, open_frame_source(config))
    outcome = run_task(other, replace=True)
    assert outcome.encoded.shards == 0
    assert outcome.manifest is not None
    assert outcome.manifest.provenance["frames"] == open_frame_source(config).digest


def test_sealing_detects_a_damaged_shard_and_a_rerun_encodes_it_again(config: Config) -> None:
    first = run_task(config)
    tar = Path(config.features_dir) / "features-00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    (tar.parent / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"1 of 5 feature shards are missing; .*--array=1"):
        run_task(config)
    assert digest(run_task(config)) == digest(first)
    assert tar.read_bytes() == data


def test_verify_reads_every_byte_and_repair_marks_damaged_shards_as_missing(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_task(config)
    before = files(config)
    command = ["verify", "--config", str(tmp_path / "config.yaml")]
    assert main(command) == 0
    assert capsys.readouterr().out.strip().endswith(": ok")
    tar = Path(config.features_dir) / "features-00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    assert main(command) == 1
    assert "features-00001.tar: got" in capsys.readouterr().out
    assert main([*command, "--repair"]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "marked 1 shards as missing (1)",
        f"next: `movienet-encode run --config {tmp_path / 'config.yaml'}`",
    ]
    assert main(["status", *command[1:]]) == 1
    assert "missing shards: 1\n" in capsys.readouterr().out
    assert run_task(config).encoded.shards == 1
    assert files(config) == before
