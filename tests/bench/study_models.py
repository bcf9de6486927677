"""Which model and loss tells genres best from the real features: the table of training/README.md.

    python tests/bench/study_models.py [--quick] [--val] [--only NAME …] [--set KEY=VALUE …]
        [--folds N] [--seeds N] [--losses NAME …] [--json FILE]

Every row is trained by the product itself (``training.loop``), on ``configs/features.yaml`` with
the row's own settings, by cross-validation inside the train split (``training.split=fold:i/5``):
every seed and fold is a run, scored on the fold it did not see. ``--val`` adds the official val
split, once, after everything is chosen. Logistic regression on the mean row stands beside.

Times are CPU seconds of training alone, on one thread.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))

from configs.launch import start  # noqa: E402
from configs.load import load_config  # noqa: E402
from configs.schema import Config  # noqa: E402
from configs.signals import StopRequest  # noqa: E402
from eval.baselines import MeanLinear, mean_rows  # noqa: E402
from eval.evaluate import read_rows  # noqa: E402
from sharding.features import FeatureSet, open_features  # noqa: E402
from training.checkpoint import load_trained  # noqa: E402
from training.loop import train  # noqa: E402
from training.metrics import mean_ap, micro_ap  # noqa: E402
from training.movies import split_movies  # noqa: E402
from training.registry import count_parameters  # noqa: E402
from training.score import View, score_split  # noqa: E402
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
"""Settings of each row beside those of the configuration. Five rows a film are not folded."""


@dataclass(frozen=True)
class Outcome:
    """One run, scored on films it did not see."""

    map: float
    micro_ap: float
    seconds: float = 0.0
    parameters: int = 0
    threshold: float = 0.5


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    model: str
    loss: str
    folds: tuple[Outcome, ...]
    val: tuple[Outcome, ...] = field(default=())


def main() -> None:
    """Run the study and print its table."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        base = _import_features(Path(folder))
        study = Study(base, tuple(arguments.set), arguments.seeds, arguments.folds)
        rows = []
        for row in study.rows(arguments.only, arguments.losses, val=arguments.val):
            print(_line(row), file=sys.stderr, flush=True)
            rows.append(row)
    print(_table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


@dataclass(frozen=True)
class Study:
    """What all rows have in common."""

    base: tuple[str, ...]
    """Overrides that lead to the imported features."""

    settings: tuple[str, ...]
    seeds: int
    folds: int
    """How many of the five are run."""

    def rows(self, models: Sequence[str], losses: Sequence[str], *, val: bool) -> Iterator[Row]:
        """Yield the baseline, then a row for each model and loss."""
        yield Row(
            "logistic regression, mean row",
            "log loss",
            tuple(self._baseline(f"fold:{fold}/{FOLDS}") for fold in range(self.folds)),
            (self._baseline(None),) if val else (),
        )
        for model in models:
            for loss in losses:
                outcomes = [
                    self._trained(model, loss, seed, f"fold:{fold}/{FOLDS}")
                    for seed in range(self.seeds)
                    for fold in range(self.folds)
                ]
                on_val = [self._trained(model, loss, s, None) for s in range(self.seeds)] * val
                yield Row(model, loss, tuple(outcomes), tuple(on_val))

    def _config(self, run: str, *overrides: str) -> Config:
        return load_config(CONFIG, (*self.base, f"training.run={run}", *self.settings, *overrides))

    def _baseline(self, split: str | None) -> Outcome:
        features = open_features(self._config("none").features_source)
        known, scored = (split_movies(features, part, split) for part in ("train", "val"))
        fitted = MeanLinear.fit(_means(features, known), features.labels.hot_MG[known])
        logits_MG = fitted.predict(_means(features, scored))
        truth_MG = features.labels.hot_MG[scored]
        return Outcome(mean_ap(truth_MG, logits_MG), micro_ap(truth_MG, logits_MG))

    def _trained(self, model: str, loss: str, seed: int, split: str | None) -> Outcome:
        name = f"{model}-{loss}-{seed}-{(split or 'val').replace(':', '-').replace('/', '-')}"
        config = self._config(
            name,
            *CANDIDATES[model],
            f"training.loss={loss}",
            f"training.seed={seed}",
            f"stream.seed={seed}",
            f"training.split={split or 'null'}",
        )
        launch = start(device="cpu", precision="fp32", accumulation=1, expect_world=1, threads=1)
        try:
            began = time.process_time()
            with StopRequest() as stop:
                train(config, launch, stop)
            seconds = time.process_time() - began
            trained = load_trained(config.run_dir, config.eval.checkpoint)
            features = open_features(config.features_source)
            scores = score_split(
                trained.model,
                features,
                split_movies(features, "val", split),
                View.of(config, config.eval.windows),
                batch_size=config.eval.batch_size,
                launch=launch,
            )
        finally:
            launch.close()
        return Outcome(
            **_named(scores.summary()),
            seconds=seconds,
            parameters=count_parameters(trained.model),
            threshold=global_threshold(scores.labels_MG, scores.probabilities_MG),
        )


def _named(summary: dict[str, float]) -> dict[str, float]:
    return {"map": summary["map"], "micro_ap": summary["micro_ap"]}


def _means(features: FeatureSet, movies: np.ndarray) -> np.ndarray:
    return mean_rows(read_rows(features, int(movie)) for movie in movies)


def _import_features(folder: Path) -> tuple[str, ...]:
    """Unpack and import the real features; return the overrides that lead there."""
    if not UNPACK.is_file():
        sys.exit(f"{UNPACK}: the real features do not lie beside this checkout")
    source = folder / "movienet-features"
    subprocess.run([sys.executable, str(UNPACK), str(source)], check=True, stdout=sys.stderr)
    base = (
        f"data.arrays={source}/ProcessedTensor",
        f"data.metadata={source}/movie_map.pkl",
        f"data.split={source}/movie1K.split.v1.json",
        f"data.root={folder}/data",
        "training.watch=null",
        "tracking.wandb=off",
    )
    command = [sys.executable, "-m", "sharding", "import-features", "--config", str(CONFIG), *base]
    subprocess.run(command, check=True, cwd=CHECKOUT, stdout=sys.stderr)
    return base


def _table(rows: Sequence[Row]) -> str:
    head = (
        "| model | loss | CV mAP | CV micro-AP | val mAP | val micro-AP | threshold | CPU s "
        "| parameters |"
    )
    return "\n".join((head, "|" + "---|" * 9, *map(_line, rows)))


def _line(row: Row) -> str:
    first = row.folds[0] if row.folds else row.val[0]
    cells = (
        row.model,
        row.loss,
        _spread([one.map for one in row.folds]),
        _spread([one.micro_ap for one in row.folds]),
        _spread([one.map for one in row.val]),
        _spread([one.micro_ap for one in row.val]),
        f"{statistics.mean(one.threshold for one in row.folds or row.val):.2f}",
        f"{statistics.median(one.seconds for one in row.folds + row.val):.1f}",
        f"{first.parameters:,}" if first.parameters else "10,773",
    )
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two folds")
    parser.add_argument("--val", action="store_true", help="score the official val split as well")
    parser.add_argument("--only", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--losses", nargs="+", default=["bce"], help="training.loss of the rows")
    parser.add_argument("--set", nargs="+", default=[], help="overrides for every row")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=FOLDS, help="how many of the five are run")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.folds = 1, 2
    return arguments


if __name__ == "__main__":
    main()
