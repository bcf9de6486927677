from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from configs.errors import ConfigError, DataError
from configs.schema import Config
from encoders.__main__ import main
from encoders.extract import Extractor
from encoders.frames import frames_of
from encoders.run import Outcome, open_stage, run_task
from encoders.seal import seal, wanted_plan
from sharding.build import plan_dump, publish_plan
from sharding.features import open_features
from sharding.frames import open_frames
from sharding.label_files import relabel
from sharding.shard import read_sidecar
from sharding.storage.local import DiskStorage
from sharding.storage.open import open_storage

REPOSITORY = Path(__file__).parents[2]

Build = Callable[[Config], None]
Configure = Callable[..., Config]


def digest(outcome: Outcome) -> str:
    assert outcome.manifest is not None
    return outcome.manifest.digest


def read_rows(config: Config) -> dict[str, tuple[NDArray[np.float16], NDArray[np.int32]]]:
    """Rows and shots of each movie, out of the tars."""
    found: dict[str, NDArray[Any]] = {}
    for path in sorted(Path(config.features_dir).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".npy") and (file := tar.extractfile(member)):
                    found[member.name] = np.load(io.BytesIO(file.read()))
    ids = [name.removesuffix(".shots.npy") for name in found if name.endswith(".shots.npy")]
    return {movie: (found[f"{movie}.features.npy"], found[f"{movie}.shots.npy"]) for movie in ids}


def read_info(config: Config, movie: str) -> dict[str, Any]:
    """``MOVIE.json``, out of whichever tar holds it."""
    for path in Path(config.features_dir).glob("*.tar"):
        with tarfile.open(path) as tar:
            if f"{movie}.json" in tar.getnames() and (file := tar.extractfile(f"{movie}.json")):
                return dict(json.load(file))
    raise AssertionError(f"{movie}.json is in no tar")


def of_open_clip(config: Config, movie: str) -> torch.Tensor:
    """Features of a movie by OpenCLIP alone: PIL images, its own transform, one by one."""
    open_clip.add_model_config(config.encoder.model)
    torch.manual_seed(config.encoder.seed)
    model = open_clip.create_model(Path(config.encoder.model).stem).eval()
    transform = open_clip.image_transform(32, is_train=False)
    images = sorted((Path(str(config.data.dump)) / movie).glob("*.jpg"))
    with torch.inference_mode():
        return torch.cat([model.encode_image(transform(Image.open(i))[None]) for i in images])


def spoil(image: Path) -> None:
    """Keep the ends of a JPEG, and nothing that a decoder could read between them."""
    data = image.read_bytes()
    image.write_bytes(data[:3] + bytes(len(data) - 5) + data[-2:])


@pytest.mark.usefixtures("config")
def test_features_are_those_of_open_clip_in_the_order_of_the_dump(configure: Configure) -> None:
    exact = configure("encoder.preprocess=exact")
    digest(run_task(exact))
    for movie, (features, shots) in read_rows(exact).items():
        want = of_open_clip(exact, movie)
        got = torch.from_numpy(features.astype(np.float32))
        assert torch.cosine_similarity(got, want).min() > 0.9999
        assert shots.tolist() == sorted([*range(len(want) // 3)] * 3)


def test_a_sealed_set_is_opened_with_its_labels_and_provenance(config: Config) -> None:
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


def test_names_that_are_no_ids_stay_in_the_manifest(
    configure: Configure, dump: Path, build: Build
) -> None:
    (dump / "tt0000003").rename(dump / "a film")
    config = configure()
    build(config)
    run_task(config)
    assert open_features(config.features_dir).manifest.renamed == {"x_a_20film": "a film"}


def test_a_rerun_skips_every_shard_and_ends_with_the_same_set(config: Config) -> None:
    first = run_task(config)
    tars = {path: path.stat().st_mtime_ns for path in Path(config.features_dir).iterdir()}
    second = run_task(config)
    assert second.encoded.shards == 0
    assert second.skipped == first.encoded.shards
    assert digest(second) == digest(first)
    assert {path: path.stat().st_mtime_ns for path in Path(config.features_dir).iterdir()} == tars


def test_another_split_is_told_until_the_set_is_relabelled(
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


def test_another_number_of_decode_threads_goes_on_with_the_set(
    config: Config, configure: Configure
) -> None:
    want = digest(run_task(config))
    (Path(config.features_dir) / "features-00001.tar").unlink()
    outcome = run_task(configure("encoder.decode_threads=3"))
    assert (outcome.encoded.shards, digest(outcome)) == (1, want)


def test_a_lost_shard_alone_is_encoded_again_to_the_same_bytes(config: Config) -> None:
    first = run_task(config)
    lost = Path(config.features_dir) / "features-00001.tar"
    data = lost.read_bytes()
    lost.unlink()
    second = run_task(config)
    assert second.encoded.shards == 1
    assert digest(second) == digest(first)
    assert lost.read_bytes() == data


def test_what_a_killed_task_left_unfinished_is_swept(config: Config) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = f".tmp-features-00000.tar-{socket.gethostname()}-{ended.pid}-0123abcd"
    left = Path(config.features_dir) / name
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    run_task(config)
    assert not left.exists()


def test_shares_together_give_the_set_of_one_task(config: Config, configure: Configure) -> None:
    want = digest(run_task(config))
    other = configure("encoder.name=shared")
    part = run_task(other, share=(1, 2))
    assert part.manifest is None
    assert part.missing
    assert digest(run_task(other, share=(0, 2))) == want


def test_other_weights_are_not_mixed_into_a_set(config: Config, configure: Configure) -> None:
    run_task(config)
    with pytest.raises(ConfigError, match=r"encoder\.seed was 0, is 1; encoder\.weights was"):
        run_task(configure("encoder.seed=1"))


def test_replace_encodes_anew_what_was_made_otherwise(config: Config, configure: Configure) -> None:
    first = run_task(config)
    other = configure("encoder.seed=1")
    second = run_task(other, replace=True)
    assert second.encoded.shards == first.encoded.shards
    assert digest(second) != digest(first)
    assert run_task(other).encoded.shards == 0


def test_replace_seals_anew_even_where_every_shard_stays(
    config: Config, configure: Configure, build: Build
) -> None:
    run_task(config)
    other = configure("sharding.shard_bytes=20001")  # the same shards, another frame set
    frames = open_storage(config.frames_dir)
    publish_plan(frames, plan_dump(other), replace=True)
    build(other)
    plan = wanted_plan(open_storage(config.features_dir))
    with pytest.raises(DataError, match=r"planned for frames .*; run with --replace"):
        seal(other, open_storage(config.features_dir), plan, frames_of(config))
    outcome = run_task(other, replace=True)
    assert outcome.encoded.shards == 0
    assert outcome.manifest is not None
    assert outcome.manifest.provenance["frames"] == frames_of(config).digest


def test_frames_of_fewer_shards_leave_no_other_features_behind(
    config: Config, configure: Configure, build: Build, tmp_path: Path, capsys: Any
) -> None:
    run_task(config)
    other = configure("sharding.shard_bytes=1MB")
    frames = Path(config.frames_dir)
    publish_plan(open_storage(config.frames_dir), plan_dump(other), replace=True)
    for path in frames.glob("frames-*"):
        path.unlink()
    build(other)
    assert main(["status", "--config", str(tmp_path / "config.yaml")]) == 1
    assert "planned for frames" in capsys.readouterr().err
    run_task(other, replace=True)
    assert [path.name for path in Path(config.features_dir).glob("*.tar")] == ["features-00000.tar"]


def test_a_damaged_shard_is_noticed_when_sealing_and_made_again_by_a_rerun(config: Config) -> None:
    first = run_task(config)
    tar = Path(config.features_dir) / "features-00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    (tar.parent / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"1 of 5 feature shards are missing; .*--array=1"):
        run_task(config)
    assert digest(run_task(config)) == digest(first)
    assert tar.read_bytes() == data


def test_shards_of_another_encoder_are_refused_even_without_their_plan(
    config: Config, configure: Configure
) -> None:
    run_task(config)
    (Path(config.features_dir) / "plan.json").unlink()
    before = sorted(path.name for path in Path(config.features_dir).iterdir())
    with pytest.raises(DataError, match="--replace"):
        run_task(configure("encoder.normalize=true"))
    assert sorted(path.name for path in Path(config.features_dir).iterdir()) == before


def test_the_batch_size_changes_features_in_the_last_bits_only(
    config: Config, configure: Configure
) -> None:
    other = configure("encoder.name=other", "encoder.batch_size=5")
    run_task(config)
    run_task(other)
    here, there = read_rows(config), read_rows(other)
    for movie in here:
        difference = here[movie][0].astype(np.float32) - there[movie][0]
        assert np.abs(difference).max() < 1e-2


def test_normalised_rows_have_length_one(config: Config, configure: Configure) -> None:
    run_task(configure("encoder.normalize=true"))
    for features, _ in read_rows(config).values():
        lengths = np.linalg.norm(features.astype(np.float32), axis=1)
        assert np.abs(lengths - 1).max() < 1e-3


def test_an_undecodable_picture_is_left_out_and_listed(
    configure: Configure, dump: Path, build: Build
) -> None:
    spoil(dump / "tt0000002" / "shot_0004_img_1.jpg")
    config = configure("encoder.max_bad_fraction=0.5")
    build(config)
    outcome = run_task(config)
    assert outcome.encoded.rejected == 1
    features, shots = read_rows(config)["tt0000002"]
    assert len(features) == 26
    assert shots.tolist().count(4) == 2
    listed = [
        (rejected.movie, rejected.member, rejected.reason)
        for number in range(len(outcome.manifest.shards if outcome.manifest else ()))
        if (sidecar := read_sidecar(open_storage(config.features_dir), "features", number))
        for rejected in sidecar.rejected
    ]
    assert listed == [("tt0000002", "shot_0004_img_1.jpg", "not a picture")]
    assert read_info(config, "tt0000002")["rejected"] == ["shot_0004_img_1.jpg"]


def test_the_rows_beside_a_rejected_picture_stay_as_they_were(
    config: Config, configure: Configure, dump: Path, build: Build
) -> None:
    run_task(config)
    whole = read_rows(config)["tt0000002"][0]
    spoil(dump / "tt0000002" / "shot_0004_img_1.jpg")
    other = configure("encoder.max_bad_fraction=0.5", f"data.root={dump.parent / 'other'}")
    build(other)
    run_task(other)
    assert np.array_equal(read_rows(other)["tt0000002"][0], np.delete(whole, 13, axis=0))


def test_too_many_bad_pictures_fail_the_shard_in_one_line(
    configure: Configure, dump: Path, build: Build
) -> None:
    spoil(dump / "tt0000001" / "shot_0000_img_0.jpg")
    config = configure()
    build(config)
    with pytest.raises(DataError, match=r"encoder\.max_bad_fraction 0\.01; first: tt0000001"):
        run_task(config)
    assert not (Path(config.features_dir) / "manifest.json").exists()
    names = [path.name for path in sorted(Path(config.features_dir).glob("*.tar"))]
    assert names == [f"features-0000{shard}.tar" for shard in range(1, 5)], "the others are done"


@pytest.mark.slow
def test_two_ranks_through_accelerate_give_the_manifest_of_one(
    config: Config, configure: Configure, tmp_path: Path
) -> None:
    want = digest(run_task(config))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(REPOSITORY / "configs" / "accelerate" / "cpu-2.yaml")),
        *("-m", "encoders", "run", "--config", str(tmp_path / "config.yaml"), "encoder.name=two"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("read by Pillow") == 2, "both ranks had work"
    assert open_features(configure("encoder.name=two").features_dir).digest == want


def test_the_commands_tell_plan_progress_and_result(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(tmp_path / "config.yaml")]
    assert main(["status", *arguments]) == 1
    assert "run `python -m encoders plan` first" in capsys.readouterr().err
    assert main(["plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert "UNTRAINED weights of seed 0" in said
    assert "images 93" in said
    assert main(["status", *arguments]) == 1
    assert "missing: --array=0-" in capsys.readouterr().out
    assert main(["run", *arguments, "--share", "0/1"]) == 0
    said = capsys.readouterr().out
    assert "waited" in said
    assert open_features(config.features_dir).digest in said
    assert main(["seal", *arguments]) == 0
    assert open_features(config.features_dir).digest in capsys.readouterr().out
    assert main(["status", *arguments]) == 0
    assert main(["fetch", *arguments]) == 0
    assert "nothing to fetch" in capsys.readouterr().out
    assert main(["models", "b-32-quickgelu"]) == 0
    assert "openai" in capsys.readouterr().out


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("share", ["2/2", "1", "-1/2", "a/b"])
def test_a_share_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str
) -> None:
    arguments = ["run", "--config", str(tmp_path / "config.yaml"), f"--share={share}"]
    assert main(arguments) == 2
    assert "want I/N" in capsys.readouterr().err


class SlowStorage(DiskStorage):
    """Publishes the first tar only when somebody says so."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.begun, self.go_on = threading.Event(), threading.Event()

    @contextmanager
    def publishing(self, name: str, *, replace: bool = False) -> Iterator[BinaryIO]:
        with super().publishing(name, replace=replace) as file:
            yield file
            self.begun.set()
            assert self.go_on.wait(30)


def test_the_tower_goes_on_while_a_shard_is_published(config: Config) -> None:
    stage = open_stage(config, torch.device("cpu"))
    storage = SlowStorage(Path(config.features_dir))
    extractor = Extractor(
        *(config.encoder, stage.plan, stage.tower, stage.device),
        frames=open_frames(config.frames_dir),
        features=storage,
    )
    seen: list[int] = []

    def watch(images: int) -> bool:
        seen.append(images)
        if len(seen) == 3:  # the first shard has one batch, which is looked at one batch later
            assert storage.begun.wait(30)
            storage.go_on.set()
        return True

    extractor.run(range(extractor.n_shards), watch)
    assert extractor.done.shards == 5
    assert len(list(Path(config.features_dir).glob("*.tar"))) == 5
