"""The shards do not depend on the form in which the movies were delivered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sharding.dump.deliveries import (
    MOVIES,
    Movies,
    all_levels,
    deflated_zip,
    doubled,
    folder_of_zip_parts,
    gzipped_tars,
    gzips_in_parts,
    mixed_up_zip,
    mixture,
    one_tar,
    plain,
    published,
    several_zips,
    tar_in_parts,
    tars,
    zip_in_folder,
    zip_in_parts,
    zip_of_deflated_tars,
    zip_of_doubled,
    zip_of_gzipped_tars,
    zip_of_images,
    zip_of_tars,
)
from tests.sharding.films import jpeg

FORMS: list[Callable[[Path, Movies], Path]] = [
    plain, doubled, all_levels, tars, gzipped_tars, gzips_in_parts, mixture, zip_in_folder,
    several_zips, zip_of_images, zip_of_doubled, deflated_zip, mixed_up_zip, zip_of_tars,
    zip_of_deflated_tars, zip_of_gzipped_tars, zip_in_parts, folder_of_zip_parts, one_tar,
    tar_in_parts,
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_delivery_gives_the_same_bytes(
    tmp_path: Path, form: Callable[[Path, Movies], Path]
) -> None:
    expected = published(plain(tmp_path / "plain", MOVIES))
    assert len(expected) > 5
    dump = form(tmp_path / "form", MOVIES)
    files = sorted(tmp_path.rglob("*"))
    assert published(dump) == expected
    assert sorted(tmp_path.rglob("*")) == files, "something was unpacked"


@settings(max_examples=12)
@given(
    st.dictionaries(
        st.from_regex(r"tt[0-9]{1,3}", fullmatch=True),
        st.dictionaries(
            st.tuples(st.integers(0, 12), st.integers(0, 3)), st.integers(10, 900), min_size=1
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([zip_of_images, deflated_zip, zip_of_tars, zip_of_deflated_tars, one_tar]),
    st.integers(1, 4_000),
)
def test_random_movies_give_the_same_bytes_in_any_form(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: dict[str, dict[tuple[int, int], int]],
    form: Callable[[Path, Movies], Path],
    shard_bytes: int,
) -> None:
    movies = {
        movie: {f"shot_{s:04d}_img_{i}.jpg": jpeg((s, i), size) for (s, i), size in rows.items()}
        for movie, rows in sizes.items()
    }
    root = tmp_path_factory.mktemp("form")
    expected = published(tars(root / "tars", movies), shard_bytes)
    assert published(form(root / "form", movies), shard_bytes) == expected
    assert published(plain(root / "plain", movies), shard_bytes) == expected
