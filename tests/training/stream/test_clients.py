"""Real trainers and loaders as consumers of the stream: on resume, none skips a window."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from tests.snippets import run_snippet, snippet
from tests.training.launched import TIMEOUT_S
from tests.training.stream import lightning_client
from tests.training.stream.lightning_client import CONFIG, N_ROWS, Trained, fit, record
from training.stream.batch import Batch
from training.stream.loader import FeatureStream

# Lightning warns of all that it would like: srun, checkpoints, workers, learning rate schedules.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:::lightning", "ignore:::lightning_utilities"),
]


EPOCHS = 3
CHECKOUT = Path(__file__).parents[3]
README = CHECKOUT / "training" / "stream" / "README.md"


@pytest.fixture(scope="module")
def films(make_films: Callable[..., Any]) -> Any:
    return make_films(N_ROWS)


@pytest.fixture(scope="module")
def undisturbed(films: Any) -> Trained:
    with FeatureStream(films.features, films.movies, CONFIG) as stream:
        return [record(batch) for _ in range(EPOCHS) for batch in stream]


# --- Lightning ------------------------------------------------------------------------------------


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


def test_lightning_on_two_ranks_resumes_at_the_batch_after_the_last_one_it_trained_on(
    make_films: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("lightning")
    films_url = str(tmp_path / "films")
    films = make_films(N_ROWS, folder=Path(films_url))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [sys.executable, *launcher, lightning_client.__file__, films_url, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    subprocess.run(command, check=True, timeout=TIMEOUT_S, env=environment)
    for rank in range(2):
        first, second = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        with FeatureStream(films.features, films.movies, CONFIG, rank=rank, world_size=2) as stream:
            expected = [list(record(batch)) for _ in range(EPOCHS) for batch in stream]
        assert first == expected[:14]
        assert second == expected[10:]


# --- Hugging Face Trainer -------------------------------------------------------------------------


def fit_hugging_face(
    stream: FeatureStream, folder: Path, *, epochs: int, save_at: int, resume: bool = False
) -> Trained:
    """Train with transformers' Trainer as the README shows; it fetches one batch ahead."""
    transformers = pytest.importorskip("transformers")
    trained: Trained = []

    class Recording(run_snippet(snippet(README, "With transformers' Trainer"))["Trainer"]):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
            trained.append(record(inputs["batch"]))
            return super().compute_loss(model, inputs, **options)

    checkpoint = folder / f"checkpoint-{save_at}"
    if resume:
        stream.load_state_dict(json.loads((checkpoint / "stream.json").read_text()))
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        save_steps=save_at,
        ignore_data_skip=True,  # the stream is at its position already
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
    )
    Recording(stream, model=torch.nn.Linear(8, 3), args=arguments).train(
        resume_from_checkpoint=str(checkpoint) if resume else None
    )
    return trained


def test_hugging_faces_trainer_resumes_at_the_batch_after_the_last_one_it_trained_on(
    films: Any, tmp_path: Path, undisturbed: Trained
) -> None:
    with FeatureStream(films.features, films.movies, CONFIG) as stream:
        first = fit_hugging_face(stream, tmp_path, epochs=2, save_at=10)
    with FeatureStream(films.features, films.movies, CONFIG) as stream:
        second = fit_hugging_face(stream, tmp_path, epochs=3, save_at=10, resume=True)
    assert first == undisturbed[:14]
    assert second == undisturbed[10:]


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
