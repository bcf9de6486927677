"""What a probe job of ``doctor`` finds on its nodes. Each node writes its rows; one line each."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from configs.runtime.hints import hint
from configs.runtime.launch import node_disk
from configs.runtime.tracking import wandb_server
from configs.schema import Config
from slurm.findings import Row, look_at_folder

_MEETING_S = 60
"""Longest wait for an all-reduce."""

_REACH_S = 5.0


def node_rows(config: Config, *, nodes: int, needs_gpu: bool) -> Iterator[Row]:
    """Yield what this node shows by itself.

    Args:
        config: Of the run.
        nodes: Nodes of the probe job.
        needs_gpu: Whether the job has asked for GPUs.
    """
    host = socket.gethostname()
    torch_row = import_torch(needs_gpu=needs_gpu)
    yield torch_row
    yield from _driver(needs_gpu=needs_gpu)
    scratch = scratch_folder(config)
    if "://" not in config.root:
        yield from look_at_folder(f"{host} root", Path(config.root))
    yield from look_at_folder(f"{host} scratch", scratch, least_bytes=config.encoder.scratch_bytes)
    yield own_name(os.environ, nodes=nodes)
    yield from _network(config)
    yield from _weights(config)
    if torch_row.level == "ok" and nodes > 1:
        for backend in ("gloo", "nccl") if needs_gpu else ("gloo",):
            yield all_reduce(backend, nodes)


def scratch_folder(config: Config) -> Path:
    """Return the folder in which ``movienet-encode run`` makes temporary frames on this node."""
    return Path(config.encoder.scratch_dir or node_disk())


def import_torch(*, needs_gpu: bool) -> Row:
    """Import torch in a process of its own and time it."""
    code = "import torch; print(torch.__version__, torch.cuda.is_available())"
    start = time.monotonic()
    done = _python("-c", code, limit_s=300)
    seconds = time.monotonic() - start
    check = f"{socket.gethostname()} torch"
    if done.returncode:
        return Row(
            check, "fail", f"does not import: {_last(done.stderr)}", "repair the environment"
        )
    version, has_gpu = done.stdout.split()[-2:]
    if needs_gpu and has_gpu != "True":
        remedy = "install a torch that fits the driver (nvidia-smi shows its CUDA version)"
        return Row(check, "fail", f"{version} finds no GPU", remedy)
    detail = f"{version}, imported in {seconds:.1f} s"
    if seconds > 60:
        remedy = "a slow file system; put the environment into a container or on a faster one"
        return Row(check, "warn", detail, remedy)
    return Row(check, "ok", detail)


def own_name(environment: Mapping[str, str], *, nodes: int) -> Row:
    """Look up this node's own name, which gloo gives to its peers."""
    host = socket.gethostname()
    check = f"{host} own name"
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        return Row(check, "warn" if nodes == 1 else "fail", f"unknown: {error}", _interface())
    if not address.startswith("127.") or environment.get("GLOO_SOCKET_IFNAME"):
        return Row(check, "ok", address)
    return Row(check, "warn" if nodes == 1 else "fail", f"means {address}", _interface())


def _interface() -> str:
    names = ", ".join(name for _, name in socket.if_nameindex() if name != "lo")
    return f"set GLOO_SOCKET_IFNAME in the site file to the network between nodes: {names}"


def all_reduce(backend: str, nodes: int) -> Row:
    """Sum one number over the nodes of this step."""
    check = f"all-reduce {backend}"
    done = _python("-m", "slurm.all_reduce", backend, limit_s=_MEETING_S + 30)
    if done.returncode == 0:
        return Row(check, "ok", f"{nodes} nodes, {done.stdout.split()[-1]} s")
    names = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    remedy = f"set {names} in the site file; check that nodes reach each other"
    return Row(check, "fail", _last(done.stderr) or f"no end within {_MEETING_S} s", remedy)


def _driver(*, needs_gpu: bool) -> Iterator[Row]:
    if not needs_gpu:
        return
    check = f"{socket.gethostname()} driver"
    if shutil.which("nvidia-smi") is None:
        yield Row(check, "warn", "no nvidia-smi", "with a container: run it with --nv")
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        yield Row(check, "fail", _last(done.stdout + done.stderr), "ask the administrator")
    else:
        yield Row(check, "ok", "; ".join(sorted(set(done.stdout.splitlines()))))


def _network(config: Config) -> Iterator[Row]:
    if (url := wandb_server(config.tracking)) is not None:
        upload = f"`movienet-train sync {shlex.quote(str(config.run_dir))}`"
        remedy = f"runs are kept offline; upload them from a login node with {upload}"
        yield _reach("wandb", url, remedy)
    if "://" in config.root:
        yield _store(config)


def _store(config: Config) -> Row:
    program = "movienet-shard"
    words = [program, "status", "--config", os.environ.get("MOVIENET_CONFIG", "")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode == 0 or "no plan" in done.stderr:
        return Row("object store", "ok", config.root)
    return Row(
        "object store", "fail", _last(done.stderr), "check network, endpoint and credentials"
    )


def _weights(config: Config) -> Iterator[Row]:
    encoder = config.encoder
    if encoder.pretrained is None or encoder.is_custom:
        return
    remedy = f"run {hint('movienet-encode fetch')} where there is internet"
    if "/" in encoder.pretrained or Path(encoder.pretrained).suffix:
        is_file = Path(encoder.pretrained).is_file()
        detail = encoder.pretrained if is_file else f"no file {encoder.pretrained!r}"
        yield Row("weights", "ok" if is_file else "fail", detail, "" if is_file else remedy)
        return
    words = ["movienet-encode", "models", encoder.model]
    if encoder.weights_dir:
        words += ["--weights-dir", encoder.weights_dir]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Row("weights", "fail", f"movienet-encode models: {error}", "repair the environment")
        return
    starred_tag = f"{encoder.pretrained}*"
    if any(
        line.split()[:1] == [encoder.model] and starred_tag in line.split()
        for line in done.stdout.splitlines()
    ):
        yield Row("weights", "ok", f"{encoder.model} {encoder.pretrained}")
    elif done.returncode:
        yield Row("weights", "fail", _last(done.stderr), "repair the environment")
    else:
        hub = _reach("hub", "https://huggingface.co", "")
        reach = "reachable" if hub.level == "ok" else "not reachable from here"
        detail = f"{encoder.model} {encoder.pretrained} is not on this node; the hub is {reach}"
        yield Row("weights", "fail", detail, remedy)


def _reach(check: str, url: str, remedy: str) -> Row:
    place = urlsplit(url)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        with socket.create_connection((place.hostname or "", port), timeout=_REACH_S):
            return Row(check, "ok", url)
    except OSError as error:
        return Row(check, "warn", f"{url} is not reachable from compute nodes: {error}", remedy)


def _python(*words: str, limit_s: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no end within {limit_s:g} s")


def _last(text: str) -> str:
    """Return the line of a traceback that names the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
    return (named or lines or [""])[-1][:300]


def gather_first(rows: Sequence[Row], host_index: int) -> Iterator[Row]:
    """Yield the rows of a node; those that are the same on all nodes come from the first alone."""
    for row in rows:
        if host_index == 0 or row.check.startswith(socket.gethostname()) or row.level == "fail":
            yield row
