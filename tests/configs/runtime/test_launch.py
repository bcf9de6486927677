"""Real processes, real signals: two ranks of ``two_ranks.py`` with gloo on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.errors import ConfigError, MachineError
from configs.runtime.launch import DistributedContext, default_threads, start
from configs.runtime.world import World, world_from_environment
from tests import forked
from tests.configs.runtime.launchers import launcher_rows, rank_environment
from tests.sharding.servers import free_port

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("two_ranks.py")
ACCELERATE = Path(sys.executable).with_name("accelerate-launch")
TWO_RANKS = ["--config_file", str(ROOT / "configs" / "accelerate" / "cpu-2.yaml")]
LAUNCHERS = launcher_rows()
LAUNCHER_NAMES = [
    *{name for _, names in LAUNCHERS.values() for name in names},
    *("ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION"),
    *("ACCELERATE_DYNAMO_BACKEND", "SLURM_NTASKS"),
]


def environment(home: Path, **more: str) -> dict[str, str]:
    """Environment without the user's Accelerate settings, with one thread per rank."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    for name in LAUNCHER_NAMES:
        inherited.pop(name, None)
    own = {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return inherited | own | more


@contextmanager
def launched(out: Path, *options: str, pause: float = 0.0) -> Iterator[subprocess.Popen[bytes]]:
    """Start two ranks in a new process group, under a launcher that ignores SIGUSR1."""
    out.mkdir(parents=True, exist_ok=True)
    command = [str(ACCELERATE), *TWO_RANKS, str(SCRIPT), str(out), *options]
    with (out / "log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", "-c", "trap '' USR1; exec \"$@\"", "-", *command, "--pause", str(pause)],
            env=environment(out),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pid in pids(out):
            if running(pid):
                os.kill(pid, signal.SIGKILL)


def finish(out: Path, *options: str) -> None:
    with launched(out, *options) as process:
        code = process.wait(timeout=300)
    assert code == 0, (out / "log").read_text()


def finish_by(launcher: str, out: Path, **more: str) -> None:
    """Run two ranks with nothing but the variables of a launcher of the README."""
    port = {"MASTER_PORT": str(free_port())}
    ranks = [
        environment(out, **(rank_environment(launcher, rank) | port | more)) for rank in range(2)
    ]
    done = forked.run_world([str(SCRIPT), str(out)], folder=out, ranks=ranks)
    assert done.returncode == 0, done.stderr


def pids(out: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(out.glob("pid-?"))]


def running(pid: int) -> bool:
    try:
        return "two_ranks" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not (out / "step").exists() or int((out / "step").read_text()) < step:
        assert time.monotonic() < deadline, (out / "log").read_text()
        time.sleep(0.05)


def results(out: Path, size: int = 2) -> list[dict[str, Any]]:
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(size)]


def attempt(out: Path, number: int) -> tuple[str, int | None, str]:
    record = json.loads((out / f"attempt-{number}.json").read_text())
    return record["outcome"], record["step"], record["message"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two-ranks")
    finish(out, "--expected-world-size", "2")
    return out


@pytest.mark.slow
def test_two_ranks_end_with_equal_weights_and_exchange_values(uninterrupted: Path) -> None:
    first, second = results(uninterrupted)
    assert first["weights"] == second["weights"]
    assert [(r["rank"], r["size"], r["device"]) for r in (first, second)] == [
        (0, 2, "cpu"),
        (1, 2, "cpu"),
    ]
    assert first["sum"] == second["sum"] == [2.0, 1.0]
    assert first["gathered"] == second["gathered"] == [[0], [1]]
    assert attempt(uninterrupted, 1) == ("done", 20, "")
    log = (uninterrupted / "log").read_text()
    assert "Warning" not in log, log
    assert set(LAUNCHERS["Accelerate"][1]) <= set(first["variables"])


@pytest.mark.slow
def test_one_rank_without_a_launcher_takes_the_same_steps(
    uninterrupted: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), str(tmp_path)]
    subprocess.run(command, env=environment(tmp_path), check=True)
    alone, two = results(tmp_path, 1)[0], results(uninterrupted)[0]
    assert (alone["rank"], alone["size"], alone["device"]) == (0, 1, "cpu")
    for one, other in zip(alone["weights"], two["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_all_ranks_at_the_same_step_and_the_next_attempt_resumes(
    uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with launched(tmp_path, pause=0.1) as process:
        wait_for_step(tmp_path, 3)
        if number is signal.SIGUSR1:
            # Like Slurm: signal every process of the step, including the launcher.
            for pid in (process.pid, *pids(tmp_path)):
                os.kill(pid, number)
        else:
            process.terminate()
        code = process.wait(timeout=240)
    # Exit code 75 does not pass through the launcher. The attempt contains the outcome.
    assert code not in (0, 75)
    first, second = results(tmp_path)
    assert first["step"] == second["step"] < 20
    assert first["weights"] == second["weights"]
    assert attempt(tmp_path, 1) == ("interrupted", first["step"], number.name)
    assert not any(running(pid) for pid in pids(tmp_path))

    finish_by("DeepSpeed" if number is signal.SIGTERM else "Slurm", tmp_path)
    assert attempt(tmp_path, 2) == ("done", 20, "")
    assert [r["weights"] for r in results(tmp_path)] == [
        r["weights"] for r in results(uninterrupted)
    ]


@pytest.mark.slow
def test_one_killed_rank_ends_the_others_and_the_next_attempt_resumes_from_the_checkpoint(
    uninterrupted: Path, tmp_path: Path
) -> None:
    with launched(tmp_path, pause=0.1) as process:
        wait_for_step(tmp_path, 7)
        killed = int((tmp_path / "pid-1").read_text())
        os.kill(killed, signal.SIGKILL)
        code = process.wait(timeout=240)
    assert code != 0
    assert not any(running(pid) for pid in pids(tmp_path))
    assert attempt(tmp_path, 1)[0] == "running"
    assert not (tmp_path / "rank-0.json").exists()

    finish_by("Open MPI", tmp_path, OMP_NUM_THREADS="4,3,2")  # OpenMP's list of nested levels
    assert attempt(tmp_path, 2) == ("done", 20, "")
    assert [r["weights"] for r in results(tmp_path)] == [
        r["weights"] for r in results(uninterrupted)
    ]


@pytest.mark.slow
def test_the_users_accelerate_defaults_and_variables_change_no_result(
    uninterrupted: Path, tmp_path: Path
) -> None:
    defaults = tmp_path / "accelerate" / "default_config.yaml"
    defaults.parent.mkdir()
    defaults.write_text(
        "compute_environment: LOCAL_MACHINE\n"
        "distributed_type: MULTI_GPU\n"
        "num_machines: 1\nnum_processes: 2\nmachine_rank: 0\nmain_process_port: 0\n"
        "mixed_precision: bf16\ndebug: true\nuse_cpu: false\n"
        "dynamo_config:\n  dynamo_backend: INDUCTOR\n"
    )
    more = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7", "ACCELERATE_TORCH_DEVICE": "meta"}
    done = subprocess.run(
        [str(ACCELERATE), str(SCRIPT), str(tmp_path)],
        env=environment(tmp_path, **more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ignored = ("mixed precision bf16, the configuration sets fp32", "dynamo backend, training.")
    for setting in ignored:
        assert done.stderr.count(f"accelerate launch: ignoring its {setting}") == 2
    assert [r["weights"] for r in results(tmp_path)] == [
        r["weights"] for r in results(uninterrupted)
    ]


@pytest.mark.slow
def test_a_launch_that_forms_worlds_of_one_is_refused_in_one_line(tmp_path: Path) -> None:
    options = ["--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [
            str(ACCELERATE),
            *options,
            str(SCRIPT),
            str(tmp_path),
            "--expected-world-size",
            "2",
        ],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: expected_world_size: launched 1 rank, want 2; start them with srun, or with "
        "`accelerate launch` and an accelerate/ file of `movienet-shard presets` (`--cpu "
        "--num_processes 2` forms worlds of one), or change training.expected_world_size"
    ]
    assert not list(tmp_path.glob("attempt-*"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove the variables of a launcher from this process."""
    for name in LAUNCHER_NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def start_alone(device: str = "cpu", precision: str = "fp32", **more: Any) -> DistributedContext:
    return start(
        device=device,
        precision=precision,
        **({"accumulation": 1, "expected_world_size": None} | more),
    )


def test_without_a_launcher_the_world_is_one_process() -> None:
    assert world_from_environment() == World(rank=0, size=1, local_rank=0)


def test_the_launchers_variables_define_the_world(alone: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        alone.setenv(name, value)
    assert world_from_environment() == World(rank=5, size=8, local_rank=1)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_variables_of_every_launcher_in_the_readme_form_a_world(
    alone: pytest.MonkeyPatch, launcher: str
) -> None:
    for name, value in rank_environment(launcher, 1).items():
        alone.setenv(name, value)
    assert world_from_environment() == World(rank=1, size=2, local_rank=1)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no Open MPI on this machine")
def test_open_mpi_sets_the_variables_of_its_row(tmp_path: Path) -> None:
    command, names = LAUNCHERS["Open MPI"]
    script = (
        "import os; from configs.runtime.world import world_from_environment as world; "
        f"print(world().rank, world().size, set({names}) <= set(os.environ))"
    )
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    launcher = command[: command.index("movienet-train")].split()
    done = subprocess.run(
        [*launcher, sys.executable, "-c", script],
        env=environment(tmp_path, OMPI_MCA_rmaps_base_oversubscribe="1", **as_root),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert sorted(done.stdout.splitlines()) == ["0 2 True", "1 2 True"]


MPI = rank_environment("Open MPI", 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        # Left over from a job script, which exports them for srun, in a process without srun.
        (
            {"WORLD_SIZE": "8", "MASTER_ADDR": "tb1", "MASTER_PORT": "29500"},
            r"WORLD_SIZE=8 set without RANK, LOCAL_RANK; .*unset the variables for one rank$",
        ),
        (MPI | {"WORLD_SIZE": "8"}, "mpirun of Open MPI started 2 ranks, but WORLD_SIZE is 8"),
        (MPI | {"OMPI_COMM_WORLD_RANK": ""}, "Open MPI: got OMPI_COMM_WORLD_RANK=, want numbers"),
        (
            MPI | {"OMPI_COMM_WORLD_SIZE": "4"},
            "4 ranks on several nodes without MASTER_ADDR, .* `-x MASTER_ADDR=HOST`",
        ),
        (MPI | {"MASTER_PORT": "any"}, "MASTER_PORT: got any, want a port number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0, WORLD_SIZE=2 set without LOCAL_RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "got RANK=2, WORLD_SIZE=2"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "got RANK=x, WORLD_SIZE=2"),
    ],
)
def test_incomplete_or_invalid_launcher_variables_are_refused(
    alone: pytest.MonkeyPatch, given: dict[str, str], message: str
) -> None:
    for name, value in given.items():
        alone.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^environment: .*{message}"):
        world_from_environment()


def test_ranks_without_a_rendezvous_address_are_refused(alone: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        alone.setenv(name, value)
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 without MASTER_ADDR, MASTER_PORT"):
        start_alone()


@pytest.mark.slow
def test_a_failed_rendezvous_is_one_line_with_rank_and_address(
    alone: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    # The domain .invalid never resolves.
    for name, value in (world | {"MASTER_ADDR": "no.invalid", "MASTER_PORT": "1"}).items():
        alone.setenv(name, value)
    alone.setattr("configs.runtime.launch._RENDEZVOUS_TIMEOUT_S", 2.0)
    expected = r"^rank 1 of 2: no rendezvous at no.invalid:1: [^\n]+$"
    with caplog.at_level("INFO", "configs"), pytest.raises(MachineError, match=expected):
        start_alone()
    assert caplog.messages == ["waiting for 2 ranks, at most 2 s"]


def test_a_port_in_use_is_one_line_with_the_address(alone: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in (rank_environment("torchrun", 0) | {"MASTER_PORT": port}).items():
            alone.setenv(name, value)
        with pytest.raises(
            MachineError, match=rf"^rank 0 of 2: no rendezvous at .*:{port}: .*in use"
        ):
            start_alone()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("section", ["training", "encoder"])
def test_a_missing_gpu_is_refused(section: str) -> None:
    want = f"or set {section}.device to 'auto' or 'cpu'$"
    with pytest.raises(ConfigError, match=rf"^{section}\.device: got 'cuda', but torch .*{want}"):
        start_alone(device="cuda", section=section)


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^training.precision: got 'fp16' on the CPU, want 'fp32' or"
    ):
        start_alone(precision="fp16")


@pytest.mark.parametrize(
    ("given", "warning"),
    [
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "accelerate launch: this process is the only rank; `--num_processes N` forms a world "
            "only with `--config_file $(movienet-shard presets accelerate/cpu-2)`",
        ),
        (
            {"SLURM_NTASKS": "4"},
            "Slurm: the job has 4 tasks, but this process is the only rank; start it with srun",
        ),
        # Empty variables are like none.
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "OMP_NUM_THREADS": ""}, None),
    ],
)
def test_a_launch_of_several_ranks_that_starts_one_process_is_warned_of(
    alone: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: dict[str, str],
    warning: str | None,
) -> None:
    for name, value in given.items():
        alone.setenv(name, value)
    with caplog.at_level("WARNING", "configs"):
        start_alone().close()
    assert caplog.messages == [warning] * (warning is not None)


def test_an_unsupported_mode_of_accelerate_is_refused(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"^accelerate launch: got FSDP, want plain data"):
        start_alone()


@pytest.mark.slow
def test_a_process_can_start_and_close_several_contexts_in_turn() -> None:
    for precision, accumulation in (("fp32", 1), ("bf16", 4), ("fp32", 2)):
        launch = start_alone(precision=precision, accumulation=accumulation)
        with closing(launch):
            model = launch.prepare_model(nn.Linear(2, 1))
            loss = model(torch.ones(1, 2)).sum()
            assert loss.dtype == torch.float32
            launch.backward(loss)
            bias = launch.unwrap(model).bias
            assert isinstance(bias, nn.Parameter)
            assert bias.grad is not None
            assert bias.grad.item() == 1 / accumulation
        launch.close()


def test_collectives_in_a_world_of_one_return_copies_of_their_input() -> None:
    with closing(start_alone()) as launch:
        values = torch.tensor([[1.0, 2.0]])
        assert launch.any_rank(True, False) == (True, False)
        for result in (launch.all_reduce_sum(values), launch.all_gather(values)):
            assert result.tolist() == [[1.0, 2.0]]
            assert result is not values
        launch.barrier()


def test_threads_are_set_if_configured_and_otherwise_torch_s_default() -> None:
    before, default = torch.get_num_threads(), default_threads()
    try:
        start_alone(threads=3).close()
        assert torch.get_num_threads() == 3
        start_alone().close()
        assert torch.get_num_threads() == default
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--nproc-per-node=1"]])
def test_a_gpu_takes_the_same_steps_as_the_cpu_in_every_precision(
    tmp_path: Path, precision: str, launcher: list[str]
) -> None:
    for device, kind in (("cpu", "fp32"), ("auto", precision)):
        out = tmp_path / device
        options = [str(SCRIPT), str(out), "--device", device, "--precision", kind]
        subprocess.run([sys.executable, *launcher, *options], env=environment(tmp_path), check=True)
    cpu, gpu = results(tmp_path / "cpu", 1)[0], results(tmp_path / "auto", 1)[0]
    assert gpu["device"].startswith("cuda")
    assert gpu["output"] == "torch.float32"
    for one, other in zip(cpu["weights"], gpu["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0.1, atol=0.02)
