"""A folder of videos as a dump: found, planned, built and checked like one of key frames."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import DataError
from sharding.build import build_shards, publish_plan
from sharding.dump.key_frames import read_shots
from sharding.dump.scan import find_sources, read_movies
from sharding.plan import make_plan
from sharding.seal import seal_frames
from sharding.storage.local import DiskStorage
from tests.sharding.films import build_all, film, write_folder
from tests.videos import scenes, write_audio, write_video

LENGTHS = {"bikes.mp4": (20, 30), "My trailer (2019).mkv": (25,), "old/tt0000003.avi": (18, 22, 19)}


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    (folder / "old").mkdir()
    for name, lengths in LENGTHS.items():
        write_video(folder / name, scenes(*lengths))
    (folder / "readme.txt").touch()
    return folder


def files(storage: DiskStorage) -> dict[str, bytes]:
    # Sidecars also record library versions and are written with the same content.
    return {name: storage.read(name) for name in storage.names()}


def test_videos_are_planned_by_their_headers(dump: Path) -> None:
    movies = read_movies(dump)
    assert [(movie.movie, movie.source, movie.images) for movie in movies] == [
        ("bikes", "bikes.mp4", None),
        ("tt0000003", "old/tt0000003.avi", None),
        ("x_My_20trailer_20_282019_29", "My trailer (2019).mkv", None),
    ]
    assert movies[0].n_bytes == 2 * 20_000


@pytest.mark.slow
def test_the_shards_hold_the_key_frames_for_any_number_of_workers(
    dump: Path, tmp_path: Path
) -> None:
    one, two = (DiskStorage(tmp_path / name) for name in ("one", "two"))
    build_all(one, dump, shard_bytes=1)
    plan = make_plan(read_movies(dump), shard_bytes=1)
    publish_plan(two, plan)
    # The second task first, with two processes; then the first, as a restart would.
    for numbers in ((2, 1), (0, 1, 2)):
        build_shards(two, dump, plan, numbers, max_bad_fraction=0, workers=2)
    seal_frames(two, max_bad_fraction=0)
    assert files(one) == files(two)
    jpegs = [image.jpeg for shot in read_shots(dump / "bikes.mp4") for image in shot.images]
    shard = one.read("frames-00000.tar")
    assert len(jpegs) == 6
    assert all(jpeg in shard for jpeg in jpegs)
    assert b"bikes/shot_0001_img_2.jpg" in shard


def test_unusable_videos_are_named_and_may_be_excluded(dump: Path, tmp_path: Path) -> None:
    for path in dump.glob("*.m*"):
        (tmp_path / path.name).symlink_to(path)
    write_audio(tmp_path / "song.mp4")
    (tmp_path / "page.webm").write_text("404")
    with pytest.raises(DataError, match=r"data.exclude=\[page, song\]"):
        read_movies(tmp_path)
    assert len(read_movies(tmp_path, exclude=("page", "song"))) == 2


def test_key_frames_of_a_movie_win_over_its_video(dump: Path, tmp_path: Path) -> None:
    (tmp_path / "bikes.mp4").symlink_to(dump / "bikes.mp4")
    write_folder(tmp_path, "bikes", film("bikes", shots=1))
    assert find_sources(tmp_path).by_name == {"bikes": ("bikes", "bikes.mp4")}
    assert [movie.source for movie in read_movies(tmp_path)] == ["bikes"]


def test_a_video_that_changed_since_it_was_planned_is_refused(dump: Path, tmp_path: Path) -> None:
    video = tmp_path / "dump" / "film.mp4"
    video.parent.mkdir()
    video.write_bytes((dump / "bikes.mp4").read_bytes())
    plan = make_plan(read_movies(video.parent), shard_bytes=1)
    video.write_bytes(video.read_bytes() + b"\0")
    with pytest.raises(DataError, match="changed since it was planned"):
        build_shards(DiskStorage(tmp_path / "set"), video.parent, plan, [0], max_bad_fraction=0)


def test_without_the_extra_one_line_contains_the_command_that_installs_it(dump: Path) -> None:
    script = (
        "import sys; sys.modules['av'] = None; from pathlib import Path;"
        "from sharding.dump.scan import read_movies; from configs.errors import MachineError\n"
        "try: read_movies(Path(sys.argv[1]))\n"
        "except MachineError as error: print(error)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, dump], capture_output=True, text=True, check=True
    )
    assert "run `pip install 'movienet-stream[video]'`" in ran.stdout
    assert ran.stdout.count("\n") == 1
