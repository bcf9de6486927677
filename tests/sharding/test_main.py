"""The commands of sharding, their output and their exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sharding.__main__ import main
from sharding.features import open_features
from sharding.format.names import MANIFEST
from sharding.frames import open_frames
from sharding.storage.local import DiskStorage
from sharding.verify import verify_features, verify_frames
from tests.sharding.conftest import Run
from tests.sharding.feature_sets import make_features
from tests.sharding.films import build_all, film, flip, jpeg, write_dump, write_folder, write_tar

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    write_dump(tmp_path / "dump")
    (tmp_path / "meta.json").write_text(json.dumps({f"tt{k:07d}": ["War"] for k in range(5)}))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"version: 1\ndata:\n  dump: {tmp_path}/dump\n  root: {tmp_path}/root\n"
        f"  metadata: {tmp_path}/meta.json\n  genres: [Drama, War]\n"
        "sharding: {shard_bytes: 6000}\nencoder: {name: x}\ntraining: {run_name: x}\n"
        "tracking: {wandb: 'off'}\n"
    )

    def call(*args: str) -> tuple[int, str, str]:
        code = main([*args, "--config", str(config)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_build_alone_plans_builds_and_seals(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("build")
    assert (code, out[:42]) == (0, "sealed: movies 5   images 42   shards 3   ")
    assert open_frames(str(tmp_path / "root" / "frames")).n_shards == 3
    assert run("verify")[:2] == (0, f"{tmp_path}/root/frames: ok\n")
    assert re.match(r"shards 3 of 3 done   (.*) of \1   sealed$", run("status")[1].splitlines()[1])


def test_tasks_build_the_set_together_and_the_last_one_seals(run: Run, tmp_path: Path) -> None:
    assert "shards 1 of 3 done" in run("build", "--task", "0/2")[1] + run("status")[1]
    code, _, err = run("seal")
    assert code == 1
    assert "of 3 frame shards are missing; run `movienet-shard build --config" in err
    assert " on Slurm --array=" in err
    assert run("build", "--task", "1/2")[1].startswith("sealed: ")
    alone = DiskStorage(tmp_path / "alone")
    build_all(alone, tmp_path / "dump")
    shared = DiskStorage(tmp_path / "root" / "frames")
    assert all(shared.read(name) == alone.read(name) for name in alone.names())


def test_one_shard_is_built_by_name_or_number(run: Run) -> None:
    assert run("build", "--only", "frames-00001")[1] == "shards 1 of 3 done\n"
    assert run("build", "--only", "2")[1] == "shards 2 of 3 done\n"
    code, _, err = run("build", "--only", "frames-00007")
    assert (code, err.splitlines()[-1]) == (
        2,
        "error: --only: no shard 'frames-00007'; the set has frames-00000 to frames-00002",
    )


def test_another_shard_size_is_refused_until_the_plan_is_replaced(run: Run) -> None:
    run("build")
    for command in ("build", "plan"):
        code, _, err = run(command, "sharding.shard_bytes=9000")
        assert code == 1
        assert "`movienet-shard plan --replace --config" in err.splitlines()[-1]
    assert run("plan", "--replace", "sharding.shard_bytes=9000")[0] == 0
    code, _, err = run("build", "sharding.shard_bytes=9000")
    assert code == 1
    assert "`movienet-shard build --replace --config" in err
    assert run("build", "--replace", "sharding.shard_bytes=9000")[0] == 0
    assert run("verify", "sharding.shard_bytes=9000")[0] == 0  # the third shard was removed


def test_a_printed_command_can_be_pasted_with_the_users_config_and_overrides(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def paste(text: str) -> str:
        """Run the last command that ``text`` contains in backticks; return its output."""
        program, *arguments = shlex.split(re.findall("`(.*?)`", text)[-1])
        assert (program, main(arguments)) == ("movienet-shard", 0)
        return capsys.readouterr().out

    options = ("sharding.shard_bytes=9000", f"data.root={tmp_path}/my root")
    assert paste(run("plan", *options)[1]).startswith("sealed: movies 5 ")
    write_tar(tmp_path / "dump", "tt9", film("tt9"))
    _, _, error = run("plan", *options)
    assert "to add only new movies" in error
    after_extension = paste(error)
    assert after_extension.startswith("movies 6 ")
    assert paste(after_extension).startswith("sealed: movies 6 ")
    assert run("status", *options)[0] == 0


COMMANDS = (
    "build", "check", "demo", "import-features", "index-tars", "plan", "presets", "relabel",
    "seal", "status", "verify",
)  # fmt: skip


def test_help_fits_80_columns_and_shows_a_summary_and_an_example_per_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    listed = overview.partition("Commands:")[2]
    lines = listed.split("\n")[1:-1]
    assert [line.split()[0] for line in lines] == list(COMMANDS)  # one line per command
    assert all(line.endswith(".") for line in lines)
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        arguments = "movienet" if command == "presets" else "--config FILE"
        assert f"Example: movienet-shard {command} {arguments}" in " ".join(text.split())
        assert max(map(len, (overview + text).splitlines())) <= 80


def test_shards_beyond_the_plan_are_refused_or_removed_with_replace(
    run: Run, tmp_path: Path
) -> None:
    run("build")
    data = {path.name: path.read_bytes() for path in (tmp_path / "root" / "frames").iterdir()}
    for suffix in ("tar", "json", "index.npz"):
        old = tmp_path / "root" / "frames" / f"frames-00002.{suffix}"
        old.with_name(f"frames-00003.{suffix}").write_bytes(old.read_bytes())
    code, _, err = run("build")
    assert (code, "got frames-00003.json, want 3 shards" in err.splitlines()[-1]) == (1, True)
    assert run("build", "--replace")[0] == 0
    assert data == {p.name: p.read_bytes() for p in (tmp_path / "root" / "frames").iterdir()}


def test_status_does_not_count_shards_of_an_older_plan(run: Run, tmp_path: Path) -> None:
    run("build")
    write_folder(tmp_path / "dump", "tt0000004", {"shot_0009_img_0.jpg": jpeg("new")})
    assert run("plan", "--replace")[0] == 0
    code, out, _ = run("status")
    assert code == 1
    assert re.match(r"shards 2 of 3 done   .* of .*   not sealed$", out.splitlines()[1])


def test_status_exits_with_0_once_all_shards_are_done_and_the_set_is_sealed(
    run: Run, tmp_path: Path
) -> None:
    assert run("status")[0] == 1, "there is no plan"
    run("build", "--task", "0/2")
    assert run("status")[0] == 1
    run("build", "--task", "1/2")
    assert run("status")[0] == 0
    (tmp_path / "root" / "frames" / MANIFEST).unlink()
    code, out, _ = run("status")
    assert (code, out.splitlines()[1].startswith("shards 3 of 3 done ")) == (1, True)
    assert out.splitlines()[2].startswith("next: `movienet-shard seal --config")
    run("seal")
    (tmp_path / "root" / "frames" / "frames-00001.json").unlink()
    code, out, _ = run("status")
    assert (code, out.splitlines()[1].startswith("shards 2 of 3 done ")) == (1, True)
    assert out.splitlines()[2].startswith("missing --array=1; next: `movienet-shard build --config")


def test_verify_reports_problems_and_exits_with_1(run: Run, tmp_path: Path) -> None:
    run("build")
    path = tmp_path / "root" / "frames" / "frames-00001.tar"
    path.write_bytes(flip(path.read_bytes(), 700))
    code, out, _ = run("verify")
    assert code == 1
    assert out.splitlines()[-1].endswith("frames: 1 problems")


def test_relabel_writes_only_the_labels(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    make_features(DiskStorage(folder), 5)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    split = tmp_path / "split.json"
    split.write_text('{"val": ["tt0000001", "tt0000003"]}')
    code, out, _ = run("relabel", "--features", str(folder), "--split", str(split))
    assert (code, out[:41]) == (0, "train 0   val 2   test 0   in no split 3 ")
    changed = [path.name for path in folder.iterdir() if before[path.name] != path.read_bytes()]
    assert changed == ["labels.npz"]
    features = open_features(str(folder))
    assert features.labels.movies("val").tolist() == [1, 3]
    assert features.labels.hot_MG.tolist() == [[0, 1]] * 5
    (folder / "labels.npz").unlink()
    assert run("relabel", "--features", str(folder))[0] == 0
    assert verify_features(DiskStorage(folder)) == []
    assert run("verify", "--features", str(folder))[0] == 0


def test_a_shard_beyond_the_file_size_limit_is_reported_in_one_line_and_leaves_no_file(
    run: Run, tmp_path: Path
) -> None:
    write_tar(tmp_path / "dump", "tt9", film("tt9", shots=40, size=3_000))
    command = f"{sys.executable} -m sharding build --config {tmp_path}/config.yaml"
    limited = ["bash", "-c", f"ulimit -f 100; exec {command}"]  # files of at most 100 KiB
    done = subprocess.run(limited, cwd=CHECKOUT, check=False, capture_output=True, text=True)
    frames = tmp_path / "root" / "frames"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {frames}/frames-00003.tar: File too large"
    assert not [path.name for path in frames.iterdir() if "00003" in path.name]
    assert run("build")[1].startswith("sealed: movies 6")


def test_nothing_is_sealed_or_verified_before_it_is_built(run: Run) -> None:
    for command in ("seal", "status", "verify"):
        code, _, err = run(command)
        assert code == 1
        assert err.splitlines()[-1].startswith("error: ")


def test_a_set_can_be_moved_to_another_folder(run: Run, tmp_path: Path) -> None:
    run("build")
    shutil.move(tmp_path / "root" / "frames", tmp_path / "moved")
    assert verify_frames(DiskStorage(tmp_path / "moved")) == []


@pytest.fixture
def latin1(tmp_path: Path) -> dict[str, str]:
    """Environment of a locale in which file names are not UTF-8."""
    folder = tmp_path / "locales"
    folder.mkdir()
    made = ["localedef", "-c", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US")]
    if shutil.which("localedef") is None or subprocess.run(made, check=False).returncode:
        pytest.skip("no locale sources")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US"}


def test_films_have_the_same_ids_in_every_locale(tmp_path: Path, latin1: dict[str, str]) -> None:
    names = ["café".encode(), "café".encode("latin-1"), "日本".encode()]
    for name in names:
        write_folder(tmp_path / "dump", os.fsdecode(name), film("x"))
    plans = []
    for place, locale in (("a", {"LC_ALL": "C.UTF-8"}), ("b", latin1)):
        words = [
            f"data.{key}={tmp_path / path}" for key, path in (("dump", "dump"), ("root", place))
        ]
        done = subprocess.run(
            [sys.executable, "-m", "sharding", "plan", "--config", "demo", *words],
            env={**os.environ, **locale},
            capture_output=True,
            check=False,
            cwd=CHECKOUT,
        )
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
        plans.append((tmp_path / place / "frames/plan.json").read_bytes())
    assert plans[0] == plans[1]
    movies = json.loads(plans[0])["movies"]
    assert [each["movie"] for each in movies] == ["x__e6_97_a5_e6_9c_ac", "x_caf_c3_a9", "x_caf_e9"]


def test_a_check_in_another_locale_prints_every_name(
    tmp_path: Path, latin1: dict[str, str]
) -> None:
    for name in ("café", os.fsdecode(b"caf\xe9"), "日本"):
        write_folder(tmp_path / "dump", name, film("x"))
    (tmp_path / "dump/日本.txt").touch()
    words = [f"data.dump={tmp_path}/dump", f"data.root={tmp_path}/root"]
    for locale in ({"LC_ALL": "C.UTF-8"}, latin1):
        done = subprocess.run(
            [sys.executable, "-m", "sharding", "check", "--config", "demo", *words],
            env={**os.environ, **locale},
            capture_output=True,
            check=False,
            cwd=CHECKOUT,
        )
        assert done.returncode in (3, 4)
        assert b"Traceback" not in done.stderr
