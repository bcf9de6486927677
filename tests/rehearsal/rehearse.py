"""The product at a tenth of MovieNet's size: dump, check, shards, features, training, report.

    python tests/rehearsal [--films N] [--folder FOLDER] [--plain]

The chain runs through Slurm where a cluster can be started, else as plain processes. Two tasks of
sharding are killed and encoding is preempted twice. Then the same dump is built and encoded without
disturbance, and the digests are compared. A rerun resumes; remove the folder to start again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.rehearsal import cluster_run, plain_run
from tests.rehearsal.dump import ABSENT, write_dump
from tests.rehearsal.dump_plan import (
    FILM_DIRT,
    Film,
    built_in_shots,
    choose_films,
    expected_findings,
    plan_films,
)
from tests.rehearsal.memory import watched
from tests.rehearsal.table import Measured, lines
from tests.rehearsal.work import Work
from tests.slurm.cluster import CHECKOUT

SHOTS = CHECKOUT.parent / "shared" / "movienet-clip-features" / "shots.json"
SEED = 0
CALM = "calm"
"""Root of the undisturbed run."""

FOUND_WITHOUT_PLAN = {"unknown_genres", "too_many_bad", "short_movies"}
"""Findings that follow from others, or from real shot counts."""


def films_of(n: int) -> tuple[Film, ...]:
    """Return the films of the dump, with the real shot counts where they are known."""
    all_shots = json.loads(SHOTS.read_text()) if SHOTS.is_file() else built_in_shots(1100)
    share = min(1.0, n / 110)
    dirt = {kind: max(1, round(count * share)) for kind, count in FILM_DIRT.items()}
    return plan_films(choose_films(all_shots, n), SEED, dirt)


def check(work: Work, films: tuple[Film, ...]) -> None:
    """Check the dump, compare the findings with the plan, and exclude what would stop the build.

    Raises:
        SystemExit: ``check`` names other defects than the dump has.
    """
    work.run("movienet-shard", "check", "--decode", allowed=(3,))
    report = _check_json(work)
    found = {key: set(names) for key, names in report["findings"].items() if names}
    expected = expected_findings(films)
    expected.setdefault("missing", set()).add(ABSENT)
    for key in {*found, *expected} - FOUND_WITHOUT_PLAN:
        if wrong := found.get(key, set()) ^ expected.get(key, set()):
            raise SystemExit(f"check: {key}: wrong or missing: {sorted(wrong)[:10]}")
    work.write_config(exclude=report["stops"])


def _check_json(work: Work) -> dict[str, Any]:
    return dict(json.loads((work.folder / "data" / "check.json").read_bytes()))


def run_undisturbed(work: Work) -> None:
    """Build and encode the same dump in one process each, into another root."""
    root = f"data.root={CALM}"
    with work.step("shard, undisturbed") as due:
        if due:
            work.run("movienet-shard", "build", root)
    with work.step("encode, undisturbed") as due:
        if due:
            work.run("movienet-encode", "run", root)


def decode_rate(seconds: float = 3.0) -> float:
    """Return how many real-sized JPEGs one core decodes and resizes per second."""
    import io

    import numpy as np
    from PIL import Image

    from encoders.decode import Decoder, Preprocessing

    coarse = np.random.default_rng(0).integers(0, 255, (12, 21, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((426, 240), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(1).normal(0, 5, (240, 426, 1))
    buffer = io.BytesIO()
    pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    decoder = Decoder(Preprocessing(224, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    out_HW3, n = np.empty((224, 224, 3), np.uint8), 0
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        decoder.decode(buffer.getvalue(), out_HW3)
        n += 1
    return n / (time.process_time() - begin)


def measure(work: Work, films_in_dump: int) -> Measured:
    """Return what the complete rehearsal measured."""
    manifest = json.loads((work.folder / "data" / "frames" / "manifest.json").read_bytes())
    plan = json.loads((work.folder / "data" / "frames" / "plan.json").read_bytes())
    report = _check_json(work)
    same = all(
        work.digest(data_set) == work.digest(data_set, CALM)
        for data_set in ("frames", "features/demo")
    )
    return Measured(
        films=len(plan["movies"]),
        films_in_dump=films_in_dump,
        shots=report["totals"]["shots"],
        images=sum(shard["samples"] for shard in manifest["shards"]),
        n_bytes=sum(movie["bytes"] for movie in plan["movies"]),
        dirt={key: len(names) for key, names in report["findings"].items() if names},
        wall_s=work.times(),
        attempts={stage: work.attempts(stage) for stage in ("shard", "encode", "train")},
        decoded_per_s=decode_rate(),
        digest=work.digest("features/demo"),
        is_identical=same,
        peaks_mb=json.loads((work.folder / "memory.json").read_bytes()),
    )


def rehearse(work: Work, films: tuple[Film, ...], run_chain: Callable[[Work], None]) -> None:
    """Run every step that is not complete."""
    with work.step("dump") as due:
        if due:
            write_dump(work.folder / "dump", films)
            work.write_config()
    with work.step("check --decode") as due:
        if due:
            check(work, films)
    with work.step("chain, disturbed") as due:
        if due:
            run_chain(work)
    run_undisturbed(work)


def main() -> int:
    """Run the rehearsal and print its table; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--films", type=int, default=110)
    parser.add_argument("--folder", type=Path, default=CHECKOUT / "build" / "rehearsal")
    parser.add_argument("--plain", action="store_true", help="without Slurm")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    work = Work(args.folder.resolve())
    through_slurm = cluster_run.has_slurm() and not args.plain
    with watched(work):
        rehearse(
            work,
            films_of(args.films),
            cluster_run.run_chain if through_slurm else plain_run.run_chain,
        )
    measured = measure(work, args.films)
    sys.stdout.write("".join(f"{line}\n" for line in lines(measured)))
    return 0 if measured.is_identical else 1
