"""``learning_curve.png`` shows a run and never makes one fail."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.runtime.attempt import Attempt
from tests.disks import small_disk
from training.learning_curve import CurvePlotter, draw_learning_curve, write_learning_curve
from training.metrics_file import MetricsFile

pytestmark = pytest.mark.slow  # as is the import of matplotlib

BLUE, VERMILION, SOFT = (0, 114, 178), (213, 94, 0), (93, 104, 120)


def write(run: Path, steps: int, *, validate: int = 0, resumed: int = 0) -> None:
    metrics = MetricsFile(run / "metrics.jsonl", from_step=0)
    for step in range(1, steps + 1):
        metrics.append(
            "train", step=step, epoch=step // 4, loss=math.nan if step == 2 else 1 / step
        )
        if validate and step % validate == 0:
            maps = {"holdout/map": 0.5 + step / 100, "val/map": 0.25}
            metrics.append("validation", step=step, epoch=step // 4, **maps)
    metrics.close()
    if resumed:
        attempt = Attempt.begin(run)
        attempt.record_start(resumed, None)
        attempt.finish("done", steps)


def colours(png: bytes | None) -> set[tuple[int, ...]]:
    assert png is not None
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return set(map(tuple, np.unique(pixels.reshape(-1, 3), axis=0).tolist()))


def test_it_shows_the_loss_the_map_of_both_splits_and_where_the_run_resumed(tmp_path: Path) -> None:
    write(tmp_path / "$loss_", 12)
    plain = draw_learning_curve(tmp_path / "$loss_")
    assert colours(plain) & {BLUE, VERMILION, SOFT} == {BLUE}
    write(tmp_path / "all", 12, validate=4, resumed=6)
    assert colours(draw_learning_curve(tmp_path / "all")) >= {BLUE, VERMILION, SOFT}


def test_a_run_whose_movies_are_all_trained_on_has_a_plot_of_its_loss_only(tmp_path: Path) -> None:
    write(tmp_path / "run", 4)
    plain = draw_learning_curve(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"validation","step":4,"epoch":1}\n')
    assert draw_learning_curve(tmp_path / "run") == plain


def test_equal_runs_have_equal_plots_and_long_ones_are_no_larger(tmp_path: Path) -> None:
    for name in ("a/run", "b/run"):
        write(tmp_path / name, 3000, validate=100)
    one, two = (draw_learning_curve(tmp_path / name) for name in ("a/run", "b/run"))
    assert one == two
    assert one is not None
    assert len(one) < 200_000


def test_it_is_drawn_again_only_after_new_metrics(tmp_path: Path) -> None:
    assert write_learning_curve(tmp_path) is None, "before the first step"
    write(tmp_path, 4)
    plot = tmp_path / "learning_curve.png"
    assert write_learning_curve(tmp_path) == plot
    plot.write_bytes(b"current")
    assert write_learning_curve(tmp_path) == plot
    assert plot.read_bytes() == b"current"
    os.utime(plot, (0, 0))
    assert write_learning_curve(tmp_path) == plot
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_is_as_old_as_its_metrics_so_records_written_meanwhile_make_it_outdated(
    tmp_path: Path,
) -> None:
    write(tmp_path, 4)
    os.utime(tmp_path / "metrics.jsonl", ns=(10**18 + 123, 10**18 + 123))
    plot = write_learning_curve(tmp_path)
    assert plot is not None
    assert plot.stat().st_mtime_ns == 10**18 + 123
    plot.write_bytes(b"outdated")
    os.utime(plot, ns=(10**18 + 123, 10**18 + 123))
    assert write_learning_curve(tmp_path) == plot
    assert plot.read_bytes() == b"outdated", "of the same metrics"
    write(tmp_path, 5)
    assert write_learning_curve(tmp_path) == plot
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_validations_right_after_the_start_draw_nothing(tmp_path: Path) -> None:
    write(tmp_path, 4)
    CurvePlotter(tmp_path).plot_if_due()
    assert not (tmp_path / "learning_curve.png").exists()


def test_a_full_disk_or_damaged_metrics_are_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "small", "64k"):
        write(tmp_path / "small", 4)
        (tmp_path / "small" / "data").write_bytes(bytes(40_000))
        assert write_learning_curve(tmp_path / "small") is None
        assert [path.name for path in (tmp_path / "small").glob(".tmp-*")] == []
    (tmp_path / "metrics.jsonl").write_bytes(b"\0\n")
    assert write_learning_curve(tmp_path) is None
    full, corrupt = (record.getMessage() for record in caplog.records)
    assert full.endswith("learning_curve.png: No space left on device); the run is not affected")
    assert "metrics.jsonl: line 1: corrupt" in corrupt
