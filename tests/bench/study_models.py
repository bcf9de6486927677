"""Comparison of models and losses on the real features: the table of training/README.md.

    python tests/bench/study_models.py [--quick] [--only NAME …] [--losses NAME …] [--folds N]
        [--seeds N] [--set KEY=VALUE …] [--json FILE]
    python tests/bench/study_models.py --val CONFIG [--seeds N] [--json FILE]
    python tests/bench/study_models.py --rows FILE … --readme training/README.md

The product itself (``training.loop``) trains every row, with ``configs/features.yaml`` and the
settings of the row, by cross-validation inside the train split (``training.split=fold:i/5``). Each
seed and fold is a run, which is scored on the fold that it was not trained on. The baseline is a
logistic regression on the mean row. The second form trains an unchanged configuration on the
official split and scores val. It is run once, after all choices are made.

Times are CPU seconds of training only, on one thread. The last form trains nothing. It writes the
rows stored by ``--json`` between the markers in the README.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))

from configs.load import load_config  # noqa: E402
from configs.runtime.launch import start  # noqa: E402
from configs.runtime.signals import StopRequest  # noqa: E402
from configs.schema import Config  # noqa: E402
from sharding.features import FeatureSet, open_features, read_rows  # noqa: E402
from training.baselines import MeanLinear, mean_rows  # noqa: E402
from training.checkpoint import load_trained  # noqa: E402
from training.loop import train  # noqa: E402
from training.metrics import mean_ap, micro_ap  # noqa: E402
from training.registry import count_parameters  # noqa: E402
from training.scoring import score_split  # noqa: E402
from training.split_selection import split_movies  # noqa: E402
from training.stream.view import View  # noqa: E402
from training.thresholds import global_threshold  # noqa: E402

CONFIG = CHECKOUT / "configs" / "features.yaml"
UNPACK = CHECKOUT.parent / "shared" / "movienet-clip-features" / "unpack.py"
FOLDS = 5

CANDIDATES: dict[str, tuple[str, ...]] = {
    "MeanLinear": ("model.class=training.models.mean:MeanLinear", "model.options={}"),
    "MeanMLP": ("model.class=training.models.mean:MeanMLP", "model.options={}"),
    "GatedAttention": ("model.class=training.models.attention:GatedAttention", "model.options={}"),
    "MaskedLSTM": ("model.class=training.models.lstm:MaskedLSTM", "model.options={fold: 1}"),
    "Transformer": (
        "model.class=training.models.transformer:Transformer",
        "model.options={fold: 1}",
    ),
}
"""Overrides of each row. The real features have five rows per movie, too few for folding."""

MARKS = ("<!-- by tests/bench/study_models.py -->\n", "<!-- until here -->\n")
"""Lines of the README that enclose the table."""


@dataclass(frozen=True)
class Outcome:
    """Result of one run, scored on movies that it was not trained on."""

    map: float
    micro_ap: float
    seconds: float = 0.0
    """CPU seconds of training."""

    wall_s: float = 0.0
    parameters: int = 0
    threshold: float = 0.5


@dataclass(frozen=True)
class Row:
    """Line of the table."""

    model: str
    loss: str
    folds: tuple[Outcome, ...] = ()
    val: tuple[Outcome, ...] = ()


BASELINE = ("logistic regression, mean L2 rows", "log loss")


def main() -> None:
    """Run the study or read stored rows, print the table, and write it to JSON or the README."""
    arguments = _arguments()
    rows = _stored(arguments.rows) if arguments.rows else _study(arguments)
    table = _table(rows)
    sys.stdout.write(f"{table}\n")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if arguments.readme:
        text = arguments.readme.read_text(encoding="utf-8")
        before, first, rest = text.partition(MARKS[0])
        _, last, after = rest.partition(MARKS[1])
        if not first or not last:
            sys.exit(f"{arguments.readme}: want the lines {MARKS[0]!r} and {MARKS[1]!r}")
        arguments.readme.write_text(f"{before}{first}{table}\n{last}{after}", encoding="utf-8")


def _study(arguments: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        base = _source(Path(folder))
        study = Study(base, tuple(arguments.set), range(arguments.seeds), range(arguments.folds))
        rows = []
        selected = arguments.only, arguments.losses
        for row in study.on_val(arguments.val) if arguments.val else study.by_folds(*selected):
            sys.stderr.write(f"{_line(row)}\n")
            rows.append(row)
    return rows


@dataclass(frozen=True)
class Study:
    """Settings shared by all rows."""

    base: tuple[str, ...]
    """Overrides with the location of the real features."""

    settings: tuple[str, ...]
    seeds: Sequence[int]
    folds: Sequence[int]
    """Folds that are run, of the five."""

    def by_folds(self, models: Sequence[str], losses: Sequence[str]) -> Iterator[Row]:
        """Yield the baseline, then a row per loss and model, all inside the train split."""
        self._import(CONFIG)
        splits = [f"fold:{fold}/{FOLDS}" for fold in self.folds]
        yield Row(*BASELINE, folds=tuple(map(self._baseline, splits)))
        for loss in losses:
            for model in models:
                outcomes = [
                    self._trained(CONFIG, seed, split, f"training.loss={loss}", *CANDIDATES[model])
                    for seed in self.seeds
                    for split in splits
                ]
                yield Row(model, loss, folds=tuple(outcomes))

    def on_val(self, file: Path) -> Iterator[Row]:
        """Yield an unchanged configuration on the official split, after the baseline for ours."""
        self._import(file)
        if file.name == CONFIG.name:
            yield Row(*BASELINE, val=(self._baseline(None),))
        outcomes = tuple(self._trained(file, seed, None) for seed in self.seeds)
        config = load_config(file)
        yield Row(config.model.class_.rpartition(":")[2], config.training.loss, val=outcomes)

    def _config(self, file: Path, run: str, *overrides: str) -> Config:
        settings = (*self.base, f"training.run_name={run}", *self.settings, *overrides)
        return load_config(file, settings)

    def _import(self, file: Path) -> None:
        command = [sys.executable, "-m", "sharding", "import-features", "--config", str(file)]
        subprocess.run([*command, *self.base], check=True, cwd=CHECKOUT, stdout=sys.stderr)

    def _baseline(self, split: str | None) -> Outcome:
        features = open_features(self._config(CONFIG, "none").features_url)
        train_movies, val_movies = (
            split_movies(features, name, split) for name in ("train", "val")
        )
        means_MD = _means(features, train_movies)
        started = time.process_time()
        fitted = MeanLinear.fit(means_MD, features.labels.hot_MG[train_movies])
        seconds = time.process_time() - started
        logits_MG = fitted.predict(_means(features, val_movies))
        truth_MG = features.labels.hot_MG[val_movies]
        parameters = (features.dim + 1) * truth_MG.shape[1]
        scores = mean_ap(truth_MG, logits_MG), micro_ap(truth_MG, logits_MG)
        return Outcome(*scores, seconds=seconds, parameters=parameters)

    def _trained(self, file: Path, seed: int, split: str | None, *overrides: str) -> Outcome:
        config = self._config(
            file,
            f"run-{uuid4().hex[:8]}",
            *overrides,
            f"training.seed={seed}",
            f"stream.seed={seed}",
            f"training.split={split or 'null'}",
        )
        distributed = start(
            device="cpu", precision="fp32", accumulation=1, expected_world_size=1, threads=1
        )
        try:
            started, started_wall = time.process_time(), time.perf_counter()
            with StopRequest() as stop:
                train(config, distributed, stop)
            seconds, wall_s = time.process_time() - started, time.perf_counter() - started_wall
            trained = load_trained(config.run_dir, config.eval.checkpoint)
            features = open_features(config.features_url)
            scores = score_split(
                trained.model,
                features,
                split_movies(features, "val", split),
                View.of(config, config.eval.windows),
                batch_size=config.eval.batch_size,
                distributed=distributed,
            )
        finally:
            distributed.close()
        return Outcome(
            **scores.summary(),
            seconds=seconds,
            wall_s=wall_s,
            parameters=count_parameters(trained.model),
            threshold=global_threshold(scores.labels_MG, scores.probabilities_MG),
        )


def _means(features: FeatureSet, movies: np.ndarray) -> np.ndarray:
    return mean_rows(read_rows(features, int(movie)) for movie in movies)


def _source(folder: Path) -> tuple[str, ...]:
    """Unpack the real features and return the overrides with their location."""
    if not UNPACK.is_file():
        sys.exit(f"{UNPACK}: no such file, want the real features next to this checkout")
    source = folder / "movienet-features"
    subprocess.run([sys.executable, str(UNPACK), str(source)], check=True, stdout=sys.stderr)
    return (
        f"data.feature_arrays={source}/ProcessedTensor",
        f"data.metadata={source}/movie_map.pkl",
        f"data.split={source}/movie1K.split.v1.json",
        f"data.root={folder}/data",
        "training.monitor_split=null",
        "training.run_name=none",
        "tracking.wandb=off",
    )


def _stored(files: Sequence[Path]) -> list[Row]:
    """Return the rows written by ``--json``, merged by model and loss."""
    rows: dict[tuple[str, str], Row] = {}
    for row in (row for file in files for row in json.loads(file.read_text())):
        name = row["model"], row["loss"]
        folds, val = (tuple(Outcome(**run) for run in row[key]) for key in ("folds", "val"))
        merged = rows.get(name, Row(*name))
        rows[name] = Row(*name, folds=merged.folds + folds, val=merged.val + val)
    return list(rows.values())


def _table(rows: Sequence[Row]) -> str:
    head = (
        "| model | loss | runs | CV mAP | CV micro-AP | val mAP | val micro-AP | threshold | CPU s "
        "| parameters |"
    )
    return "\n".join((head, "|" + "---|" * 10, *map(_line, rows)))


def _line(row: Row) -> str:
    runs = row.folds + row.val
    trained = any(run.wall_s for run in runs)  # the baseline has neither threshold nor wall time
    cells = (
        row.model,
        row.loss,
        str(len(runs)),
        _spread([run.map for run in row.folds]),
        _spread([run.micro_ap for run in row.folds]),
        _spread([run.map for run in row.val]),
        _spread([run.micro_ap for run in row.val]),
        f"{statistics.mean(run.threshold for run in runs):.2f}" if trained else "",
        f"{statistics.median(run.seconds for run in runs):.1f}",
        f"{runs[0].parameters:,}",
    )
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two folds")
    parser.add_argument("--val", type=Path, metavar="CONFIG", help="train this config, score val")
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(CANDIDATES),
        choices=list(CANDIDATES),
        help="models of the table; default: all",
    )
    parser.add_argument("--losses", nargs="+", default=["bce"], help="training.loss of the rows")
    parser.add_argument("--set", nargs="+", default=[], help="overrides for every row")
    parser.add_argument("--seeds", type=int, default=3, help="runs per fold; default: 3")
    parser.add_argument("--folds", type=int, default=FOLDS, help="folds to run, of the five")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--rows", nargs="+", type=Path, default=[], help="read stored results")
    parser.add_argument("--readme", type=Path, help="write the table between the markers")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.folds = 1, 2
    return arguments


if __name__ == "__main__":
    main()
