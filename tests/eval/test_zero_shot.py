"""The zero-shot baseline ranks movies by the similarity of their rows to texts about a genre."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import GENRES
from encoders.text import TextTower
from eval.evaluate import evaluate
from eval.zero_shot import read_prompts, zero_shot_logits
from sharding.features import open_features, read_rows
from tests.eval.conftest import configuration, train_run
from training.baselines import mean_rows
from training.split_selection import split_movies

pytestmark = pytest.mark.slow


class Letters:
    """Text encoder that gives each text a random but fixed vector."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        seeds = [zlib.crc32(text.encode()) for text in texts]
        vectors = np.stack([np.random.default_rng(seed).normal(size=6) for seed in seeds])
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / lengths, np.float32)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_score_is_the_mean_cosine_of_rows_and_the_mean_vector_of_the_templates(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "p.txt", "# mine\na {genre} film\n\nsome {genre}\nSci-Fi = science\n")
    prompts = read_prompts(path)
    means = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    got = zero_shot_logits(Letters(), prompts, ["Drama", "Sci-Fi"], means)
    for genre, texts in enumerate(
        [["a drama film", "some drama"], ["a science film", "some science"]]
    ):
        vector = Letters().encode(texts).mean(axis=0)
        want = 100 * means @ (vector / np.linalg.norm(vector))
        assert got[:, genre] == pytest.approx(want, abs=1e-3)


def test_the_prompts_of_the_product_name_all_its_genres_in_plain_words() -> None:
    prompts = read_prompts(None)
    assert set(prompts.words) <= set(GENRES)
    assert "a still from a science fiction film" in prompts.texts("Sci-Fi")
    assert "a still from a horror film" in prompts.texts("Horror")
    texts = [text for genre in GENRES for text in prompts.texts(genre)]
    assert len(set(texts)) == len(GENRES) * len(prompts.templates)
    assert not [text for text in texts if "{" in text]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a film\n", "line 1: got 'a film', want a template with {genre} or NAME = WORDS"),
        ("a {genre}\nSci-Fi =\n", "line 2: got 'Sci-Fi =', want"),
        ("# nothing\nSci-Fi = space\n", "got no template, want a line with {genre}"),
    ],
)
def test_a_file_that_is_none_of_prompts_is_one_line(tmp_path: Path, text: str, reason: str) -> None:
    path = write(tmp_path / "p.txt", text)
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"eval.prompts: {path}: {reason}")


def test_files_that_cannot_be_read_as_text_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_prompts(str(tmp_path / "none.txt"))
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe{genre}")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_prompts(str(tmp_path / "p.txt"))


def test_a_report_compares_the_model_with_zero_shot_where_the_tower_has_a_text_side(
    encoded: Path,
) -> None:
    config = load_config(encoded / "config.yaml")
    train_run(config)
    result = evaluate(config)
    assert result is not None
    report = result.report
    assert report.notes[-1].startswith("Genres with fewer")
    *_, row = report.baselines
    assert row.name == "zero-shot CLIP"
    assert "3 templates such as “a still from a {genre} film”" in row.note
    features = open_features(config.features_dir)
    scored = split_movies(features, "val", None)
    tower = TextTower.of(config.encoder, features.manifest.provenance, "")
    means = mean_rows(read_rows(features, int(movie)) for movie in scored)
    logits = zero_shot_logits(tower, read_prompts(None), GENRES, means)
    labels = features.labels.hot_MG[scored]
    has_movie = labels.any(axis=0)
    want = average_precision_score(labels[:, has_movie], logits[:, has_movie], average="macro")
    assert row.mean_ap.value == pytest.approx(want, abs=1e-9)

    weights = encoded / "model" / "weights.pt"
    hidden = weights.rename(weights.with_suffix(".hidden"))
    try:
        result = evaluate(config)
    finally:
        hidden.rename(weights)
    assert result is not None
    assert [one.name for one in result.report.baselines] == ["class prior", "mean-pool + linear"]
    assert result.report.notes[0].startswith("No baseline zero-shot CLIP: encoder.pretrained: got")


def test_a_report_on_imported_features_states_that_their_text_tower_is_unknown(
    trained: Path,
) -> None:
    result = evaluate(configuration(trained, eval={"bootstrap": 0}))
    assert result is not None
    assert re.match(
        "No baseline zero-shot CLIP: .*: imported features, whose text tower is unknown; ",
        result.report.notes[0],
    )


def test_the_file_is_relative_to_the_configuration(tmp_path: Path) -> None:
    demo = load_config("demo")
    path = tmp_path / "c.yaml"
    path.write_text(
        f"version: 1\ndata: {{dump: {demo.data.dump}, root: r}}\nencoder: {{name: a}}\n"
        "training: {run_name: a}\neval: {prompts: mine.txt}\n"
    )
    assert load_config(path).eval.prompts == str(tmp_path / "mine.txt")
