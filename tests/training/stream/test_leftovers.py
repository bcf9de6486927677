"""A stream that is closed, killed or abandoned leaves no threads, connections or files."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from configs.runtime.publish import TEMPORARY_PREFIX
from configs.schema import StorageConfig, StreamConfig
from sharding.features import open_features
from tests.sharding.servers import faulty_server, nginx, rule
from training.stream.loader import FeatureStream

pytestmark = pytest.mark.slow

N_ROWS = [40 + 7 * (movie % 23) for movie in range(42)]
OPTIONS = {"window": 16, "global_batch": 4, "threads": 2, "prefetch": 2}
PROMPT_S = 90.0
"""Seconds to close a stream and to end, on a busy machine; a read takes 150, all its tries 600."""

BEGIN = """
    import os, sys, threading, time
    import numpy as np
    from configs.schema import StorageConfig, StreamConfig
    from sharding.features import open_features
    from training.stream.loader import FeatureStream

    url, cache = sys.argv[1:]
    features = open_features(url, StorageConfig(timeout=600, max_in_flight=4))
    config = StreamConfig(cache_dir=cache, windows_per_movie=50, **{options})
    movies = np.arange(len(features.movie_ids))
    stream = FeatureStream(features, movies, config)
    batches = iter(stream)
    next(batches)
"""


@pytest.fixture
def films(make_films: Callable[..., Any], tmp_path: Path) -> Any:
    """Six shards of 7 movies."""
    return make_films(N_ROWS, folder=tmp_path / "set")


@pytest.fixture
def url(films: Any, tmp_path: Path) -> Iterator[str]:  # noqa: ARG001  # films writes the set
    with nginx(tmp_path / "nginx", tmp_path / "set") as upstream, faulty_server(upstream) as proxy:
        yield proxy


@contextmanager
def program(url: str, cache: Path | str, code: str) -> Iterator[subprocess.Popen[str]]:
    """Run a stream in a separate process, which is killed at the end if it still runs."""
    begin = textwrap.dedent(BEGIN).replace("{options}", repr(OPTIONS))
    command = [sys.executable, "-c", begin + textwrap.dedent(code), url, str(cache)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
    with process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """Return the next line of the process."""
    assert process.stdout
    return process.stdout.readline().strip()


def test_a_closed_stream_leaves_no_thread_no_connection_and_no_partial_file(
    url: str, tmp_path: Path
) -> None:
    code = """
        def connections():
            port = f":{int(url.rpartition(':')[2]):04X}"
            rows = [line.split() for line in open("/proc/self/net/tcp").readlines()[1:]]
            theirs = {row[9] for row in rows if row[2].endswith(port) and row[3] == "01"}
            links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
            mine = {os.readlink(link) for link in links if os.path.lexists(link)}
            return len(mine & {f"socket:[{inode}]" for inode in theirs})

        print(connections() > 0)
        stream.close()
        features.storage.close()
        for _ in range(500):  # the library closes them in the background
            if not connections():
                break
            time.sleep(0.01)
        print([each.name for each in threading.enumerate() if each.name.startswith("stream")])
        print(connections(), flush=True)
        input()
    """
    with program(url, tmp_path / "cache", code) as process:
        assert [line_of(process) for _ in range(3)] == ["True", "[]", "0"]
    assert not list((tmp_path / "cache").glob(f"{TEMPORARY_PREFIX}*"))


def test_a_program_exits_immediately_although_the_server_does_not_respond(url: str) -> None:
    with program(
        url, "off", "print(len(batches.__next__().movie), flush=True); input()"
    ) as process:
        assert line_of(process) == "4"
        rule(url, {"do": "stall", "seconds": 300, "times": 10**9})
        begin = time.monotonic()
        _, errors = process.communicate("\n")
        assert (process.returncode, errors) == (0, "")
    assert time.monotonic() - begin < PROMPT_S


def test_a_sigkill_in_mid_epoch_leaves_nothing_that_affects_the_next_run(
    films: Any, url: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    # Only downloads of complete shards: the first member of a shard has its header before its rows.
    rule(url, {"do": "stall", "seconds": 300, "path": ".tar", "range": "bytes=0-", "times": 10**9})
    with program(url, cache, "print('runs', flush=True); [0 for _ in batches]") as process:
        assert line_of(process) == "runs"
        wait_until(lambda: bool(list(cache.glob(f"{TEMPORARY_PREFIX}*"))))
        folder = Path(f"/proc/{process.pid}")
        # No worker processes and no named shared memory, which could outlive the process.
        assert (folder / f"task/{process.pid}/children").read_text() == ""
        assert "/dev/shm/" not in (folder / "maps").read_text()
        process.kill()
        process.wait()
    rule(url)
    config = StreamConfig(cache_dir=str(cache), **OPTIONS)
    features = open_features(url, StorageConfig(timeout=60, max_in_flight=4))
    with FeatureStream(features, films.movies, config) as stream:
        for _ in range(2):
            for _ in stream:
                pass
        wait_until(lambda: not getattr(stream.source, "admitting", False))
    features.storage.close()
    assert sorted(path.stem for path in cache.iterdir()) == sorted(
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "set").glob("*.tar")
    )


SPAWNING = """
    import multiprocessing, sys
    import numpy as np
    from configs.schema import StorageConfig, StreamConfig
    from sharding.features import open_features
    from training.stream.loader import FeatureStream

    def total(url):
        features = open_features(url, StorageConfig(timeout=60, max_in_flight=4))
        config = StreamConfig(cache_dir="off", **{options})
        with FeatureStream(features, np.arange(len(features.movie_ids)), config) as stream:
            return sum(float(batch.features.double().sum()) for batch in stream)

    if __name__ == "__main__":
        mine = total(sys.argv[1])
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            print(pool.map(total, sys.argv[1:] * 2) == [mine, mine])
"""


def test_spawned_processes_stream_after_their_parent_has_streamed(url: str, tmp_path: Path) -> None:
    script = tmp_path / "spawning.py"
    script.write_text(textwrap.dedent(SPAWNING).replace("{options}", repr(OPTIONS)))
    done = subprocess.run(
        [sys.executable, str(script), url],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
