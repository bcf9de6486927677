"""The commands of ``movienet-train``: exit codes, screens and suggested commands."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from configs.load import dump_config
from eval import __main__ as evaluation
from tests.training.conftest import LENGTHS, MakeConfig, MakeFilms
from tests.training.launched import ROOT, TIMEOUT_S, attempt, command, run_alone, wait_for_step
from training import __main__ as training


def hinted(text: str, program: str) -> list[str]:
    """Return the arguments of the suggested command, as a shell would pass them."""
    match = re.search(rf"`{program} ([^`]+)`", text)
    assert match is not None, text
    return shlex.split(match[1])


@pytest.mark.slow
def test_an_interrupted_command_exits_with_75(make_config: MakeConfig) -> None:
    config = make_config("alone", training={"epochs": 500, "validate_epochs": 0})
    process = subprocess.Popen(command(config), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_step(config, 5)
    process.send_signal(signal.SIGUSR1)
    _, log = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 75
    last = log.splitlines()[-1]
    assert re.search(
        "stopped by SIGUSR1 at step .*, state saved; rerun the command to resume", last
    )
    assert attempt(config, 1)[0] == "interrupted"
    assert (config.run_dir / "learning_curve.png").is_file()


@pytest.mark.slow
def test_a_launch_of_worlds_of_one_is_refused_by_an_option(make_config: MakeConfig) -> None:
    done = run_alone(make_config(), "--expected-world-size", "2", "--quiet")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: expected_world_size: launched 1 rank, want 2; start them with"
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_finished_run_ends_with_its_map_and_a_report_command_that_works(
    make_config: MakeConfig,
    make_films: MakeFilms,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    origin = {"name": "test", "dedup": False}
    make_films(LENGTHS, folder=tmp_path / "features", origin=origin)
    config = make_config(stream={"features_url": str(tmp_path / "features")})
    file = config.run_dir.parent / "my config.yaml"
    file.write_text(dump_config(config))
    words = ["run", "--config", str(file), "training.epochs=2", "training.run_name=renamed"]
    assert training.main(words) == 0
    head, titles, holdout, val, following = capsys.readouterr().out.splitlines()
    assert head == f"{config.run_dir.with_name('renamed')}: 2 epochs, 8 steps"
    assert re.fullmatch(r"mAP +best \(epoch \d\) +last \(epoch 2\)", titles)
    assert re.fullmatch(r"holdout +\d\.\d{3} +\d\.\d{3}", holdout)
    assert re.fullmatch(r"val +\d\.\d{3} +\d\.\d{3}", val)
    report = hinted(following, "movienet-eval")
    assert report == ["report", "--config", str(file), *words[3:]]
    assert evaluation.main(report) == 0
    assert "renamed" in capsys.readouterr().out
    run = config.run_dir.with_name("renamed")
    assert (run / "learning_curve.png").is_file()
    assert training.main(["status", *words[1:]]) == 0
    head, epochs, best, last, *_ = capsys.readouterr().out.splitlines()
    assert (head, epochs) == (f"{run}: done, attempt 1", "epochs       2/2, step 8")
    assert re.fullmatch(r"best mAP     holdout \d\.\d{3}, val \d\.\d{3} \(epoch \d\)", best)
    assert last == "checkpoint   last: epoch 2, step 8"


@pytest.mark.slow
def test_the_hint_of_an_export_without_a_checkpoint_trains_the_run(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(training={"epochs": 1})
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    export = ["export", str(config.run_dir)]
    assert training.main(export) == 1
    assert training.main(hinted(capsys.readouterr().err, "movienet-train")) == 0
    assert training.main(export) == 0


def test_a_folder_without_a_run_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(["export", str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {tmp_path}: no run, want the folder of a run"


@pytest.mark.parametrize("name", sorted(training.commands.commands))
def test_the_help_of_each_command_has_an_example_and_fits_80_columns(name: str) -> None:
    text = CliRunner().invoke(training.commands, [name, "--help"], terminal_width=80).output
    assert f"Example: movienet-train {name} " in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.slow
def test_a_start_names_the_run_before_slow_imports_and_announces_long_steps(
    make_config: MakeConfig,
) -> None:
    config = make_config(training={"epochs": 1})
    log = run_alone(config, PYTHONPROFILEIMPORTTIME="1").stderr
    imports = [(match[1], match.start()) for match in re.finditer(r"\| +(\w+)(?:\.[\w.]+)?\n", log)]
    torch = next(position for module, position in imports if module == "torch")
    first = f"{config.run_dir}: `movienet-train run --config "
    steps = ("opening", "measuring", "checking MaskedLSTM on two movies", "starting at epoch 0")
    positions = [log.index(first), torch, *(log.index(step) for step in steps)]
    assert positions == sorted(positions)
    before_training = {module for module, position in imports if position < positions[-1]}
    assert not before_training & {"sklearn", "scipy", "matplotlib", "open_clip", "torchvision"}
    assert Path(config.run_dir / "metrics.jsonl").is_file()
