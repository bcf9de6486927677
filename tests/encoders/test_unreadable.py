"""An unreadable frame shard does not stop the others; one line lists the failed shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.errors import DataError
from configs.schema import Config
from encoders.__main__ import main
from encoders.extract import Extractor
from encoders.input_pipeline import Batch
from encoders.task import open_stage, run_task
from sharding.build import plan_dump, publish_plan
from sharding.frames import open_frames
from sharding.storage.open import open_storage
from tests.encoders.conftest import Configure, upload
from tests.sharding.servers import faulty_server, rule

pytestmark = pytest.mark.slow

Fault = Callable[[Path], None]
UNREADABLE = Path("/proc/self/mem")
"""Its first page is not mapped, so reading it is an input/output error."""


def spoil(path: Path) -> None:
    path.unlink()
    path.symlink_to(UNREADABLE)


def tars(config: Config) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(config.features_dir).glob("*.tar"))]


def numbers(config: Config) -> list[int]:
    return [int(path.stem[-5:]) for path in sorted(Path(config.features_dir).glob("*.tar"))]


@pytest.mark.parametrize(
    ("fault", "name", "reason"),
    [
        (Path.unlink, "frames-00002.tar", "missing, or differs from the sealed shard"),
        (spoil, "frames-00002.index.npz", "Input/output error"),
    ],
    ids=["removed", "input/output error"],
)
def test_an_unreadable_shard_does_not_stop_the_others(
    config: Config,
    configure: Configure,
    capsys: pytest.CaptureFixture[str],
    fault: Fault,
    name: str,
    reason: str,
) -> None:
    file = Path(config.frames_dir, name)
    content = file.read_bytes()
    fault(file)
    arguments = ["run", "--config", str(Path(config.data.root).parent / "config.yaml")]
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "1 of 5 shards failed (2), the others are done; first: frames-00002.tar: " in lines[-1]
    assert reason in lines[-1]
    assert lines[-1].endswith("fix the cause and rerun the command")
    assert numbers(config) == [0, 1, 3, 4]

    file.unlink(missing_ok=True)
    file.write_bytes(content)
    assert main(arguments) == 0
    other = configure("encoder.name=other")
    run_task(other)
    assert tars(config) == tars(other)


@pytest.mark.parametrize("reader", ["index", "webdataset"])
@pytest.mark.parametrize("place", ["an image", "the padding at the end"])
def test_features_of_bytes_that_are_not_the_sealed_ones_are_not_published(
    config: Config, configure: Configure, reader: str, place: str
) -> None:
    file = Path(config.frames_dir, "frames-00002.tar")
    good = file.read_bytes()
    offset = open_frames(config.frames_dir).frame_index(2).offset[-1] if place == "an image" else -1
    bad = bytearray(good)
    bad[int(offset)] ^= 1
    file.write_bytes(bad)
    other = configure("encoder.name=other", f"encoder.reader={reader}")
    with pytest.raises(
        DataError, match=r"frames-00002.tar: got sha256 \w{12}, want \w{12} as seal"
    ):
        run_task(other)
    assert numbers(other) == [0, 1, 3, 4]
    file.write_bytes(good)
    run_task(other)
    run_task(config)
    assert tars(other) == tars(config)


@pytest.mark.parametrize("reader", ["index", "webdataset"])
def test_a_shard_truncated_while_it_is_read_is_not_published(
    config: Config, configure: Configure, reader: str
) -> None:
    one = configure(f"encoder.reader={reader}", "encoder.batch_size=1")
    extractor = extractor_of(one)
    tar = Path(config.frames_dir, "frames-00003.tar")
    content = tar.read_bytes()
    actions = iter([lambda: os.truncate(tar, len(content) // 2)])

    def truncate_once(_batch: Batch) -> bool:
        next(actions, bool)()
        return True

    extractor.run([3, 4], truncate_once)
    assert numbers(one) == [4]
    assert list(extractor.done.failed) == [3]
    tar.write_bytes(content)
    run_task(one)
    other = configure("encoder.name=other", "encoder.batch_size=1")
    run_task(other)
    assert tars(one) == tars(other)


def extractor_of(config: Config) -> Extractor:
    stage = open_stage(config, torch.device("cpu"))
    return Extractor(
        *(config.encoder, stage.plan, stage.tower, stage.device),
        frames=open_frames(config.frames_dir),
        features=stage.features,
    )


def test_a_shard_with_a_read_error_is_retried_once_at_the_end(config: Config) -> None:
    index = Path(config.frames_dir, "frames-00000.index.npz")
    content = index.read_bytes()
    spoil(index)
    extractor = extractor_of(config)
    extractor.run(range(extractor.n_shards))
    assert numbers(config) == [1, 2, 3, 4]
    assert list(extractor.done.failed) == [0]
    index.unlink()
    index.write_bytes(content)
    extractor.run(extractor.done.second_try())
    assert numbers(config) == [0, 1, 2, 3, 4]
    assert not extractor.done.failed


def test_a_server_that_keeps_refusing_two_shards_serves_the_others(
    config: Config, configure: Configure
) -> None:
    run_task(config)
    with faulty_server() as url:
        location = upload(config.frames_dir, url)
        other = configure(
            "encoder.name=over-http", f"encoder.frames_url={location}", "storage.timeout=2s"
        )
        refuse = {"do": "refuse", "status": 500, "code": "InternalError", "times": 10**6}
        rule(url, *(refuse | {"path": f"frames-0000{number}.tar"} for number in (1, 3)))
        with pytest.raises(DataError, match=r"2 of 5 shards failed \(1,3\), the others are done"):
            run_task(other)
        assert numbers(other) == [0, 2, 4]
        rule(url)
        run_task(other)
    assert tars(other) == tars(config)


def test_a_temporary_shard_that_cannot_be_built_does_not_stop_the_others(
    configure: Configure, dump: Path, tmp_path: Path
) -> None:
    config = configure(
        "encoder.frame_storage=temporary", f"encoder.scratch_dir={tmp_path / 'scratch'}"
    )
    publish_plan(open_storage(config.frames_dir), plan_dump(config))
    image = dump / "tt0000002" / "shot_0000_img_0.jpg"
    content, times = image.read_bytes(), (image.stat().st_atime_ns, image.stat().st_mtime_ns)
    image.write_bytes(b"something else")
    line = (
        r"1 of 5 shards failed \(1\), the others are done; first: .* changed since it was planned"
    )
    with pytest.raises(DataError, match=line):
        run_task(config)
    assert numbers(config) == [0, 2, 3, 4]
    image.write_bytes(content)
    os.utime(image, ns=times)
    assert run_task(config).manifest
