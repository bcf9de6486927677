"""External feature tars, indexed in place."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import ConfigError, DataError
from configs.schema import StorageConfig
from sharding.format.manifest import Manifest
from sharding.format.names import movie_id
from sharding.index_tars import index_tars, list_tars, publish_index
from sharding.storage.local import DiskStorage
from sharding.storage.open import open_storage
from sharding.verify import verify_features
from tests.sharding.external_films import Rows, config_of, indexed, make_rows, rows_of, write
from tests.sharding.servers import faulty_server, log, nginx, request, rule, s3_server

pytestmark = pytest.mark.slow


def range_bytes(header: str) -> int:
    """Return the length of the range of a request."""
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", header)
    return int(match[2]) + 1 - int(match[1]) if match else 0


def assert_same(read: Rows, written: Rows) -> None:
    assert list(read) == list(written)
    for name, rows in read.items():
        np.testing.assert_array_equal(rows, written[name].astype("<f2"))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4"])
@pytest.mark.parametrize("field", ["features.npy", "npy", "clip.l14.npy"])
def test_rows_of_every_type_and_field_are_read_in_place(
    tmp_path: Path, field: str, dtype: str
) -> None:
    rows = make_rows(dtype=dtype)
    write(tmp_path / "tars", rows, field)
    features = indexed(config_of(tmp_path, str(tmp_path / "tars")))
    assert_same(rows_of(features), rows)
    assert features.labels.hot_MG.sum() == 11 + 5
    sealed = DiskStorage(tmp_path / "root" / "features" / "foreign")
    assert sealed.names() == ["index.npz", "labels.npz", "manifest.json"]
    assert verify_features(sealed) == []


def test_axes_of_length_1_are_removed_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make_rows(4)
    first, second, third, fourth = rows
    rows[fourth] = rows[fourth][:1]
    shapes = {
        first: rows[first],
        second: rows[second][:, None],
        third: rows[third][None],
        fourth: rows[fourth][0],
    }
    write(tmp_path / "tars", shapes)
    assert_same(rows_of(indexed(config_of(tmp_path, str(tmp_path / "tars")))), rows)
    assert "3 arrays are read as [N, D], e.g. tt0000001.features.npy of shape [41, 1, 6]" in (
        caplog.text
    )


@pytest.mark.parametrize(
    ("field", "key"), [("features.npy", None), ("NPY", "npy"), ("clip.npy", "clip")]
)
def test_a_movie_may_have_a_dot_in_its_name(tmp_path: Path, field: str, key: str | None) -> None:
    rows = dict(zip(("tt1.v1", "tt1.v2", "tt2", "a.film.2010"), make_rows(4).values(), strict=True))
    write(tmp_path / "tars", rows, field)
    (tmp_path / "meta.json").write_text(json.dumps({name: ["Drama"] for name in rows}))
    features = indexed(config_of(tmp_path, str(tmp_path / "tars"), feature_key=key))
    assert features.labels.hot_MG.sum() == len(rows)
    assert sorted(features.movie_ids) == sorted(movie_id(name) for name in rows)
    assert_same(rows_of(features), {movie_id(name): value for name, value in rows.items()})


def test_the_error_of_several_fields_names_what_they_have_in_common(tmp_path: Path) -> None:
    write(
        tmp_path / "tars", movies(**{"a.v1": np.zeros((3, 4)), "a.v2": np.ones((3, 4))}), "clip.npy"
    )
    with pytest.raises(
        ConfigError, match=r"want clip\.npy if the dots before it belong to the mov"
    ):
        index_tars(config_of(tmp_path, str(tmp_path / "tars")))


def test_another_field_of_a_movie_is_no_movie(tmp_path: Path) -> None:
    rows = make_rows(2)
    write(tmp_path / "tars", rows | {f"{name}.text": value for name, value in rows.items()})
    assert indexed(config_of(tmp_path, str(tmp_path / "tars"))).movie_ids == tuple(rows)


def test_tars_without_arrays_are_refused_with_their_fields(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("clips/tt0000001.Pth"))
    with pytest.raises(DataError, match=r"a\.tar: got fields Pth \(1\), want a \.npy of float16"):
        index_tars(config_of(tmp_path, str(tmp_path / "tars")))


def test_pax_tars_with_folders_and_long_names_are_read(tmp_path: Path) -> None:
    rows = make_rows()
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for key, features in rows.items():
            file = io.BytesIO()
            np.save(file, features)
            member = tarfile.TarInfo(f"{'deep/' * 30}{key}.clip.npy")
            member.size = len(file.getvalue())
            archive.addfile(member, io.BytesIO(file.getvalue()))
    assert_same(rows_of(indexed(config_of(tmp_path, str(tmp_path / "tars/a.tar")))), rows)


def test_tars_of_a_server_are_indexed_by_reading_their_headers_and_rows_once(
    tmp_path: Path,
) -> None:
    rows = make_rows(8, dim=40_000)
    write(tmp_path / "tars", rows)
    size = sum(path.stat().st_size for path in (tmp_path / "tars").iterdir())
    with nginx(tmp_path / "nginx", tmp_path / "tars") as upstream, faulty_server(upstream) as url:
        rule(url)
        assert_same(rows_of(indexed(config_of(tmp_path, f"{url}/clip-{{000..001}}.tar"))), rows)
        read = [range_bytes(each["range"]) for each in log(url)]
    # The rows are read once to check their numbers, and once by this test.
    assert sum(read) - 2 * sum(each.nbytes for each in rows.values()) < size / 50


@pytest.mark.parametrize(
    ("number", "dtype"), [(np.nan, "<f2"), (np.inf, "<f4"), (np.nan, "<f8"), (1e38, "<f4")]
)
def test_numbers_that_are_not_finite_as_float16_are_named_by_movie_and_tar(
    tmp_path: Path, number: float, dtype: str
) -> None:
    rows = make_rows(dtype=dtype)
    for movie in ("tt0000002", "tt0000007"):
        rows[movie][1, 3] = number
    write(tmp_path / "tars", rows)
    with pytest.raises(DataError) as caught:
        index_tars(config_of(tmp_path, str(tmp_path / "tars")))
    line = str(caught.value)
    assert re.search(
        r"movie tt0000002: .*(NaN or infinite numbers in 1 of 2\d rows|above 65,504)", line
    )
    assert "clip-000.tar" in line
    assert line.endswith(
        ", and 1 more movies; encode them again, or continue without them: "
        "data.exclude=[tt0000002, tt0000007]"
    )
    exclude = ("tt0000002", "tt0000007")
    features = indexed(config_of(tmp_path, str(tmp_path / "tars"), exclude=exclude))
    assert len(features) == 9


def test_files_that_a_mac_adds_are_ignored(tmp_path: Path) -> None:
    rows = make_rows(2)
    write(tmp_path / "tars", rows)
    (tmp_path / "tars" / "._clip-000.tar").write_bytes(b"AppleDouble")
    with tarfile.open(tmp_path / "tars" / "clip-000.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("._tt0000000.features.npy"))
    assert_same(rows_of(indexed(config_of(tmp_path, str(tmp_path / "tars")))), rows)


def test_a_movie_whose_array_is_a_hard_link_is_indexed(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    file = io.BytesIO()
    np.save(file, np.ones((2, 3), "<f2"))
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as archive:
        first, second = (tarfile.TarInfo(f"tt000000{k}.npy") for k in (1, 2))
        first.size = len(file.getvalue())
        second.type, second.linkname = tarfile.LNKTYPE, first.name
        archive.addfile(first, io.BytesIO(file.getvalue()))
        archive.addfile(second)
    features = indexed(config_of(tmp_path, str(tmp_path / "tars")))
    assert rows_of(features)["tt0000002"].tolist() == [[1, 1, 1]] * 2


def test_tars_of_which_no_movie_has_a_label_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "tars", {f"img_emb_{k}": rows for k, rows in enumerate(make_rows(3).values())})
    with pytest.raises(DataError, match=r"any of 3 movies \(img_emb_0, …\).*clip-retrieval wrote"):
        index_tars(config_of(tmp_path, str(tmp_path / "tars")))


@pytest.mark.usefixtures("aws_login")
def test_tars_of_a_bucket_are_indexed(tmp_path: Path) -> None:
    rows = make_rows(8)
    write(tmp_path / "tars", rows)
    with s3_server() as url:
        request(f"{url}/bucket", "PUT")
        storage = StorageConfig(endpoint_url=url, region="us-east-1", timeout=20)
        local, bucket = DiskStorage(tmp_path / "tars"), open_storage("s3://bucket/x", storage)
        for name in local.names():
            bucket.publish(name, local.read(name))
        config = config_of(tmp_path, "s3://bucket/x").model_copy(update={"storage": storage})
        assert_same(rows_of(indexed(config)), rows)


def movies(**arrays: Any) -> Rows:
    return dict(arrays)


@pytest.mark.parametrize(
    ("rows", "options", "line"),
    [
        (movies(a=np.zeros((3, 4)), b=np.zeros((3, 5))), {}, "b.features.npy: got <f8 rows of 5"),
        (movies(a=np.zeros((3, 4), np.int32)), {}, "got <i4 [3, 4], want float16"),
        (movies(a=np.asfortranarray(np.ones((3, 4)))), {}, "got Fortran <f8 [3, 4]"),
        (movies(a=np.zeros((3, 4))), {"feature_key": "clip"}, "got clip for"),
        (movies(a=np.zeros(3)), {}, "fields of two axes: none"),
    ],
)
def test_unusable_arrays_are_reported_in_one_line(
    tmp_path: Path, rows: Rows, options: dict[str, Any], line: str
) -> None:
    write(tmp_path / "tars", rows)
    with pytest.raises((DataError, ConfigError)) as caught:
        index_tars(config_of(tmp_path, str(tmp_path / "tars"), **options))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_movie_in_two_tars_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "tars", make_rows(2))
    (tmp_path / "tars" / "more.tar").write_bytes((tmp_path / "tars" / "clip-000.tar").read_bytes())
    with pytest.raises(DataError, match="movie tt0000000 is stored twice"):
        index_tars(config_of(tmp_path, str(tmp_path / "tars")))


def test_a_feature_set_with_its_own_tars_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "tars", make_rows())
    config = config_of(tmp_path, str(tmp_path / "tars"))
    own = Manifest(kind="features", provenance={"dim": 4}, shards=())
    open_storage(config.features_dir).publish("manifest.json", own.to_bytes())
    with pytest.raises(DataError, match="a feature set with its own tars already exists"):
        publish_index(open_storage(config.features_dir), index_tars(config))


def test_tars_of_several_folders_are_refused(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a/x.tar\nb/y.tar\n")
    with pytest.raises(ConfigError, match="want one folder"):
        list_tars(str(names), StorageConfig())


def test_urls_with_secrets_are_refused_because_the_manifest_stores_them() -> None:
    for url in ("https://ada:5ec2et@host/f-{0..1}.tar", "https://host/a.tar?sig=5ec2et"):
        with pytest.raises(ConfigError, match=r"without password and query.*~/\.netrc") as caught:
            list_tars(url, StorageConfig())
        assert "5ec2et" not in str(caught.value)
