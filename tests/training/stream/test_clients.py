"""Real trainers and loaders as consumers of the stream: on resume, none skips a window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from configs.schema import StreamConfig
from training.stream.batch import Batch
from training.stream.loader import FeatureStream

# Lightning warns of all that it would like: srun, checkpoints, workers, learning rate schedules.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:::lightning_utilities")

N_ROWS = [3 + (movie * 37) % 41 for movie in range(23)]
CONFIG = StreamConfig(window=10, windows_per_movie=2, global_batch=7, seed=3, threads=2)
"""23 movies x 2 windows in batches of 7: seven steps, the last with a short batch."""

EPOCHS = 3
Trained = list[tuple[int, int, list[int], list[int]]]
"""Epoch, step, movies and first rows of each batch that was trained on."""


@pytest.fixture(scope="module")
def films(make_films: Callable[..., Any]) -> Any:
    return make_films(N_ROWS)


def record(batch: Batch) -> tuple[int, int, list[int], list[int]]:
    return batch.epoch, batch.step, batch.movie.tolist(), batch.start.tolist()


@pytest.fixture(scope="module")
def undisturbed(films: Any) -> Trained:
    with FeatureStream(films.features, films.movies, CONFIG) as stream:
        return [record(batch) for _ in range(EPOCHS) for batch in stream]


# --- Lightning ------------------------------------------------------------------------------------


def fit(
    stream: FeatureStream, folder: Path, *, epochs: int, save_at: int, resume: Path | None = None
) -> Trained:
    """Train with Lightning as the README shows, and save ``saved.ckpt`` after a step."""
    lightning = pytest.importorskip("lightning")
    trained: Trained = []

    class Net(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 3)

        def training_step(self, batch: Batch, _: int) -> torch.Tensor:
            self.trained = batch
            trained.append(record(batch))
            loss: torch.Tensor = self.layer(batch.features.float()).mean()
            return loss

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["stream"] = stream.state_after(self.trained)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            stream.load_state_dict(checkpoint["stream"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    in_the_epoch = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, "saved", every_n_train_steps=save_at
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        callbacks=[in_the_epoch],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), train_dataloaders=stream, ckpt_path=resume)
    if not (folder / "saved.ckpt").exists():
        trainer.save_checkpoint(folder / "saved.ckpt")
    return trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save_at", "saved"),
    [(8, 8), (10, 10), (100, 14)],
    ids=["first step of an epoch", "mid-epoch", "end of training"],
)
def test_lightning_resumes_at_the_batch_after_the_last_one_it_trained_on(
    films: Any, tmp_path: Path, undisturbed: Trained, save_at: int, saved: int
) -> None:
    with FeatureStream(films.features, films.movies, CONFIG) as stream:
        first = fit(stream, tmp_path, epochs=2, save_at=save_at)
    with FeatureStream(films.features, films.movies, CONFIG) as stream:
        checkpoint = tmp_path / "saved.ckpt"
        second = fit(stream, tmp_path, epochs=3, save_at=1000, resume=checkpoint)
    assert first == undisturbed[:14]
    assert second == undisturbed[saved:]


# --- other consumers ------------------------------------------------------------------------------


def test_a_consumer_that_takes_batches_ahead_saves_the_state_after_the_one_it_trained_on(
    films: Any, undisturbed: Trained
) -> None:
    with FeatureStream(films.features, films.movies, CONFIG) as stream:
        ahead = list(stream)
        states = [stream.state_after(batch) for batch in ahead]
        assert stream.state_dict() == states[-1]
    for done, state in enumerate(states, start=1):
        with FeatureStream(films.features, films.movies, CONFIG) as resumed:
            resumed.load_state_dict(state)
            assert record(next(iter(resumed))) == undisturbed[done]


def test_the_state_after_an_early_micro_batch_is_the_start_of_its_step(films: Any) -> None:
    with FeatureStream(films.features, films.movies, CONFIG, accumulation=2) as stream:
        states = [stream.state_after(batch) for batch in stream]
    assert [(each["epoch"], each["step"]) for each in states[:4]] == [
        (0, 0),
        (0, 1),
        (0, 1),
        (0, 2),
    ]
    assert (states[-1]["epoch"], states[-1]["step"]) == (1, 0)


class Wrapper(torch.utils.data.IterableDataset[Batch]):
    def __init__(self, stream: FeatureStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.stream)


def test_on_one_rank_accelerates_data_loader_is_refused_since_it_takes_a_batch_ahead(
    films: Any,
) -> None:
    from accelerate.data_loader import prepare_data_loader

    with FeatureStream(films.features, films.movies, CONFIG) as stream:
        loader = torch.utils.data.DataLoader(Wrapper(stream), batch_size=None)
        assert next(iter(loader)).step == 0
        prepared = prepare_data_loader(loader, num_processes=1, process_index=0)
        with pytest.raises(ConfigError, match=r"DataLoaderShard.*pass the stream itself"):
            next(iter(prepared))


def test_a_batch_is_a_dict_for_trainers_that_want_one(films: Any) -> None:
    with FeatureStream(films.features, films.movies, CONFIG, partners=True) as stream:
        batch = next(iter(stream))
    values = batch.as_dict()
    assert values["features"] is batch.features
    assert (values["epoch"], values["step"], values["last_micro"]) == (0, 0, True)
    assert batch.partner is not None
    assert values["partner"]["movie"] is batch.partner.movie
    assert "partner" not in batch.partner.as_dict()
