"""Extension of a sealed set by new movies."""

from __future__ import annotations

from pathlib import Path

import pytest

from sharding.format.manifest import Manifest
from sharding.frames import open_frame_storage
from sharding.storage.local import DiskStorage
from tests.sharding.conftest import Run, contents
from tests.sharding.films import film, write_tar

pytestmark = pytest.mark.slow


def test_new_movies_become_new_shards_after_the_old_ones(run: Run, tmp_path: Path) -> None:
    frames = tmp_path / "root" / "frames"
    assert run("build")[0] == 0
    before, stats = contents(frames), {p.name: p.stat() for p in frames.glob("frames-*")}
    parent = open_frame_storage(DiskStorage(frames)).digest
    assert "\nunchanged: " in run("plan", "--extend")[1]
    assert contents(frames) == before

    # Its name sorts between the old movies.
    write_tar(tmp_path / "dump", "tt0000000x", film("new"))
    code, _, err = run("plan")
    line = err.splitlines()[-1]
    assert (code, "`movienet-shard plan --extend --config" in line) == (1, True)
    assert "\nwrote " in run("plan", "--extend")[1]
    assert run("build")[1].startswith("sealed: movies 13 ")
    after = open_frame_storage(DiskStorage(frames))
    assert after.manifest.parent == parent
    old = Manifest.from_bytes(before["manifest.json"], "manifest")
    assert after.manifest.shards[: len(old.shards)] == old.shards
    assert after.shard_movies(len(old.shards)) == ("tt0000000x",)
    for name, stat in stats.items():
        assert (frames / name).stat() == stat
    assert run("verify")[0] == 0
    assert "\nunchanged: " in run("plan")[1]


def test_an_excluded_truncated_movie_is_added_once_it_is_intact(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "dump" / "tt000000x.tar"
    write_tar(tmp_path / "dump", "tt000000x", film("new"))
    intact = path.read_bytes()
    path.write_bytes(intact[:1400])
    code, _, err = run("build")
    assert (code, "continue without it: data.exclude=[tt000000x]" in err) == (1, True)
    assert run("build", "data.exclude=[tt000000x]")[1].startswith("sealed: movies 12 ")
    path.write_bytes(intact)
    assert "\nwrote " in run("plan", "--extend")[1]
    assert run("build")[1].startswith("sealed: movies 13 ")


def test_an_extension_is_refused_if_an_old_movie_changed_or_the_set_is_not_sealed(
    run: Run, tmp_path: Path
) -> None:
    code, _, err = run("plan", "--extend")
    assert (code, "no sealed frame set to extend" in err) == (1, True)
    assert run("build")[0] == 0
    write_tar(tmp_path / "dump", "tt0000001", film("other"), mtime=10**18 + 1)
    code, _, err = run("plan", "--extend")
    assert (code, "1 movies changed since they were planned (tt0000001, …)" in err) == (1, True)
