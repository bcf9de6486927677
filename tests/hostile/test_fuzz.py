"""Every parser reads a hostile file or reports it in one line, and only reads.

In CI each parser is run on the same few files every time. ``make fuzz MINUTES=2`` searches with
new ones for 2 minutes per parser, and prints a row with the outcomes of each.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.hostile.guard import kind_of, limited_memory, outcome
from tests.hostile.targets import TARGETS, Target
from tests.sharding.external_films import config_of

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
FIRST_SEED = int(os.environ.get("FUZZ_SEED", "0"))


def search(target: Target, folder: Path, examples: int, number: int | None) -> Counter[str]:
    """Run a target on hostile files; return how often it ended in which way.

    Args:
        target: The parser.
        folder: Empty folder, for the file of the target.
        examples: Number of files.
        number: Of the sequence of files; None for the one that is the same in every run.
    """
    path = folder / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    outcomes: Counter[str] = Counter()
    config_of(folder, str(path.parent))  # writes the metadata of feature tars
    before = {file for file in folder.rglob("*") if file != path}

    path.write_bytes(target.corpus()[0])
    kind_of(lambda: target.parse(path), target.reasons)  # loads the libraries that it needs

    def check(data: bytes) -> None:
        path.write_bytes(data)
        outcomes[outcome(lambda: target.parse(path), target.reasons)] += 1
        assert {file for file in folder.rglob("*") if file != path} == before

    options = settings(
        max_examples=examples,
        derandomize=number is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    run = options(given(target.mutate(target.corpus()))(check))
    if number is not None:
        run = seed(number)(run)
    run()
    return outcomes


@pytest.fixture(scope="module", autouse=True)
def _limited_memory() -> Iterator[None]:
    # In a long search an allocation by a stated size fails instead of filling the memory.
    with limited_memory() if MINUTES else nullcontext():
        yield


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.parametrize("name", TARGETS)
def test_a_hostile_file_is_read_or_a_one_line_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    began, number = time.monotonic(), FIRST_SEED
    outcomes = search(TARGETS[name], tmp_path, EXAMPLES, number if MINUTES else None)
    while time.monotonic() - began < 60 * MINUTES:
        number += 1
        outcomes += search(TARGETS[name], tmp_path, 10 * EXAMPLES, number)
    assert outcomes.total() > EXAMPLES // 4
    if MINUTES:
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in outcomes.most_common())
        seconds = time.monotonic() - began
        with capsys.disabled():
            print(f"\n{name:<20} {outcomes.total():>9,}  {seconds:>5.0f} s  {kinds}")
