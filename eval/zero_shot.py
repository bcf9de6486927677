"""The zero-shot baseline: a movie has a genre if its rows are similar to a text that names it.

M = movies, D = feature size, G = genres, T = templates
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError
from configs.runtime.files import open_file

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "zero-shot CLIP"

_LOGIT_SCALE = 100.0
"""Scale of cosines in trained CLIP models. It changes no ranking."""

_PLACE = "{genre}"


class TextEncoder(Protocol):
    """A text tower; ``encoders.text.TextTower``."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one L2-normalised vector per text, float32 ``[T, D]``."""


@dataclass(frozen=True)
class Prompts:
    """Content of a file of prompts."""

    templates: tuple[str, ...]
    """Texts with ``{genre}``."""

    words: Mapping[str, str]
    """Words for genres whose names are poor prompts."""

    def texts(self, genre: str) -> list[str]:
        """Return the prompts of a genre, one per template."""
        words = self.words.get(genre, genre.lower())
        return [template.replace(_PLACE, words) for template in self.templates]


def read_prompts(path: str | None) -> Prompts:
    """Read a file of prompts; None: the one of this package.

    Raises:
        ConfigError: the file does not exist, contains no template, or a line that is neither
            template nor ``NAME = WORDS``.
    """
    where = f"eval.prompts: {path}"
    try:
        text = _read(path)
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file, want a file of prompts") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text: {error.reason}") from error
    templates, words = [], {}
    for number, line in _lines(text):
        name, equals, replacement = line.partition("=")
        if _PLACE in line:
            templates.append(line)
        elif equals and name.strip() and replacement.strip():
            words[name.strip()] = replacement.strip()
        else:
            raise ConfigError(
                f"{where}: line {number}: got {line!r}, want a template with {_PLACE} or "
                "NAME = WORDS"
            )
    if not templates:
        raise ConfigError(f"{where}: got no template, want a line with {_PLACE}")
    return Prompts(tuple(templates), words)


def zero_shot_logits(
    tower: TextEncoder, prompts: Prompts, genres: Sequence[str], means_MD: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return the mean cosine of a movie's rows and a genre, times 100, float64 ``[M, G]``.

    Args:
        tower: Text tower that belongs to the rows.
        prompts: Its vectors of a genre are averaged over the templates, then L2-normalised.
        genres: The vocabulary.
        means_MD: ``training.baselines.mean_row`` of each movie.
    """
    texts = [text for genre in genres for text in prompts.texts(genre)]
    vectors_GTD = tower.encode(texts).reshape(len(genres), len(prompts.templates), -1)
    genre_GD = vectors_GTD.mean(axis=1, dtype=np.float64)
    genre_GD /= np.linalg.norm(genre_GD, axis=1, keepdims=True)
    logits_MG: NDArray[np.float64] = _LOGIT_SCALE * (means_MD @ genre_GD.T)
    return logits_MG


def _read(path: str | None) -> str:
    if path is None:
        return files("eval").joinpath("prompts.txt").read_text("utf-8")
    with open_file(Path(path)) as file:
        return file.read().decode()


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield number and content of each line that is neither empty nor a comment."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()
