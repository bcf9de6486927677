from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError
from sharding.format.manifest import Manifest, ManifestShard, Rejected, Sidecar
from tests.damage import damaged, reads_or_reports
from tests.sharding.format.values import counts, ids, json_values, texts

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
mappings = st.dictionaries(texts, json_values, max_size=3)
sidecars = st.builds(
    Sidecar,
    name=texts,
    n_bytes=counts,
    sha256=digests,
    samples=counts,
    movies=st.lists(ids, max_size=4).map(tuple),
    input_digest=digests,
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


@given(sidecars)
def test_a_sidecar_is_restored_from_its_bytes(sidecar: Sidecar) -> None:
    assert Sidecar.from_bytes(sidecar.to_bytes(), "sidecar") == sidecar


@given(manifests)
def test_a_manifest_is_restored_from_its_bytes_with_the_same_digest(manifest: Manifest) -> None:
    restored = Manifest.from_bytes(manifest.to_bytes(), "manifest")
    assert restored == manifest
    assert restored.digest == manifest.digest


def test_a_manifest_edited_by_hand_is_refused() -> None:
    data = Manifest("frames", {}, ()).to_bytes()
    with pytest.raises(DataError, match="edited by hand"):
        Manifest.from_bytes(data.replace(b'"shards":0', b'"shards":1'), "m")


def test_a_manifest_has_one_line_per_shard_and_sorted_keys() -> None:
    shard = ManifestShard("frames-00000.tar", 10_240, "00", 3, 1, None)
    lines = Manifest("frames", {"b": 1, "a": 2}, (shard, shard)).to_bytes().decode().splitlines()
    expected = (
        '{"bytes":10240,"index":null,"movies":1,"name":"frames-00000.tar",'
        '"samples":3,"sha256":"00"}'
    )
    assert [line.rstrip(",") for line in lines if "frames-" in line] == [expected, expected]
    assert '"provenance":{"a":2,"b":1},' in lines
    assert lines[-1] == "}"


@given(sidecars, manifests, st.data())
def test_damaged_sidecars_and_manifests_are_read_or_a_one_line_error(
    sidecar: Sidecar, manifest: Manifest, data: st.DataObject
) -> None:
    for kind, content in ((Sidecar, sidecar.to_bytes()), (Manifest, manifest.to_bytes())):
        corrupt = data.draw(damaged(content))
        assert reads_or_reports(partial(kind.from_bytes, corrupt, "x.json"))
