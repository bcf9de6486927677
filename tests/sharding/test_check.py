from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from configs.load import load_config
from sharding.__main__ import main
from sharding.check import check_dump
from sharding.check_report import Report
from tests.sharding.dirty import (
    CUT_TAR,
    MOVIES,
    NO_IMAGE,
    REJECTED,
    UNDECODABLE,
    found,
    real_film,
    write_clean_dump,
    write_dirty_dump,
    write_genres,
)
from tests.sharding.films import check_golden, write_folder, write_tar

Spoil = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a clean dump and its config."""
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
    # Every kind of defect that is looked for occurs.
    assert all(json.loads((tmp_path / "root" / "check.json").read_bytes())["findings"].values())


@pytest.mark.parametrize(("image_check", "more"), [("markers", []), ("decode", UNDECODABLE)])
def test_a_dirty_dump_gives_the_exact_quarantine_list(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image_check: str,
    more: list[tuple[str, str, str]],
) -> None:
    write_dirty_dump(tmp_path)
    monkeypatch.chdir(tmp_path)
    # Two of the twelve images of tt0000004 are bad when they are decoded.
    more_bad = "sharding.max_bad_fraction=0.2"
    assert (
        run("build", f"data.exclude=[{CUT_TAR}]", more_bad, f"sharding.image_check={image_check}")
        == 0
    )
    rejected = tmp_path / "root" / "frames" / "rejected.jsonl"
    rows = [json.loads(line) for line in rejected.read_text().splitlines()]
    found = sorted((row["movie"], row["member"], row["reason"]) for row in rows)
    assert found == sorted(REJECTED + more)


def test_a_plan_stops_at_the_cut_tar_that_a_check_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dirty_dump(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("plan") == 1
    error = capsys.readouterr().err
    assert f"{CUT_TAR}.tar: got 3000 bytes" in error
    assert error.strip().endswith(f"continue without it: data.exclude=[{CUT_TAR}]")


def test_a_check_with_decode_tells_just_what_a_build_leaves_out(tmp_path: Path) -> None:
    write_dirty_dump(tmp_path)
    report = found(in_folder(tmp_path, decode=True))
    told = {**report["undecodable_images"], **report["odd_members"]}
    rejected = {f"{movie}/{member}": why for movie, member, why in REJECTED + UNDECODABLE}
    told |= dict.fromkeys(report["empty_images"], "empty")
    assert told == rejected


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


def keep_no_labels(folder: Path) -> None:
    for movie in MOVIES:
        write_genres(folder, movie, ["Noir"])


def cut_every_tar(folder: Path) -> None:
    for path in (folder / "dump").iterdir():
        path.write_bytes(path.read_bytes()[:700])


def empty_every_image(folder: Path) -> None:
    for movie in MOVIES:
        write_tar(folder / "dump", movie, dict.fromkeys(real_film(movie), b""))


def remove_every_movie(folder: Path) -> None:
    for path in (folder / "dump").iterdir():
        path.unlink()


def name_two_movies_alike(folder: Path) -> None:
    write_tar(folder / "dump", "x_b_20c", real_film("b c"))
    write_tar(folder / "dump", "b c", real_film("b c"))


def put_a_movie_in_two_splits(folder: Path) -> None:
    (folder / "split.json").write_text(json.dumps({"train": MOVIES, "test": MOVIES[:1]}))


def split_without_train(folder: Path) -> None:
    (folder / "split.json").write_text(json.dumps({"train": ["tt9"], "val": MOVIES}))


@pytest.mark.parametrize(
    ("spoil", "overrides", "told"),
    [
        (keep_no_labels, [], "no movie with images has a genre of data.genres"),
        (cut_every_tar, [], "no movie has a whole image"),
        (empty_every_image, [], "no movie has a whole image"),
        (remove_every_movie, [], "dump: no movie, want"),
        (name_two_movies_alike, [], "both get the id x_b_20c; rename one"),
        (put_a_movie_in_two_splits, [], "movie tt0000001 is in 'train' and in 'test'"),
        (split_without_train, [], "no movie with images and genres is in train"),
        (os.fspath, ["data.metadata=null"], "data.metadata: got null"),
        (os.fspath, ["data.metadata=none"], "data.metadata: got none, want a folder"),
        (os.fspath, ["data.split=none.json"], "data.split: no file none.json"),
        (os.fspath, ["data.split=fold:5/5"], "got 'fold:5/5', want fold:K/N"),
        (os.fspath, ["data.split=fold:0/15"], "got 14 labelled movies, too few for 15 folds"),
        (os.fspath, ['data.limit=["tt7"]'], "no movie 'tt7' in the dump"),
    ],
)
def test_what_leaves_nothing_to_go_on_with_is_unusable(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Spoil,
    overrides: list[str],
    told: str,
) -> None:
    spoil(folder)
    assert run("check", *overrides) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("unusable: ") and told in line]


def test_a_dump_that_is_not_there_is_a_wrong_config(folder: Path) -> None:
    assert run("check", f"data.dump={folder / 'absent'}") == 2
    assert not (folder / "root").exists()


# --- reading --------------------------------------------------------------------------------------


def test_a_check_reads_listings_and_no_image(folder: Path) -> None:
    # Noise between the markers, and no end marker: neither is seen without decoding.
    films = {movie: dict.fromkeys(real_film(movie), b"\xff\xd8\xff noise") for movie in MOVIES}
    for movie, film in films.items():
        write_tar(folder / "dump", movie, film)
    assert found(report_of(folder)) == {}
    assert len(found(report_of(folder, decode=True))["undecodable_images"]) == 14 * 12


def test_a_limit_is_obeyed_and_then_nothing_is_missing(folder: Path) -> None:
    (folder / "dump" / "tt0000001.tar").unlink()
    assert found(report_of(folder)) == {"missing": {"tt0000001": "train"}}
    for limit in ("3", '["tt0000002", "tt0000003", "tt0000004"]'):
        report = report_of(folder, f"data.limit={limit}")
        assert (report.totals["movies"], report.verdict) == (3, "clean")


def test_what_is_excluded_is_neither_opened_nor_missing(folder: Path) -> None:
    (folder / "dump" / "tt0000001.tar").write_bytes(b"\xff" * 600)
    assert "unreadable" in found(report_of(folder))
    report = report_of(folder, "data.exclude=[tt0000001]")
    assert (report.totals["movies"], report.verdict) == (13, "clean")


def test_without_a_split_file_nothing_is_missing_or_extra(folder: Path) -> None:
    for split in ("null", "fold:1/3"):
        tree = json.loads(report_of(folder, f"data.split={split}").to_bytes())
        assert tree["verdict"] == "clean"
        assert tree["findings"]["missing"] is None
        assert tree["findings"]["extra"] is None


def test_a_check_writes_nothing_but_its_report(folder: Path) -> None:
    def files() -> set[Path]:
        return {path for path in folder.rglob("*") if path.is_file()}

    before = files()
    run("check", "--decode")
    assert files() - before == {folder / "root" / "check.json"}


def test_a_check_says_the_same_again_whatever_stands_there(folder: Path) -> None:
    run("check")
    first = (folder / "root" / "check.json").read_bytes()
    (folder / "root" / "check.json").write_bytes(b"old")
    run("check")
    assert (folder / "root" / "check.json").read_bytes() == first


# --- deliveries -----------------------------------------------------------------------------------


def as_zip(folder: Path, method: int = zipfile.ZIP_STORED) -> Path:
    """Zip the dump, tars and folders in it as they are."""
    with zipfile.ZipFile(folder / "all.zip", "w", method) as archive:
        for path in sorted((folder / "dump").rglob("*")):
            archive.write(path, f"240P/{path.relative_to(folder / 'dump')}")
    return folder / "all.zip"


def as_zip_in_parts(folder: Path) -> Path:
    data = as_zip(folder).read_bytes()
    (folder / "parts").mkdir()
    for k in range(0, len(data), 40_000):
        (folder / "parts" / f"all.zip.{k // 40_000 + 1:03d}").write_bytes(data[k : k + 40_000])
    return folder / "parts"


def as_folders(folder: Path) -> Path:
    for movie in MOVIES:
        write_folder(folder / "folders", movie, real_film(movie))
    return folder / "folders"


@pytest.mark.parametrize(
    "deliver",
    [as_folders, as_zip, as_zip_in_parts, partial(as_zip, method=zipfile.ZIP_DEFLATED)],
)
@pytest.mark.parametrize("decode", [False, True])
def test_every_form_of_delivery_gives_the_same_report(
    folder: Path, deliver: Callable[[Path], Path], decode: bool
) -> None:
    wanted = report_of(folder, decode=decode)
    assert report_of(folder, f"data.dump={deliver(folder)}", decode=decode) == wanted


def test_a_dirty_zip_gives_what_its_folder_gives_beside_the_names_of_sources(
    tmp_path: Path,
) -> None:
    write_dirty_dump(tmp_path)
    wanted = found(in_folder(tmp_path, decode=True))
    report = found(in_folder(tmp_path, dump=str(as_zip(tmp_path)), decode=True))
    # A folder without an image is no movie among the others of a zip: it is only missing.
    assert wanted.pop("without_images") == {NO_IMAGE: None}
    for by_source in ("unreadable", "twice"):
        assert len(report.pop(by_source)) == len(wanted.pop(by_source))
    assert report == wanted


def test_a_cut_zip_is_unusable_in_one_line(folder: Path) -> None:
    whole = as_zip(folder)
    whole.write_bytes(whole.read_bytes()[:9000])
    report = report_of(folder, f"data.dump={whole}")
    assert report.exit_code == 4
    assert "9000 bytes" in report.unusable[0]
    assert "\n" not in report.unusable[0]
