from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from configs.errors import DataError
from sharding.format.encoding import canonical_json, npy_bytes, npz_arrays, npz_bytes
from sharding.format.index import FeatureIndex, FrameIndex
from sharding.format.manifest import Manifest, ManifestShard, Rejected, Sidecar
from sharding.format.names import array_list, movie_id, movie_name, shard_name
from sharding.format.plan import Plan, PlannedMovie
from tests.sharding.films import is_silent_or_one_line

counts = st.integers(0, 2**40)
texts = st.text(max_size=20)
ids = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
mappings = st.dictionaries(texts, json_values, max_size=3)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    names = sorted(draw(st.sets(ids, max_size=8)))
    shard, movies = 0, []
    for k, name in enumerate(names):
        shard += draw(st.booleans()) if k else 0
        rest = draw(st.tuples(texts, texts, texts, st.none() | counts, counts))
        movies.append(PlannedMovie(name, *rest, shard=shard))
    return Plan(draw(st.integers(1, 2**40)), tuple(movies))


sidecars = st.builds(
    Sidecar,
    name=texts,
    n_bytes=counts,
    sha256=digests,
    samples=counts,
    movies=st.lists(ids, max_size=4).map(tuple),
    made_from=digests,
    index=st.none() | digests,
    statistics=mappings,
    rejected=st.lists(st.builds(Rejected, texts, texts, texts), max_size=3).map(tuple),
    information=mappings,
)
manifest_shards = st.builds(
    ManifestShard, texts, counts, digests, counts, counts, st.none() | digests
)
manifests = st.builds(
    Manifest,
    kind=st.sampled_from(["frames", "features"]),
    provenance=mappings,
    shards=st.lists(manifest_shards, max_size=4).map(tuple),
    index=st.none() | digests,
    parent=st.none() | digests,
    renamed=st.dictionaries(texts, texts, max_size=2),
)


@given(plans())
def test_a_plan_comes_back_from_its_bytes(plan: Plan) -> None:
    assert Plan.from_bytes(plan.to_bytes(), "plan") == plan


@given(sidecars)
def test_a_sidecar_comes_back_from_its_bytes(sidecar: Sidecar) -> None:
    assert Sidecar.from_bytes(sidecar.to_bytes(), "sidecar") == sidecar


@given(manifests)
def test_a_manifest_comes_back_from_its_bytes_with_the_same_digest(manifest: Manifest) -> None:
    again = Manifest.from_bytes(manifest.to_bytes(), "manifest")
    assert again == manifest
    assert again.digest == manifest.digest


@given(st.integers(0, 20), st.integers(0, 2**16))
def test_a_frame_index_comes_back_from_its_bytes(n: int, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 2**15, (5, n))
    dtypes: list[Any] = [np.uint64, np.uint32, np.uint32, np.int32, np.int16]
    index = FrameIndex(*(row.astype(dtype) for row, dtype in zip(raw, dtypes, strict=True)))
    again = FrameIndex.from_bytes(index.to_bytes(), "index")
    for name in ("offset", "size", "movie", "shot", "image"):
        np.testing.assert_array_equal(getattr(again, name), getattr(index, name), strict=True)


@given(st.lists(ids, max_size=6))
def test_a_feature_index_comes_back_from_its_bytes(movies: list[str]) -> None:
    n = np.arange(len(movies))
    names = np.array([movie.encode() for movie in movies], dtype=np.bytes_)
    index = FeatureIndex(
        names, n.astype(np.uint32), (n * 2**33).astype(np.uint64), n.astype(np.uint32)
    )
    again = FeatureIndex.from_bytes(index.to_bytes(), "index")
    assert again.movies == tuple(movies)
    np.testing.assert_array_equal(again.offset, index.offset, strict=True)
    wide = FeatureIndex(names.astype("S99"), index.shard, index.offset, index.rows)
    assert wide.to_bytes() == index.to_bytes()


@given(plans(), st.data())
def test_a_plan_cut_anywhere_is_told_by_name(plan: Plan, data: st.DataObject) -> None:
    whole = plan.to_bytes()
    cut = whole[: data.draw(st.integers(0, len(whole) - 2))]
    with pytest.raises(DataError, match=r"^here/plan\.json: "):
        Plan.from_bytes(cut, "here/plan.json")


@given(st.data())
def test_an_index_with_any_byte_changed_is_told_or_the_same(data: st.DataObject) -> None:
    n = np.arange(4)
    index = FrameIndex(
        n.astype(np.uint64),
        n.astype(np.uint32),
        n.astype(np.uint32),
        n.astype(np.int32),
        n.astype(np.int16),
    )
    damaged = bytearray(index.to_bytes())
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))

    def read() -> None:
        again = FrameIndex.from_bytes(bytes(damaged), "index")
        np.testing.assert_array_equal(again.offset, index.offset)

    assert is_silent_or_one_line(read)


def test_a_manifest_edited_by_hand_is_refused() -> None:
    data = Manifest("frames", {}, ()).to_bytes()
    with pytest.raises(DataError, match="edited by hand"):
        Manifest.from_bytes(data.replace(b'"shards":0', b'"shards":1'), "m")


def test_another_version_of_a_form_is_refused() -> None:
    data = Plan(1, ()).to_bytes().replace(b'"format":1', b'"format":2')
    with pytest.raises(DataError, match="format: got 2, want 1"):
        Plan.from_bytes(data, "plan")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("b", 0), ("a", 0)], "order of id"),
        ([("a", 0), ("a", 0)], "order of id"),
        ([("a", 1)], "shard numbers"),
        ([("a", 0), ("b", 2)], "shard numbers"),
        ([("a.b", 0)], "movie id"),
    ],
)
def test_a_plan_out_of_order_is_refused(rows: list[tuple[str, int]], message: str) -> None:
    movies = tuple(PlannedMovie(movie, movie, movie, "", 1, 1, shard) for movie, shard in rows)
    with pytest.raises(DataError, match=message):
        Plan.from_bytes(Plan(1, movies).to_bytes(), "plan")


def test_a_manifest_has_one_line_a_shard_and_sorted_keys() -> None:
    shard = ManifestShard("frames-00000.tar", 10_240, "00", 3, 1, None)
    lines = Manifest("frames", {"b": 1, "a": 2}, (shard, shard)).to_bytes().decode().splitlines()
    wanted = (
        '{"bytes":10240,"index":null,"movies":1,"name":"frames-00000.tar",'
        '"samples":3,"sha256":"00"}'
    )
    assert [line.rstrip(",") for line in lines if "frames-" in line] == [wanted, wanted]
    assert '"provenance":{"a":2,"b":1},' in lines
    assert lines[-1] == "}"


@given(json_values)
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: object) -> None:
    text = canonical_json(value)
    assert text.isascii()
    assert canonical_json(json.loads(text)) == text


@given(hnp.arrays(st.sampled_from(["<f2", ">f4", "u1", "i8", "S3"]), hnp.array_shapes(max_dims=2)))
def test_numpy_reads_our_npy_and_we_write_little_endian(array: np.ndarray) -> None:
    again = np.load(io.BytesIO(npy_bytes(array)))
    np.testing.assert_array_equal(again, array)
    assert again.dtype.str == array.dtype.newbyteorder("<").str


def test_our_npy_of_a_feature_array_is_byte_for_byte_numpys() -> None:
    array = np.arange(12_129 * 4, dtype=np.float16).reshape(-1, 4)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0))
    assert npy_bytes(array) == buffer.getvalue()


def test_an_npz_holds_no_time_and_misses_are_told_by_name() -> None:
    data = npz_bytes({"a": np.arange(3)})
    assert data == npz_bytes({"a": np.arange(3)})
    with pytest.raises(DataError, match=r"here: .*b"):
        npz_arrays(data, "here", ["b"])


@given(texts.filter(bool))
def test_a_name_comes_back_from_its_id(name: str) -> None:
    try:
        written = movie_id(name)
    except DataError:
        return
    assert written == name or movie_name(written) == name


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("tt0032138", "tt0032138"),
        ("a.b", "x_a_2eb"),
        ("Amélie 2001", "x_Am_c3_a9lie_202001"),
        ("..", "x__2e_2e"),
        ("a_b c", "x_a_5fb_20c"),
    ],
)
def test_names_that_are_no_ids_are_mapped(name: str, written: str) -> None:
    assert movie_id(name) == written


@pytest.mark.parametrize("name", ["", "a" * 65, "é" * 20])
def test_a_name_that_gives_no_id_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="rename its source"):
        movie_id(name)


@given(st.sets(st.integers(0, 40)))
def test_an_array_list_names_just_these_numbers(numbers: set[int]) -> None:
    named: list[int] = []
    for part in filter(None, array_list(numbers).split(",")):
        first, _, last = part.partition("-")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(numbers)


def test_an_array_list_is_short() -> None:
    assert array_list([7, 1, 0, 2, 9]) == "0-2,7,9"
    assert shard_name("frames", 7) == "frames-00007"
