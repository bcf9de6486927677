"""Key frames of videos: shots, positions, geometry, colours, and everything that can be wrong."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError, error_text
from sharding.dump import video
from sharding.dump.key_frames import Shot, VideoSource, read_shots
from tests.videos import pixels_of, scene, scenes, write_audio, write_video


def shots_of(path: Path) -> list[Shot]:
    return list(read_shots(path))


def middle(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return the middle key frame of the first shot."""
    return pixels_of(shots_of(path)[0].images[1].jpeg)


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        shots_of(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: got ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_a_shot_has_key_frames_at_25_50_and_75_per_cent(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", scenes(40, 20, 60))
    shots = shots_of(path)
    assert [shot.number for shot in shots] == [0, 1, 2]
    assert [(shot.begin_s, shot.end_s) for shot in shots] == [(0, 1.6), (1.6, 2.4), (2.4, 4.8)]
    times = [[round(image.time_s * 25) for image in shot.images] for shot in shots]
    assert times == [[10, 20, 30], [45, 50, 55], [75, 90, 105]]
    for seed, shot in enumerate(shots):
        picture = pixels_of(shot.images[2].jpeg)
        assert picture.shape == (240, 400, 3)
        want = scene(seed, 240, 400).astype(int)
        assert np.median(np.abs(picture - want)) < 6


def test_of_a_long_shot_only_some_frames_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharding.dump.key_frames._KEPT_BYTES", 0)  # keeps 8 frames
    path = write_video(tmp_path / "film.mp4", scenes(200))
    (shot,) = shots_of(path)
    places = [image.time_s * 25 / 200 for image in shot.images]
    assert places == pytest.approx([0.25, 0.5, 0.75], abs=1 / 8)
    assert sorted(places) == places


def test_letterbox_bars_are_cropped(tmp_path: Path) -> None:
    framed = np.zeros((160, 160, 3), np.uint8)
    framed[32:128] = scene(0)
    picture = middle(write_video(tmp_path / "film.mp4", [framed] * 20))
    assert picture.shape == (240, 400, 3)
    assert picture.mean(axis=(1, 2)).min() > 60


def test_a_black_film_and_a_dark_ceiling_are_not_cropped(tmp_path: Path) -> None:
    black = np.zeros((96, 160, 3), np.uint8)
    assert middle(write_video(tmp_path / "black.mp4", [black] * 20)).shape == (240, 400, 3)
    ceiling = scene(0).copy()
    ceiling[:24] = 0
    assert middle(write_video(tmp_path / "dark.mp4", [ceiling] * 20)).shape == (240, 400, 3)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_rotated_video_is_shown_upright(tmp_path: Path, rotation: int) -> None:
    path = write_video(tmp_path / "phone.mp4", scenes(20), rotation=rotation)
    picture = middle(path)
    upright = np.rot90(scene(0), rotation // 90)
    width = 2 * round(120 * upright.shape[1] / upright.shape[0])
    assert picture.shape == (240, width, 3)
    rows, columns = (np.array([1, 3, 5, 7]) * side // 8 for side in upright.shape[:2])
    seen = picture[np.ix_(rows * 240 // upright.shape[0], columns * width // upright.shape[1])]
    assert np.abs(seen.astype(int) - upright[np.ix_(rows, columns)]).max() < 12


def test_pixels_that_are_not_square_are_shown_in_their_aspect_ratio(tmp_path: Path) -> None:
    path = write_video(tmp_path / "dvd.mp4", scenes(20), aspect=Fraction(4, 3))
    assert middle(path).shape == (240, 534, 3)


def test_a_variable_frame_rate_gives_times_of_the_file(tmp_path: Path) -> None:
    stamps = [*range(20), *range(40, 140, 5)]
    path = write_video(tmp_path / "screen.mkv", scenes(20, 20), stamps=stamps)
    shots = shots_of(path)
    assert [round(shot.begin_s, 2) for shot in shots] == [0, 1.6]
    assert [round(image.time_s, 2) for image in shots[1].images] == [2.6, 3.6, 4.6]


@pytest.mark.parametrize(("curve", "white"), [(16, 148), (18, 191)])
def test_high_dynamic_range_is_mapped_to_the_standard_one(
    tmp_path: Path, curve: int, white: int
) -> None:
    # White paper (203 nits) is 58 % of the PQ curve and 75 % of HLG, but light grey in both.
    grey = np.full((96, 160, 3), white, np.uint8)
    path = write_video(
        tmp_path / "hdr.mp4",
        [grey] * 15,
        codec="libx265",
        pix_fmt="yuv420p10le",
        colour=(9, curve, 9),
    )
    assert middle(path).mean() == pytest.approx(241, abs=5)


def test_a_video_of_one_frame_and_one_of_a_second(tmp_path: Path) -> None:
    (only,) = shots_of(write_video(tmp_path / "one.mp4", scenes(1)))
    assert [image.image for image in only.images] == [0]
    (second,) = shots_of(write_video(tmp_path / "second.mp4", scenes(25)))
    assert (second.end_s, len(second.images)) == (1, 3)


def test_what_is_no_video_is_named_in_one_line(tmp_path: Path) -> None:
    text = tmp_path / "page.mp4"
    text.write_text("<html>404 not found</html>")
    assert error_of(text).startswith("got 26 bytes that are no complete video")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert error_of(empty).startswith("got 0 bytes")
    audio = write_audio(tmp_path / "song.mp4")
    assert error_of(audio).startswith("got audio, want a video stream")
    # A playlist that refers to another file, which is not opened.
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXTINF:10,\n{audio.as_uri()}\n#EXT-X-ENDLIST\n")
    assert "no complete video" in error_of(playlist)


@pytest.mark.parametrize("name", ["film.mp4", "fast.mp4", "film.mkv", "film.avi"])
def test_a_truncated_video_is_refused(tmp_path: Path, name: str) -> None:
    options = {"movflags": "faststart"} if name == "fast.mp4" else {}
    noise = list(np.random.default_rng(0).integers(0, 256, (100, 48, 64, 3), dtype=np.uint8))
    path = write_video(tmp_path / name, noise, container_options=options)
    os.truncate(path, path.stat().st_size * 6 // 10)
    assert "no complete video" in (message := error_of(path)) or "truncated" in message


def test_limits_are_checked_before_memory_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = write_video(tmp_path / "wide.mp4", scenes(2, height=16, width=512))
    assert "32 times as wide as high, want at most 16" in error_of(wide)
    monkeypatch.setattr(video, "MAX_DURATION_S", 1)
    assert "want at most" in error_of(write_video(tmp_path / "long.mp4", scenes(60)))


@pytest.mark.slow
def test_the_same_bytes_on_one_core_and_on_all(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", scenes(20, 30, 25))
    script = (
        "import os, sys, hashlib; from pathlib import Path; os.sched_setaffinity(0, {%s});"
        "from sharding.dump.key_frames import read_shots;"
        "print(hashlib.sha256(repr(list(read_shots(Path(sys.argv[1])))).encode()).hexdigest())"
    )
    cores = sorted(os.sched_getaffinity(0))
    digests = {
        subprocess.run(
            [sys.executable, "-c", script % ",".join(map(str, used)), path],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for used in (cores[:1], cores)
    }
    assert len(digests) == 1


def test_a_source_has_the_images_of_all_shots_and_detects_a_change(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", scenes(20, 20))
    source = VideoSource(path)
    assert [image.name for image in source.images][:4] == [
        *(f"shot_0000_img_{image}.jpg" for image in range(3)),
        "shot_0001_img_0.jpg",
    ]
    want = [image.jpeg for shot in read_shots(path) for image in shot.images]
    for image, jpeg in zip(source.images, want, strict=True):
        buffer = memoryview(bytearray(image.size))
        assert source.read_into(image, buffer) is None
        assert bytes(buffer) == jpeg
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="changed while it was read"):
        source.close()


def test_a_stop_takes_effect_after_the_current_shot(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", scenes(20, 20, 20))
    shots = 0

    def stop() -> None:
        nonlocal shots
        shots += 1
        if shots == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        VideoSource(path, on_shot=stop)
    assert shots == 2


def test_a_full_disk_of_temporary_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "film.mp4", scenes(20, 20, 20))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            VideoSource(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error_text(caught.value) == f"{tmp_path}: File too large"
