"""The soak: what it requires, which faults its server injects, and how its figures are shown."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from faulty_http import RATES, fault_at  # noqa: E402
from soak_loader import flaws, growth, read_counts  # noqa: E402


def report(**changes: Any) -> dict[str, Any]:
    """Return the report of a soak without flaws, with other entries."""
    samples = [
        {"seconds": float(second), "memory_mb": 300.0, "files": 60.0, "threads": 47.0}
        for second in range(30)
    ]
    good = {
        "seconds": 30,
        "cpu_s": 6.0,
        "epochs": 3,
        "exact_epochs": 3,
        "stats": {"retries": 5, "cache_hits": 70.0, "cache_misses": 30.0},
        "requests": 1000,
        "faults": dict.fromkeys(RATES, 2),
        "rates": RATES,
        "stall_s": 10.0,
        "samples": samples,
        "machine": {"cores": 2, "processor": "x86_64"},
    }
    return good | changes


def grown(name: str, by: float) -> list[dict[str, float]]:
    """Return samples in which a figure grows steadily by so much."""
    samples: list[dict[str, float]] = report()["samples"]
    for number, sample in enumerate(samples):
        sample[name] += by * number / len(samples)
    return samples


def test_faults_are_as_frequent_as_stated() -> None:
    n = 100_000
    counts = Counter(fault_at(number / n) for number in range(n))
    assert {name: counts[name] / n for name in RATES} == pytest.approx(RATES, abs=2 / n)
    assert counts[""] / n == pytest.approx(1 - sum(RATES.values()), abs=2 / n)


def outcome_of(address: str) -> str:
    """Return how a request for the file of 100 kB ends."""
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("GET", "/shard.tar")
        response = connection.getresponse()
        return f"{response.status}, {len(response.read())} bytes"
    except http.client.IncompleteRead as error:
        return f"{len(error.partial)} bytes, then closed"
    except ConnectionResetError:
        return "reset"
    finally:
        connection.close()


def test_the_server_fails_in_each_way_and_counts_it(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(bytes(100_000))
    # With seed 26, four kinds of faults are among the first 33 requests, and no stall.
    command = [sys.executable, str(HERE / "faulty_http.py"), str(tmp_path), "0", "26"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout
        assert server.stdin
        url = server.stdout.readline().strip()
        outcomes = [outcome_of(url.removeprefix("http://")) for _ in range(33)]
        counts = read_counts(url)
        server.stdin.close()
    assert [outcomes[n] for n in (7, 17, 26, 31, 32)] == [
        "reset",
        "503, 0 bytes",
        "50000 bytes, then closed",
        "reset",
        "500, 0 bytes",
    ]
    assert outcomes.count("200, 100000 bytes") == 28
    faults = {"500": 1, "503": 1, "truncated": 1, "reset": 2, "stall": 0}
    assert counts == {"requests": 33} | faults


def test_growth_compares_the_last_third_with_the_middle_one_and_ignores_the_start() -> None:
    assert growth([0, 50, 100, 100, 100, 100, 107, 107, 107]) == 7


def test_a_flat_and_exact_soak_has_no_flaws() -> None:
    assert flaws(report()) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"samples": grown("memory_mb", 60.0)}, "memory_mb"),
        ({"samples": grown("files", 30.0)}, "files"),
        ({"samples": grown("threads", 30.0)}, "threads"),
        ({"exact_epochs": 2}, "epochs"),
        ({"faults": dict.fromkeys(RATES, 2) | {"stall": 0}}, "faults"),
    ],
)
def test_growth_an_epoch_that_is_not_exact_and_a_missing_fault_are_flaws(
    changes: dict[str, Any], named: str
) -> None:
    (line,) = flaws(report(**changes))
    assert line.startswith(named)


def test_table_and_picture_are_written_from_the_file_and_the_rest_of_the_readme_is_unchanged(
    tmp_path: Path,
) -> None:
    (tmp_path / "soak.json").write_text(json.dumps(report()))
    readme, picture = tmp_path / "README.md", tmp_path / "soak.png"
    readme.write_text("before\n<!-- soak_loader -->\nold\n<!-- /soak_loader -->\nafter\n")
    arguments = [HERE / "show_soak.py", tmp_path / "soak.json", readme, picture]
    subprocess.run([sys.executable, *map(str, arguments)], check=True)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| status 500 | 2.0% | 2 |" in text
    assert "| memory, MB | 300 | 300 | 300 | 8 |" in text
    assert "3 of them had every window exactly once" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
