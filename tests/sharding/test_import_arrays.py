from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray

from configs.errors import ConfigError, DataError, MachineError
from configs.load import dump_config
from configs.schema import Config
from sharding.__main__ import main
from sharding.features import FeatureSet, open_features
from sharding.import_arrays import ImportReport, import_features
from sharding.storage.base import Range
from sharding.storage.local import DiskStorage
from sharding.storage.space import FreeSpace, Space

DIM = 6


def rows(*values: float) -> NDArray[np.float64]:
    """Return one row per value: ``[v, v + 1/8, v + 2/8, …]``, or zeros for 0."""
    steps = np.arange(DIM) / 8
    return np.array([value + steps if value else np.zeros(DIM) for value in values])


MOVIES = {
    "tt1": rows(1, 2, 3),
    "tt2": rows(*[4] * 9, *[5] * 8, 4),
    "tt3": rows(6, 0, 6, 0, 0),
}
GENRES = {"tt1": ["Drama"], "tt2": ["Comedy", "War"], "tt9": ["War"]}


def write(folder: Path, movies: dict[str, NDArray[Any]], dtype: str = "float64") -> None:
    (folder / "arrays").mkdir(parents=True, exist_ok=True)
    for movie, array in movies.items():
        np.save(folder / "arrays" / f"{movie}.npy", array.astype(dtype))


def configuration(folder: Path, **data: object) -> Config:
    if not (folder / "genres.json").exists():
        (folder / "genres.json").write_text(json.dumps(GENRES))
        split = {"train": ["tt1", "tt3"], "val": ["tt2"], "test": ["tt8"]}
        (folder / "split.json").write_text(json.dumps(split))
    inputs = {
        "feature_arrays": str(folder / "arrays"),
        "metadata": str(folder / "genres.json"),
        "split": str(folder / "split.json"),
        "root": str(folder / "root"),
    }
    return Config.model_validate(
        {
            "version": 1,
            "data": inputs | data,
            "sharding": {"shard_bytes": 250},
            "encoder": {"name": "foreign"},
            "training": {"run_name": "none"},
        }
    )


def stored(features: FeatureSet, movie: str) -> list[float]:
    """Return the first number of each stored row."""
    at = features.movie_ids.index(movie)
    array = np.zeros((int(features.index.rows[at]), features.dim), np.float16)
    start = Range(features.shard_file(at), int(features.index.offset[at]))
    features.storage.read_into([start], [array.data])
    return [float(value) for value in array[:, 0]]


def files(report: ImportReport) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(report.location).iterdir())}


def test_arrays_become_the_rows_of_a_sealed_set_in_order_of_id(tmp_path: Path) -> None:
    write(tmp_path, MOVIES)
    report = import_features(configuration(tmp_path))
    features = open_features(report.location)
    assert features.movie_ids == ("tt1", "tt2", "tt3")
    assert features.dim == DIM
    assert stored(features, "tt1") == [1, 2, 3]
    assert stored(features, "tt3") == [6, 0, 6, 0, 0]
    # 36, 216 and 60 bytes of rows, at most 250 per shard
    assert features.index.shard.tolist() == [0, 1, 2]
    assert features.labels.split_M.tolist() == ["train", "val", ""]
    assert report.data == features.digest


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # leaves its file open
def test_webdataset_reads_every_field_of_an_imported_shard(tmp_path: Path) -> None:
    write(tmp_path, {"tt1": MOVIES["tt1"]})
    report = import_features(configuration(tmp_path))
    shard = f"{report.location}/features-00000.tar"
    samples = list(webdataset.WebDataset(shard, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["tt1"]
    assert np.array_equal(samples[0]["features.npy"], MOVIES["tt1"].astype(np.float16))
    assert samples[0]["shots.npy"].tolist() == [-1, -1, -1]
    assert samples[0]["json"] == {"id": "tt1", "images": 3, "rejected": []}


def test_anomalies_are_reported_by_count_and_by_name(tmp_path: Path) -> None:
    write(tmp_path, MOVIES)
    report = import_features(configuration(tmp_path))
    assert report.zero_rows == {"tt3": 3}
    assert report.repeated == {"tt2": 9}
    assert report.unlabelled == ("tt3",)
    assert report.labels_without_movie == ("tt9",)
    assert report.split_without_movie == {"tt8": "test"}
    saved = json.loads((Path(report.location) / "import.json").read_text())
    assert saved["zero_rows"] == {"tt3": 3}
    assert saved["split_without_movie"] == {"tt8": "test"}
    assert [" ".join(line.split()) for line in report.lines()[:6]] == [
        "movies 3 rows 26, kept 26 dim 6 shards 3, new 3",
        "zero rows (padding) 1 tt3 (3)",
        "runs of more than 8 equal rows 1 tt2 (9)",
        "movies without labels 1 tt3",
        "labels without a movie 1 tt9",
        "test movies without features 1 tt8",
    ]


def test_the_summary_of_an_import_fits_80_columns(tmp_path: Path) -> None:
    padded = {f"tt{number:07d}": rows(0, 1, 2) for number in range(9)}
    write(tmp_path, padded | {"tt2": rows(1)})
    summary = import_features(configuration(tmp_path)).lines()
    table = [line for line in summary if str(tmp_path) not in line]
    assert max(map(len, table)) <= 80
    text = " ".join(" ".join(table).split())
    assert "zero rows (padding) 9 tt0000000 (1), tt0000001 (1), " in text
    assert not any(
        line.rstrip().endswith("tt0000002") for line in table
    )  # a name without its count


def test_dedup_writes_each_run_of_equal_rows_once_and_drops_zero_rows(tmp_path: Path) -> None:
    write(tmp_path, MOVIES)
    report = import_features(configuration(tmp_path, dedup=True))
    features = open_features(report.location)
    assert stored(features, "tt1") == [1, 2, 3]
    assert stored(features, "tt2") == [4, 5, 4]
    assert stored(features, "tt3") == [6, 6]
    assert (report.rows, report.kept) == (26, 8)
    assert report.zero_rows == {"tt3": 3}


@pytest.mark.parametrize("dedup", [False, True])
def test_float16_float32_and_float64_give_the_same_bytes(tmp_path: Path, dedup: bool) -> None:
    sets = []
    for dtype in ("float16", "float32", "float64"):
        folder = tmp_path / dtype
        folder.mkdir()
        write(folder, MOVIES, dtype)
        made = files(import_features(configuration(folder, dedup=dedup)))
        sets.append({name: data for name, data in made.items() if "features-" not in name})
        sets[-1] |= {name: data for name, data in made.items() if name.endswith(".tar")}
    assert sets[0] == sets[1] == sets[2]


def test_a_rerun_writes_no_shard_and_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path, MOVIES)
    first = import_features(configuration(tmp_path))
    before = files(first)
    second = import_features(configuration(tmp_path))
    assert (first.built, second.built) == (3, 0)
    assert files(second) == before


def test_a_missing_shard_is_rebuilt_with_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path, MOVIES)
    before = files(report := import_features(configuration(tmp_path)))
    (Path(report.location) / "features-00001.json").unlink()
    rebuilt = import_features(configuration(tmp_path))
    assert rebuilt.built == 1
    assert files(rebuilt) == before


def test_a_damaged_shard_is_marked_as_missing_by_repair_and_imported_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, MOVIES)
    config = configuration(tmp_path)
    before = files(import_features(config))
    tar = Path(config.features_dir) / "features-00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    options = ["--features", config.features_dir, "--config", str(tmp_path / "config.yaml")]
    assert main(["verify", "--repair", *options]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "marked 1 shards as missing (1); next: "
        f"`movienet-encode run --config {tmp_path}/config.yaml` or, for imported arrays, "
        f"`movienet-shard import-features --config {tmp_path}/config.yaml`"
    )
    report = import_features(config)
    assert report.built == 1
    assert files(report) == before
    assert main(["verify", *options]) == 0


@pytest.mark.parametrize("change", ["array", "option"])
def test_changed_arrays_or_options_are_refused_unless_replace_is_passed(
    tmp_path: Path, change: str
) -> None:
    write(tmp_path, MOVIES)
    before = files(report := import_features(configuration(tmp_path)))
    if change == "array":
        write(tmp_path, {"tt2": rows(7)})
    config = configuration(tmp_path, dedup=change == "option")
    with pytest.raises(DataError, match="--replace"):
        import_features(config)
    assert files(report) == before
    import_features(config, replace=True)
    expected = [7.0] if change == "array" else [4.0, 5.0, 4.0]
    assert stored(open_features(report.location), "tt2") == expected


def test_surplus_shards_of_fewer_arrays_are_refused_or_removed_with_replace(
    tmp_path: Path,
) -> None:
    write(tmp_path, MOVIES)
    report = import_features(configuration(tmp_path))
    (tmp_path / "arrays" / "tt3.npy").unlink()
    with pytest.raises(DataError, match=r"got features-00002\.json, want 2 shards"):
        import_features(configuration(tmp_path))
    import_features(configuration(tmp_path), replace=True)
    tars = [name for name in files(report) if name.endswith(".tar")]
    assert tars == ["features-00000.tar", "features-00001.tar"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4, 5), np.float32), r"other.npy: got float32 \[3, 4, 5\], want float16"),
        (np.zeros((), np.float32), r"other.npy: got float32 \[\], want float16"),
        (np.zeros(5, np.float32), "other.npy: got rows of 5 numbers, want 6 as in tt1.npy"),
        (np.zeros((0, 6), np.float32), r"got float32 \[0, 6\]"),
        (np.ones((3, 6), np.int64), r"got int64 \[3, 6\]"),
        (np.array([["a"]], dtype=object), r"got object \[1, 1\]"),
        (np.ones((3, 7)), "other.npy: got rows of 7 numbers, want 6 as in tt1.npy"),
    ],
)
def test_another_shape_or_dtype_is_refused_with_the_file_name(
    tmp_path: Path, array: NDArray[Any], message: str
) -> None:
    write(tmp_path, MOVIES)
    np.save(tmp_path / "arrays" / "xx_other.npy", array)
    with pytest.raises(DataError, match=message) as caught:
        import_features(configuration(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not an array", None])
def test_a_truncated_or_invalid_file_is_refused_with_its_name(
    tmp_path: Path, content: bytes | None
) -> None:
    write(tmp_path, MOVIES)
    path = tmp_path / "arrays" / "tt2.npy"
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(DataError, match=r"tt2\.npy"):
        import_features(configuration(tmp_path))


def test_numbers_that_are_not_finite_are_counted_and_refused_by_name(tmp_path: Path) -> None:
    bad = rows(1, 2)
    bad[0, 0], bad[1, 3], bad[1, 4] = np.nan, np.inf, -np.inf
    write(tmp_path, MOVIES | {"tt2": bad, "tt3": np.full((1, DIM), np.nan)})
    with pytest.raises(
        DataError, match=r"arrays: 2 arrays contain NaN or .*: tt2\.npy \(3\), tt3\.npy \(6\)"
    ):
        import_features(configuration(tmp_path))


def test_numbers_beyond_float16_are_counted_and_refused_by_name(tmp_path: Path) -> None:
    large = rows(1, 2)
    large[0, 0], large[1, 1] = 65_504, -65_520
    write(tmp_path, MOVIES | {"tt2": large})
    with pytest.raises(DataError, match=r"above 65,504: tt2\.npy \(1\).*data\.exclude=\[tt2\]$"):
        import_features(configuration(tmp_path))


def test_an_array_of_only_padding_is_refused_by_name_if_zero_rows_are_dropped(
    tmp_path: Path,
) -> None:
    write(tmp_path, MOVIES | {"tt2": rows(0, 0)})
    with pytest.raises(DataError, match="only zero rows: tt2"):
        import_features(configuration(tmp_path, dedup=True))


@pytest.mark.parametrize("limit", [2, ("tt2", "tt1")])
def test_a_limit_selects_movies_and_reports_no_other_movie_as_missing(
    tmp_path: Path, limit: object
) -> None:
    write(tmp_path, MOVIES)
    report = import_features(configuration(tmp_path, limit=limit))
    assert open_features(report.location).movie_ids == ("tt1", "tt2")
    assert report.labels_without_movie == ("tt9",)
    assert report.split_without_movie == {"tt8": "test"}


def test_an_excluded_truncated_array_is_neither_read_nor_reported_as_missing(
    tmp_path: Path,
) -> None:
    write(tmp_path, MOVIES)
    path = tmp_path / "arrays" / "tt2.npy"
    path.write_bytes(path.read_bytes()[:-1])
    report = import_features(configuration(tmp_path, exclude=("tt2",)))
    assert open_features(report.location).movie_ids == tuple(m for m in MOVIES if m != "tt2")
    assert report.labels_without_movie == ("tt9",)
    with pytest.raises(DataError, match=r"data\.exclude: no movie 'tt77'"):
        import_features(configuration(tmp_path, exclude=("tt77",)))


def test_labels_can_come_from_a_pickle(tmp_path: Path) -> None:
    write(tmp_path, MOVIES)
    multi_hot = [1, 0, 1] + [0] * 18  # Drama, Thriller
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({"tt1": multi_hot, "tt2": [0] * 21}))
    report = import_features(configuration(tmp_path, metadata=str(tmp_path / "map.pkl")))
    labels = open_features(report.location).labels
    assert np.flatnonzero(labels.hot_MG[0]).tolist() == [0, 2]
    assert report.unlabelled == ("tt2", "tt3")


def test_names_that_are_not_ids_are_mapped_and_reported(tmp_path: Path) -> None:
    write(tmp_path, {"a film.v2": rows(1), "tt2": rows(2)})
    report = import_features(configuration(tmp_path))
    assert report.renamed == {"x_a_20film_2ev2": "a film.v2"}
    assert open_features(report.location).manifest.renamed == report.renamed


def test_arrays_in_any_order_and_shape_give_the_same_rows(tmp_path: Path) -> None:
    tables = {f"tt{k}": rows(k, k + 1, k + 2) for k in range(1, 7)} | {"tt7": rows(7)}
    write(tmp_path / "plain", tables)
    other = {
        "tt1": np.asfortranarray(tables["tt1"]),
        "tt2": tables["tt2"].astype(">f4"),
        "tt3": np.asfortranarray(tables["tt3"][:, None, :]),
        "tt4": tables["tt4"][None],
        "tt5": tables["tt5"][:, :, None, None],
        "tt6": np.asfortranarray(tables["tt6"].astype(">f8")),
        "tt7": tables["tt7"][0],
    }
    (tmp_path / "arrays").mkdir()
    for movie, array in other.items():
        np.save(tmp_path / "arrays" / f"{movie}.npy", array)
    report = import_features(configuration(tmp_path))
    plain = import_features(configuration(tmp_path / "plain"))
    tars = [name for name in files(report) if name.endswith(".tar")]
    assert [files(report)[name] for name in tars] == [files(plain)[name] for name in tars]
    assert report.reshaped == {"tt3": "3x1x6", "tt4": "1x3x6", "tt5": "3x6x1x1", "tt7": "6"}
    assert "4  tt3 (3x1x6), tt4 (1x3x6), tt5 (3x6x1x1)," in report.lines()[1]
    assert not plain.reshaped


def test_arrays_of_python_2_and_in_upper_case_are_read_without_a_warning(tmp_path: Path) -> None:
    write(tmp_path, MOVIES)
    path = tmp_path / "arrays" / "tt1.npy"
    data = path.read_bytes()
    assert data.count(b"(3, 6), }  ") == 1
    path.write_bytes(data.replace(b"(3, 6), }  ", b"(3L, 6L), }"))
    path.rename(path.with_suffix(".NPY"))
    features = open_features(import_features(configuration(tmp_path)).location)
    assert stored(features, "tt1") == [1, 2, 3]


@pytest.mark.parametrize("name", ["tt5.npz", "tt5.Pth", "tt5.pt"])
def test_an_array_in_another_format_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, MOVIES)
    path = tmp_path / "arrays" / name
    path.touch()
    with pytest.raises(
        DataError, match=rf"{name}: got a \{path.suffix} file, want \.npy.*exclude=\[tt5\]"
    ):
        import_features(configuration(tmp_path))
    # The same array in two formats is no loss.
    np.save(tmp_path / "arrays" / "tt5.npy", rows(5))
    assert import_features(configuration(tmp_path)).movies == 4


def test_a_full_disk_is_reported_before_the_first_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, MOVIES)
    config = configuration(tmp_path)
    monkeypatch.setattr(DiskStorage, "space", lambda _: FreeSpace(Space(1000)))
    with pytest.raises(MachineError, match=r"got 1 kB free, want .* for the feature shards"):
        import_features(config)
    assert not Path(config.features_dir).exists()


def test_a_missing_folder_is_reported_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.feature_arrays: got .*nowhere"):
        import_features(configuration(tmp_path, feature_arrays=str(tmp_path / "nowhere")))
    (tmp_path / "arrays").mkdir()
    with pytest.raises(DataError, match=r"no \.npy file"):
        import_features(configuration(tmp_path))


@pytest.mark.slow
@pytest.mark.real
def test_the_878_real_movies_are_imported_and_their_anomalies_are_reported(
    real_features: Path, tmp_path: Path
) -> None:
    inputs = {
        "feature_arrays": str(real_features / "ProcessedTensor"),
        "metadata": str(real_features / "movie_map.pkl"),
        "split": str(real_features / "movie1K.split.v1.json"),
        "root": str(tmp_path / "root"),
        "dedup": True,
    }
    config = configuration(tmp_path, **inputs)
    big = config.model_copy(
        update={"sharding": config.sharding.model_copy(update={"shard_bytes": 2**21})}
    )
    report = import_features(big)
    assert (report.movies, report.dim, report.rows) == (878, 512, 878 * 256)
    assert report.zero_rows == {"tt0088222": 46, "tt0120263": 184, "tt3465916": 139}
    assert len(report.repeated) > 870
    missing = report.split_without_movie
    of_train_and_val = {movie: split for movie, split in missing.items() if split != "test"}
    assert of_train_and_val == {"tt0035423": "train", "tt0032138": "val"}
    assert len(missing) == 222
    assert not report.unlabelled
    assert not report.labels_without_movie
    features = open_features(report.location)
    assert [len(features.labels.movies(split)) for split in ("train", "val")] == [659, 219]
    # JSON metadata instead of the pickle gives the same labels.
    by_json = big.model_copy(
        update={
            "data": big.data.model_copy(
                update={"metadata": str(real_features / "meta"), "root": str(tmp_path / "other")}
            )
        }
    )
    assert open_features(import_features(by_json).location).labels.digest == features.labels.digest


def test_an_import_in_which_no_movie_has_a_label_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {f"img_emb_{k}": rows(1, 2) for k in range(20)})
    with pytest.raises(DataError, match=r"any of 20 movies \(img_emb_0, …\).*clip-retrieval wrote"):
        import_features(configuration(tmp_path))
    assert not (tmp_path / "root").exists()


def test_a_pipe_in_place_of_an_array_or_of_metadata_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"tt2": rows(1, 2)})
    os.mkfifo(tmp_path / "arrays" / "tt1.npy")
    with pytest.raises(DataError, match=r"tt1\.npy: got a pipe, device or folder, want a file"):
        import_features(configuration(tmp_path))
    (tmp_path / "arrays" / "tt1.npy").unlink()
    (tmp_path / "meta").mkdir()
    os.mkfifo(tmp_path / "meta" / "tt2.json")
    with pytest.raises(DataError, match=r"tt2\.json: got a pipe, device or folder, want a file"):
        import_features(configuration(tmp_path, metadata=str(tmp_path / "meta")))


def test_all_arrays_that_cannot_be_read_are_named_and_files_of_a_mac_are_ignored(
    tmp_path: Path,
) -> None:
    write(tmp_path, MOVIES)
    arrays = tmp_path / "arrays"
    (arrays / "._tt1.npy").write_bytes(b"AppleDouble")
    (arrays / "tt3.npy").write_bytes(b"cut")
    (arrays / "tt4.npy").symlink_to("missing")
    with pytest.raises(DataError, match=r"tt3\.npy: not a .*1 more .*data\.exclude=\[tt3, tt4\]"):
        import_features(configuration(tmp_path))
    report = import_features(configuration(tmp_path, exclude=("tt3", "tt4")))
    assert report.movies == 2
