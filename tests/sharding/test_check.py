from __future__ import annotations

import json
import os
import shlex
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from configs.load import load_config
from sharding.__main__ import main
from sharding.check import _batches, check_dump
from sharding.check_report import Report
from sharding.dump.sources import Image
from tests.sharding.dirty import (
    MOVIES,
    NO_IMAGE,
    REJECTED,
    TRUNCATED_TAR,
    UNDECODABLE,
    findings_of,
    real_film,
    write_clean_dump,
    write_dirty_dump,
    write_genres,
)
from tests.sharding.films import check_golden, write_folder, write_tar

Damage = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with a clean dump and its configuration."""
    write_clean_dump(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, *args: str) -> int:
    return main([command, "--config", "config.yaml", *args])


def report_of(folder: Path, *overrides: str, decode: bool = False) -> Report:
    return check_dump(load_config(folder / "config.yaml", overrides), decode=decode)


# --- the dirty dump -------------------------------------------------------------------------------


def test_a_dirty_dump_gives_the_golden_table_and_check_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dirty_dump(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("check", "--decode", "--quiet") == 3
    check_golden("check.txt", capsys.readouterr().out.encode())
    check_golden("check.json", (tmp_path / "root" / "check.json").read_bytes())
    # Every kind of defect occurs.
    assert all(json.loads((tmp_path / "root" / "check.json").read_bytes())["findings"].values())


@pytest.mark.slow
@pytest.mark.parametrize(("image_check", "more"), [("markers", []), ("decode", UNDECODABLE)])
def test_a_build_of_a_dirty_dump_rejects_exactly_the_bad_images_and_members(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image_check: str,
    more: list[tuple[str, str, str]],
) -> None:
    write_dirty_dump(tmp_path)
    monkeypatch.chdir(tmp_path)
    # Decoding finds that two of the twelve images of tt0000004 are bad.
    more_bad = "sharding.max_bad_fraction=0.2"
    assert (
        run(
            "build",
            f"data.exclude=[{TRUNCATED_TAR}]",
            more_bad,
            f"sharding.image_check={image_check}",
        )
        == 0
    )
    rejected = tmp_path / "root" / "frames" / "rejected.jsonl"
    rows = [json.loads(line) for line in rejected.read_text().splitlines()]
    rejected_rows = sorted((row["movie"], row["member"], row["reason"]) for row in rows)
    assert rejected_rows == sorted(REJECTED + more)


def test_a_plan_stops_at_the_truncated_tar_that_a_check_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dirty_dump(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("plan") == 1
    error = capsys.readouterr().err
    assert f"{TRUNCATED_TAR}.tar: got 3000 bytes" in error
    assert error.strip().endswith(f"continue without it: data.exclude=[{TRUNCATED_TAR}]")


def test_a_check_with_decode_reports_exactly_what_a_build_rejects(tmp_path: Path) -> None:
    write_dirty_dump(tmp_path)
    findings = findings_of(in_folder(tmp_path, decode=True))
    reported = {**findings["undecodable_images"], **findings["odd_members"]}
    reported |= findings["unreadable_images"]
    rejected = {f"{movie}/{member}": why for movie, member, why in REJECTED + UNDECODABLE}
    reported |= dict.fromkeys(findings["empty_images"], "empty")
    assert reported == rejected


def in_folder(folder: Path, *, dump: str = "dump", decode: bool = False) -> Report:
    places = {"dump": dump, "metadata": "meta", "split": "split.json", "root": "root"}
    overrides = [f"data.{key}={folder / name}" for key, name in places.items()]
    return report_of(folder, *overrides, decode=decode)


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [[], ["--decode"]])
def test_a_clean_dump_is_clean(
    folder: Path, capsys: pytest.CaptureFixture[str], decode: list[str]
) -> None:
    assert run("check", *decode) == 0
    tree = json.loads((folder / "root" / "check.json").read_bytes())
    assert tree["verdict"] == "clean"
    assert tree["totals"] == {"movies": 14, "shots": 56, "images": 168, "bytes": 30_576}
    assert "\nclean\n" in capsys.readouterr().out


def remove_all_labels(folder: Path) -> None:
    for movie in MOVIES:
        write_genres(folder, movie, ["Noir"])


def truncate_every_tar(folder: Path) -> None:
    for path in (folder / "dump").iterdir():
        path.write_bytes(path.read_bytes()[:700])


def empty_every_image(folder: Path) -> None:
    for movie in MOVIES:
        write_tar(folder / "dump", movie, dict.fromkeys(real_film(movie), b""))


def remove_every_movie(folder: Path) -> None:
    for path in (folder / "dump").iterdir():
        path.unlink()


def give_two_movies_the_same_id(folder: Path) -> None:
    write_tar(folder / "dump", "x_b_20c", real_film("b c"))
    write_tar(folder / "dump", "b c", real_film("b c"))


def put_a_movie_in_two_splits(folder: Path) -> None:
    (folder / "split.json").write_text(json.dumps({"train": MOVIES, "test": MOVIES[:1]}))


def split_without_train(folder: Path) -> None:
    (folder / "split.json").write_text(json.dumps({"train": ["tt9"], "val": MOVIES}))


@pytest.mark.parametrize(
    ("damage", "overrides", "reason"),
    [
        (remove_all_labels, [], "no movie with images has a genre of data.genres"),
        (truncate_every_tar, [], "no movie has an intact image"),
        (empty_every_image, [], "no movie has an intact image"),
        (remove_every_movie, [], "dump: no movie, want"),
        (give_two_movies_the_same_id, [], "both get the id x_b_20c; rename one"),
        (put_a_movie_in_two_splits, [], "movie tt0000001 is in 'train' and in 'test'"),
        (split_without_train, [], "no movie with images and genres is in train"),
        (os.fspath, ["data.dump=absent"], "data.dump: no folder absent"),
        (os.fspath, ["data.metadata=null"], "data.metadata: got null"),
        (os.fspath, ["data.metadata=none"], "data.metadata: got none, want a folder"),
        (os.fspath, ["data.split=none.json"], "data.split: no file none.json"),
        (os.fspath, ["data.split=fold:5/5"], "got 'fold:5/5', want fold:K/N"),
        (os.fspath, ["data.split=fold:0/15"], "got 14 labelled movies, want at least 15"),
        (os.fspath, ['data.limit=["tt7"]'], "no movie 'tt7' in the dump"),
    ],
)
def test_a_dump_that_permits_no_training_is_unusable(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Damage,
    overrides: list[str],
    reason: str,
) -> None:
    damage(folder)
    assert run("check", *overrides) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("unusable: ") and reason in line]


def test_a_dump_that_is_not_set_is_a_configuration_error(folder: Path) -> None:
    assert run("check", "data.dump=null") == 2
    assert not (folder / "root").exists()


def test_images_that_cannot_be_read_make_a_dump_unusable_for_a_reason(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = as_zip(folder, zipfile.ZIP_LZMA)
    assert run("check", f"data.dump={archive}") == 4
    assert "LZMA (method 14), want stored or deflated" in capsys.readouterr().out


def test_jpegs_of_other_names_are_counted_with_an_example_of_the_names_that_are_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {f"frame {number:03}.jpg": b"" for number in range(31)}
    write_folder(folder / "dump", "only-others", others)
    (folder / "dump" / "tt0000002.tar").unlink()
    mixed = real_film("tt0000002") | {"frame1.JPG": b"", "notes.txt": b""}
    write_folder(folder / "dump", "tt0000002", mixed)
    assert run("check") == 3
    found = findings_of(report_of(folder))
    assert found["misnamed_images"] == {
        "only-others": "31 named like frame 000.jpg, want shot_0000_img_0.jpg",
        "tt0000002": "1 named like frame1.JPG, want shot_0000_img_0.jpg",
    }
    assert found["odd_members"] == {"tt0000002/notes.txt": "no image of a shot"}
    assert (
        "- these 2 movies will lack JPEGs that are ignored because of their names; rename\n"
        "  the files: only-others (31 named like frame 000.jpg, want\n"
        "  shot_0000_img_0.jpg), tt0000002 (1 named like frame1.JPG, want\n"
        "  shot_0000_img_0.jpg)\n"
    ) in capsys.readouterr().out


def test_a_dump_in_which_every_image_has_another_name_is_unusable_for_this_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clean_dump(tmp_path)
    for path in (tmp_path / "dump").iterdir():
        path.unlink()
    write_folder(tmp_path / "dump", "tt0000001", {"frame 000.jpg": b"", "frame 001.jpg": b""})
    monkeypatch.chdir(tmp_path)
    assert run("check") == 4
    reason = "2 named like frame 000.jpg, want shot_0000_img_0.jpg"
    assert f"unusable: no movie has an intact image ({reason})" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_that_a_check_suggests_leaves_out_what_would_stop_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dirty_dump(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("check", "--decode", "data.exclude=[tt0000013]") == 3
    program, *words = shlex.split(capsys.readouterr().out.splitlines()[-1].split("`")[1])
    expected = "data.exclude=[tt0000013, tt0000004, tt0000005, tt0000009, tt0000014]"
    assert (program, words[-1]) == ("movienet-shard", expected)
    assert main(words) == 0
    assert "sealed: movies 8 " in capsys.readouterr().out


def pasted(printed: str) -> list[str]:
    """Return the arguments of the ``movienet-shard`` command in the last line printed."""
    program, *words = shlex.split(printed.splitlines()[-1].split("`")[1])
    assert program == "movienet-shard"
    return words


def test_after_a_bad_movie_stopped_the_build_the_suggested_commands_build_without_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = dict.fromkeys(("shot_0001_img_1.jpg", "shot_0002_img_1.jpg"), b"no JPEG")
    write_tar(folder / "dump", "tt0000005", real_film("tt0000005") | bad)
    small = "sharding.shard_bytes=10KiB"
    assert run("build", "--only", "3", small) == 0  # moves to other movies in the new plan
    assert run("build", "--quiet", small) == 1
    assert "movienet-shard check" in capsys.readouterr().err
    assert run("check", "--decode", small) == 3
    replan = pasted(capsys.readouterr().out)
    assert (replan[:2], replan[-1]) == (["plan", "--replace"], "data.exclude=[tt0000005]")
    assert main(replan) == 0
    build = pasted(capsys.readouterr().out)
    assert build[:2] == ["build", "--replace"]
    assert main(build) == 0
    assert "sealed: movies 13 " in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_a_plan_with_an_excluded_movie_is_refused_with_the_command_that_plans_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("plan") == 0
    capsys.readouterr()
    assert run("build", "--quiet", "data.exclude=[tt0000003, tt0000005]") == 1
    printed = capsys.readouterr().err
    assert "plan.json: contains 2 movies of data.exclude (tt0000003, …), want none; run" in printed
    for _ in range(2):  # plan, then build
        assert main(pasted(printed)) == 0
        printed = capsys.readouterr().out
    assert "sealed: movies 12 " in printed


def test_more_movies_than_a_command_can_name_are_listed_in_the_report(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    movies = [f"tt{number:07}" for number in range(900, 921)]
    for movie in movies:
        (folder / "dump" / f"{movie}.tar").write_bytes(b"cut")
    assert run("check") == 3
    last = capsys.readouterr().out.splitlines()[-1]
    where = '"stops" in root/check.json'
    assert last.startswith(
        f"next: repair the movies of {where} or add them to data.exclude, then `"
    )
    assert len(last) < 500
    assert json.loads((folder / "root" / "check.json").read_bytes())["stops"] == movies


# --- reading --------------------------------------------------------------------------------------


def test_a_check_without_decode_reads_no_image(folder: Path) -> None:
    # Noise and a missing end marker: both are visible only if the image is read.
    films = {movie: dict.fromkeys(real_film(movie), b"\xff\xd8\xff noise") for movie in MOVIES}
    for movie, film in films.items():
        write_tar(folder / "dump", movie, film)
    assert findings_of(report_of(folder)) == {}
    assert len(findings_of(report_of(folder, decode=True))["undecodable_images"]) == 14 * 12


def test_large_images_are_decoded_in_smaller_batches() -> None:
    sizes = [1000] * 70 + [40 * 1024**2] * 3 + [1000]
    images = [Image(0, k, "", size, 0, 0) for k, size in enumerate(sizes)]
    assert [len(batch) for batch in _batches(images)] == [64, 7, 1, 2]


def test_with_a_limit_no_movie_counts_as_missing(folder: Path) -> None:
    (folder / "dump" / "tt0000001.tar").unlink()
    assert findings_of(report_of(folder)) == {"missing": {"tt0000001": "train"}}
    for limit in ("3", '["tt0000002", "tt0000003", "tt0000004"]'):
        report = report_of(folder, f"data.limit={limit}")
        assert (report.totals["movies"], report.verdict) == (3, "clean")


def test_an_excluded_movie_is_neither_opened_nor_missing(folder: Path) -> None:
    (folder / "dump" / "tt0000001.tar").write_bytes(b"\xff" * 600)
    assert "unreadable" in findings_of(report_of(folder))
    report = report_of(folder, "data.exclude=[tt0000001]")
    assert (report.totals["movies"], report.verdict) == (13, "clean")


def test_without_a_split_file_nothing_is_missing_or_extra(folder: Path) -> None:
    for split in ("null", "fold:1/3"):
        tree = json.loads(report_of(folder, f"data.split={split}").to_bytes())
        assert tree["verdict"] == "clean"
        assert tree["findings"]["missing"] is None
        assert tree["findings"]["extra"] is None


def test_a_check_writes_only_its_report(folder: Path) -> None:
    def files() -> set[Path]:
        return {path for path in folder.rglob("*") if path.is_file()}

    before = files()
    run("check", "--decode")
    assert files() - before == {folder / "root" / "check.json"}


def test_a_check_is_idempotent_and_replaces_an_old_report(folder: Path) -> None:
    run("check")
    first = (folder / "root" / "check.json").read_bytes()
    (folder / "root" / "check.json").write_bytes(b"old")
    run("check")
    assert (folder / "root" / "check.json").read_bytes() == first


# --- deliveries -----------------------------------------------------------------------------------


def as_zip(folder: Path, method: int = zipfile.ZIP_STORED) -> Path:
    """Zip the dump with its tars and folders."""
    with zipfile.ZipFile(folder / "all.zip", "w", method) as archive:
        for path in sorted((folder / "dump").rglob("*")):
            archive.write(path, f"240P/{path.relative_to(folder / 'dump')}")
    return folder / "all.zip"


def as_split_zip(folder: Path) -> Path:
    data = as_zip(folder).read_bytes()
    (folder / "volumes").mkdir()
    for k in range(0, len(data), 40_000):
        (folder / "volumes" / f"all.zip.{k // 40_000 + 1:03d}").write_bytes(data[k : k + 40_000])
    return folder / "volumes"


def as_folders(folder: Path) -> Path:
    for movie in MOVIES:
        write_folder(folder / "folders", movie, real_film(movie))
    return folder / "folders"


@pytest.mark.parametrize(
    "deliver",
    [as_folders, as_zip, as_split_zip, partial(as_zip, method=zipfile.ZIP_DEFLATED)],
)
@pytest.mark.parametrize("decode", [False, True])
def test_every_archive_format_gives_the_same_report(
    folder: Path, deliver: Callable[[Path], Path], decode: bool
) -> None:
    expected = report_of(folder, decode=decode)
    assert report_of(folder, f"data.dump={deliver(folder)}", decode=decode) == expected


def test_a_dirty_zip_gives_the_findings_of_its_folder_except_for_names_of_sources(
    tmp_path: Path,
) -> None:
    write_dirty_dump(tmp_path)
    expected = findings_of(in_folder(tmp_path, decode=True))
    findings = findings_of(in_folder(tmp_path, dump=str(as_zip(tmp_path)), decode=True))
    # A zip folder without an image does not count as a movie: it is only missing.
    assert expected.pop("without_images") == {NO_IMAGE: None}
    assert expected.pop("misnamed_images").keys() == {NO_IMAGE}
    assert expected.pop("unsupported") == {"tt0000015.tar.xz": None}  # a member of the zip
    for by_source in ("unreadable", "twice", "joined_tars"):
        assert len(findings.pop(by_source)) == len(expected.pop(by_source))
    assert findings == expected


def test_a_truncated_zip_is_unusable_with_one_line(folder: Path) -> None:
    archive = as_zip(folder)
    archive.write_bytes(archive.read_bytes()[:9000])
    report = report_of(folder, f"data.dump={archive}")
    assert report.exit_code == 4
    assert "9000 bytes" in report.unusable[0]
    assert "\n" not in report.unusable[0]
