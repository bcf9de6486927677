"""New movies become a part of a sealed set."""

from __future__ import annotations

from pathlib import Path

from sharding.format.manifest import Manifest
from sharding.frames import open_frame_storage
from sharding.storage.local import DiskStorage
from tests.sharding.conftest import Run, contents
from tests.sharding.films import film, write_tar


def test_new_movies_become_a_part_behind_the_old_shards(run: Run, tmp_path: Path) -> None:
    frames = tmp_path / "root" / "frames"
    assert run("build")[0] == 0
    before, stats = contents(frames), {p.name: p.stat() for p in frames.glob("frames-*")}
    parent = open_frame_storage(DiskStorage(frames)).digest
    assert run("plan", "--extend")[1].splitlines()[-1].startswith("unchanged: ")
    assert contents(frames) == before

    write_tar(tmp_path / "dump", "tt0000000x", film("new"))  # among the old ones by its name
    code, _, err = run("plan")
    assert (code, "plan --extend to add" in err.splitlines()[-1]) == (1, True)
    assert run("plan", "--extend")[1].splitlines()[-1].startswith("wrote ")
    assert run("build")[1].startswith("sealed: movies 13 ")
    after = open_frame_storage(DiskStorage(frames))
    assert after.manifest.parent == parent
    old = Manifest.from_bytes(before["manifest.json"], "manifest")
    assert after.manifest.shards[: len(old.shards)] == old.shards
    assert after.shard_movies(len(old.shards)) == ("tt0000000x",)
    for name, stat in stats.items():
        assert (frames / name).stat() == stat
    assert run("verify")[0] == 0
    assert run("plan")[1].splitlines()[-1].startswith("unchanged: ")


def test_a_damaged_movie_is_left_out_and_comes_as_a_part_once_it_is_whole(
    run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "dump" / "tt000000x.tar"
    write_tar(tmp_path / "dump", "tt000000x", film("new"))
    whole = path.read_bytes()
    path.write_bytes(whole[:1400])
    code, _, err = run("build")
    assert (code, "continue without it: data.exclude=[tt000000x]" in err) == (1, True)
    assert run("build", "data.exclude=[tt000000x]")[1].startswith("sealed: movies 12 ")
    path.write_bytes(whole)
    assert run("plan", "--extend")[1].splitlines()[-1].startswith("wrote ")
    assert run("build")[1].startswith("sealed: movies 13 ")


def test_a_part_is_refused_where_an_old_movie_changed_or_nothing_is_sealed(
    run: Run, tmp_path: Path
) -> None:
    code, _, err = run("plan", "--extend")
    assert (code, "no sealed frame set to extend" in err) == (1, True)
    assert run("build")[0] == 0
    write_tar(tmp_path / "dump", "tt0000001", film("other"), mtime=10**18 + 1)
    code, _, err = run("plan", "--extend")
    assert (code, "1 movies changed since they were planned (tt0000001, …)" in err) == (1, True)
