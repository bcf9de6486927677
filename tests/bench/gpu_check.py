"""What only a GPU can prove, as one table: ``make gpu-check``.

    python tests/bench/gpu_check.py [--device cuda|cpu] [--images N]

Exit code: 0 if everything holds, 1 if something does not, 2 on a machine without a GPU. `--device
cpu` runs what a CPU can, in order to try this file.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bench_encoding import make_frames
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.load import load_config
from configs.runtime.launch import start
from encoders.decode import Decoder
from encoders.encode_plan import make_plan
from encoders.extract import Extractor
from encoders.frame_source import PersistentFrames
from encoders.registry import Tower, make_tower
from encoders.shard_reader import ReadBuffers, open_shard, read_by_index
from movienet_stream import Config, FeatureStream, open_features
from sharding.frames import FrameSet, open_frames
from sharding.storage.open import open_storage

CHECKOUT = Path(__file__).resolve().parents[2]
ACCELERATE = CHECKOUT / "configs" / "accelerate"
DEMO = ("--quiet", "--config", "demo", "data.limit=120", "tracking.wandb=off")
DATA = Path("demo-data/limit-120")
RUNS = DATA / "runs"
TOWER = ("encoder.model=ViT-B-32", "encoder.pretrained=null")
EXACT = ("model.options={dropout: 0, input_dropout: 0}",)
SAME_COSINE = 0.999
NEAR = 1e-3


class FailedError(Exception):
    """A check does not hold."""


class SkippedError(Exception):
    """This machine cannot run a check."""


@dataclass(frozen=True)
class Machine:
    """Where the checks run."""

    device: str
    images: int
    """Images of the measurements of speed."""

    @property
    def torch_device(self) -> torch.device:
        """The device of a single process."""
        return torch.device(self.device)


def run(program: str, *words: str, launcher: tuple[str, ...] = ("-m",), **variables: str) -> str:
    """Run one of our programs in the current folder; return its stdout."""
    done = subprocess.run(
        [sys.executable, *launcher, program, *words],
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise FailedError(f"{program} {words[0]}: exit {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def environment(**variables: str) -> dict[str, str]:
    """Return the variables of a program; cuBLAS is deterministic with this workspace."""
    own = {"PYTHONPATH": str(CHECKOUT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return os.environ | own | variables


def require(holds: bool, text: str) -> str:  # reads as `assert`
    """Return the figures of a check that holds."""
    if not holds:
        raise FailedError(text)
    return text


# --- arithmetic -----------------------------------------------------------------------------------


def show_device(machine: Machine) -> str:
    """Name, memory and libraries."""
    if machine.device == "cpu":
        return f"CPU, torch {torch.__version__}"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} "
        f"GiB, capability {properties.major}.{properties.minor}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}"
    )


class Recorder(nn.Linear):
    """Layer that records the type of what it computes under autocast."""

    seen: torch.dtype | None = None

    def forward(self, rows: Tensor) -> Tensor:
        """Compute and record."""
        out = super().forward(rows)
        self.seen = out.dtype
        return out


def autocast(machine: Machine) -> str:
    """Products in bf16; parameters, gradients and outputs in float32."""
    launch = start(
        device=machine.device, precision="bf16", accumulation=1, expected_world_size=None
    )
    try:
        layer = Recorder(16, 4)
        model = launch.prepare_model(layer)
        out = model(torch.randn(8, 16, device=launch.device))
        launch.backward(out.square().mean())
        gradient = layer.weight.grad
        types = [layer.seen, out.dtype, layer.weight.dtype]
        types += [] if gradient is None else [gradient.dtype]
    finally:
        launch.close()
    names = " ".join(str(kind).removeprefix("torch.") for kind in types)
    want = [torch.bfloat16, *[torch.float32] * 3]
    return require(types == want, f"product, output, weight, gradient: {names}")


def same_steps(machine: Machine) -> str:
    """Steps of fp32, bf16 and fp16 as on the CPU, alone and under torchrun (a pytest)."""
    if machine.device == "cpu":
        raise SkippedError("needs a GPU")
    test = CHECKOUT / "tests/configs/runtime/test_launch.py"
    name = "test_a_gpu_takes_the_same_steps_as_the_cpu_in_every_precision"
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", str(CHECKOUT))
    out = run("pytest", f"{test}::{name}", *options, "-c", str(CHECKOUT / "setup.cfg"))
    return out.strip().splitlines()[-1]


# --- encoding -------------------------------------------------------------------------------------


def same_features(machine: Machine) -> str:
    """Features of the GPU and of the CPU, row by row, in fp32 and in bf16."""
    lowest = {}
    for precision in ("fp32", "bf16"):
        name = f"{precision}-{machine.device}"
        options = (f"encoder.device={machine.device}", f"encoder.precision={precision}")
        run("encoders", "run", *DEMO, f"encoder.name={name}", *options)
        lowest[precision] = _lowest_cosine(name, "demo")
    text = ", ".join(f"{precision} cosine >= {value:.6f}" for precision, value in lowest.items())
    return require(min(lowest.values()) > SAME_COSINE, text)


def _lowest_cosine(name: str, other: str) -> float:
    sets = [open_features(str(DATA / "features" / each)) for each in (name, other)]
    rows = [
        torch.from_numpy(np.concatenate([each[movie].features_ND for movie in each.movie_ids]))
        for each in sets
    ]
    return float(torch.cosine_similarity(rows[0].double(), rows[1].double()).min())


def pinned(machine: Machine) -> str:
    """Batches in pinned memory, copied asynchronously, equal those in plain memory."""
    if machine.device == "cpu":
        raise SkippedError("needs a GPU")
    config = load_config("demo", ["stream.global_batch=8"])
    features = open_features(str(DATA / "features" / "demo"))
    movies = features.labels.movies("train")
    n_batches = 0
    with (
        FeatureStream(features, movies, config.stream, pinned=True) as fast,
        FeatureStream(features, movies, config.stream) as plain,
    ):
        for ours, theirs in zip(fast, plain, strict=True):
            if not ours.features.is_pinned():
                raise FailedError("a batch is not in pinned memory")
            on_device = ours.to(machine.torch_device, non_blocking=True)
            if not torch.equal(on_device.features.cpu(), theirs.features):
                raise FailedError(f"batch {n_batches} differs")
            n_batches += 1
    return f"{n_batches} batches equal"


def decode_rate(machine: Machine) -> str:
    """Images per second that all cores decode for one device."""
    frames, config = _speed_frames(machine)
    tower = make_tower(config.encoder, machine.torch_device, "fp32")
    decoder = Decoder(tower.preprocessing)
    size = (tower.preprocessing.height, tower.preprocessing.width, 3)
    shard = open_shard(frames, 0)
    pieces = [range(k, min(k + 16, len(shard.index))) for k in range(0, len(shard.index), 16)]
    jpegs = [
        [bytes(image) for image in images]
        for images in read_by_index(frames, shard, pieces, ReadBuffers())
    ]

    def decode(images: list[bytes]) -> int:
        for image in images:
            decoder.decode(image, np.empty(size, np.uint8))
        return len(images)

    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        begin = time.perf_counter()
        total = sum(pool.map(decode, jpegs))
    rate = total / (time.perf_counter() - begin)
    return f"{rate:,.0f} images/s on {cores} cores, {rate / cores:,.0f} per core"


def encode_rate(machine: Machine) -> str:
    """End-to-end rate of encoding next to the rate of the model alone, ViT-B-32."""
    frames, config = _speed_frames(machine)
    precision = "bf16" if machine.device == "cuda" else "fp32"
    tower = make_tower(config.encoder, machine.torch_device, precision)
    alone = _model_rate(tower, machine, config.encoder.batch_size)
    source = PersistentFrames(frames)
    extractor = Extractor(
        config.encoder,
        make_plan(config.encoder, tower, precision, source),
        tower,
        machine.torch_device,
        frames=source.shards,
        features=open_storage("speed/features"),
    )
    begin = time.perf_counter()
    extractor.run(range(extractor.n_shards))
    stats = extractor.done
    rate = stats.images / (time.perf_counter() - begin)
    return (
        f"{rate:,.0f} images/s of {alone:,.0f} for the model alone ({rate / alone:.0%}); "
        f"waited for data {stats.waiting:.0%} of the time"
    )


def _model_rate(tower: Tower, machine: Machine, batch: int) -> float:
    size = (batch, 3, tower.preprocessing.height, tower.preprocessing.width)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, device=machine.torch_device)
    n_batches = max(1, machine.images // batch)
    tower.encode(pixels).cpu()  # compiles kernels
    begin = time.perf_counter()
    for _ in range(n_batches):
        tower.encode(pixels).cpu()
    return n_batches * batch / (time.perf_counter() - begin)


def _speed_frames(machine: Machine) -> tuple[FrameSet, Config]:
    """Return frame shards of JPEGs of about 33 KB, made once, and a configuration."""
    folder = Path("speed")
    if not folder.exists():
        make_frames(folder, movies=8, shots=max(1, machine.images // 24))
    threads = len(os.sched_getaffinity(0))
    own = (f"encoder.threads={threads}", f"encoder.batch_size={min(512, machine.images)}")
    config = load_config("demo", [*TOWER, *own])
    return open_frames(str(folder / "frames")), config


# --- training -------------------------------------------------------------------------------------


def resume(machine: Machine) -> str:
    """A run that was stopped by SIGTERM and resumed, next to two undisturbed ones."""
    options = (*DEMO, "training.epochs=40", f"training.device={machine.device}")
    for name in ("first", "second"):
        run("training", "run", *options, f"training.run_name={name}")
    _stop_and_resume(*options, "training.run_name=stopped", "training.checkpoint_steps=1")
    noise, difference = (_difference("first", other) for other in ("second", "stopped"))
    text = f"largest difference {difference:.1e}, of two undisturbed runs {noise:.1e}"
    return require(difference <= 10 * noise, text)


def _stop_and_resume(*options: str) -> None:
    metrics = RUNS / "stopped" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "training", "run", *options],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (metrics.exists() and len(metrics.read_bytes()) > 400):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 75:
        raise FailedError(f"a stopped run ended with exit code {process.returncode}, want 75")
    run("training", "run", *options)


def two_ranks(machine: Machine) -> str:
    """Two ranks under Accelerate, NCCL on GPUs, next to one."""
    if machine.device == "cuda" and torch.cuda.device_count() < 2:
        raise SkippedError("1 GPU, want 2")
    launch_file = "gpu" if machine.device == "cuda" else "cpu-2"
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file")
    # Dropout differs between worlds, and rounding grows with the steps.
    options = (*DEMO, *EXACT, "training.epochs=2", f"training.device={machine.device}")
    run("training", "run", *options, "training.run_name=alone")
    run(
        "training",
        *("run", *options, "training.run_name=ranks", "training.expected_world_size=2"),
        launcher=(*launcher, str(ACCELERATE / f"{launch_file}.yaml"), "--module"),
    )
    difference = _difference("alone", "ranks")
    return require(difference < NEAR, f"largest difference to one rank {difference:.1e}")


def report(machine: Machine) -> str:
    """Scores of one model, computed on the GPU and on the CPU."""
    scores = []
    for device in dict.fromkeys((machine.device, "cpu")):
        options = ("--out", device, f"training.device={device}")
        out = run("eval", "report", str(RUNS / "first"), *options)
        scores.append(re.findall(r"^model +(\d\.\d+)", out, re.MULTILINE)[0])
    return require(len(set(scores)) == 1, f"mAP {' and '.join(scores)}")


def _difference(run_name: str, other: str) -> float:
    paths = [RUNS / name / "checkpoints/last/model.safetensors" for name in (run_name, other)]
    one, two = (load_file(path) for path in paths)
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


# --- the table ------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Machine], str]] = {
    "device": show_device,
    "bf16 autocast": autocast,
    "steps as on the CPU": same_steps,
    "features as on the CPU": same_features,
    "pinned memory": pinned,
    "decode": decode_rate,
    "encode": encode_rate,
    "resume": resume,
    "two ranks": two_ranks,
    "scores as on the CPU": report,
}


def rows(machine: Machine) -> Iterator[tuple[str, str, str]]:
    """Run the checks in order; yield name, result and figures of each."""
    for name, check in CHECKS.items():
        try:
            yield name, "ok", check(machine)
        except SkippedError as error:
            yield name, "skipped", str(error)
        except Exception as error:  # noqa: BLE001  # the other checks still run
            yield name, "FAILED", " ".join(f"{error or type(error).__name__}".split())


def main() -> int:
    """Print the table; return the exit code."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--images", type=int, default=8192, help="Of the measurements of speed.")
    arguments = options.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        message = "error: gpu-check: torch finds no GPU on this machine, want an NVIDIA GPU"
        print(message, file=sys.stderr)
        return 2
    machine = Machine(arguments.device, arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run("sharding", "demo", "--quiet", "--config", "demo")
        run("sharding", "build", *DEMO)
        run("encoders", "run", *DEMO, "encoder.device=cpu")
        results = []
        for name, result, figures in rows(machine):
            print(f"{name:<24} {result:<8} {figures}", flush=True)
            results.append(result)
        os.chdir(CHECKOUT)
    print(
        f"{results.count('ok')} ok, {results.count('skipped')} skipped, "
        f"{results.count('FAILED')} failed"
    )
    return 1 if "FAILED" in results else 0


if __name__ == "__main__":
    sys.exit(main())
