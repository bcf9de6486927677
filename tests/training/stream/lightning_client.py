"""Training with Lightning; as a script, one of two ranks that train, save and resume.

    torchrun --nproc-per-node=2 lightning_client.py FEATURES FOLDER

The script writes what its rank has trained on to ``FOLDER/rank-N.json``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import StreamConfig
from sharding.features import open_features
from training.stream.batch import Batch
from training.stream.loader import FeatureStream

README = Path(__file__).parents[3] / "training" / "stream" / "README.md"
N_ROWS = [3 + (movie * 37) % 41 for movie in range(23)]
DIM, GENRES = 8, 3
CONFIG = StreamConfig(window=10, windows_per_movie=2, global_batch=7, seed=3, threads=2)
"""23 movies x 2 windows in batches of 7: seven steps, the last with a short batch."""

Trained = list[tuple[int, int, list[int], list[int]]]
"""Epoch, step, movies and first rows of each batch that was trained on."""


def record(batch: Batch) -> tuple[int, int, list[int], list[int]]:
    """Return what identifies a batch."""
    return batch.epoch, batch.step, batch.movie.tolist(), batch.start.tolist()


def fit(
    stream: FeatureStream,
    folder: Path,
    *,
    epochs: int,
    save_at: int,
    resume: Path | None = None,
    ranks: int = 1,
) -> Trained:
    """Train with Lightning as the README shows, and save ``saved.ckpt`` after a step."""
    import lightning

    trained: Trained = []

    class Recording(_net_of_the_readme()):  # type: ignore[misc]
        def training_step(self, batch: Batch, number: int) -> Any:
            trained.append(record(batch))
            return super().training_step(batch, number)

    in_the_epoch = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, "saved", every_n_train_steps=save_at
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        callbacks=[in_the_epoch],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Recording(stream, DIM, GENRES), train_dataloaders=stream, ckpt_path=resume)
    if not (folder / "saved.ckpt").exists():
        trainer.save_checkpoint(folder / "saved.ckpt")
    return trained


def _net_of_the_readme() -> type:
    section = README.read_text().partition("## With Lightning")[2]
    scope: dict[str, Any] = {}
    exec(section.partition("```python\n")[2].partition("```")[0], scope)  # noqa: S102  # our own
    net: type = scope["Net"]
    return net


def main(features_url: str, folder: Path) -> None:
    """Train two epochs, saving after step 10, then three epochs from that checkpoint."""
    rank = int(os.environ["RANK"])
    trained = []
    for epochs, resume in ((2, None), (3, folder / "saved.ckpt")):
        features = open_features(features_url)
        movies = np.arange(len(features.movie_ids))
        with FeatureStream(features, movies, CONFIG, rank=rank, world_size=2) as stream:
            trained.append(fit(stream, folder, epochs=epochs, save_at=10, resume=resume, ranks=2))
    (folder / f"rank-{rank}.json").write_text(json.dumps(trained))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]))
