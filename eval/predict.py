"""Genres of films that are in no feature set: encode, score, and explain.

N = key frames of the film (rows), S = its shots, D = feature size, G = genres
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from configs.errors import ConfigError, DataError, StateError
from configs.runtime.progress import progress
from encoders.decode import Decoder
from encoders.registry import Tower, make_tower, pick_device, resolve_precision
from eval.film_scoring import FilmScoring, Logits, Rows, sigmoid
from eval.films import Film, open_film
from eval.model import load_model, newest
from eval.origin import describe_origin
from eval.prediction import GenrePrediction, KeyFrame, ModelFacts, Prediction, TimelinePoint
from sharding.dump.jpeg import BadImage
from training.stream.view import View

if TYPE_CHECKING:
    from configs.schema import Config, EncoderConfig
    from sharding.dump.shot_detection import DetectorName
    from training.checkpoint import Trained, Which

logger = logging.getLogger(__name__)

KEY_FRAMES = 3
"""Key frames per genre."""

STRIP = 24
"""Pictures of the filmstrip."""

_BATCH = 32
"""Key frames of a forward pass of the encoder."""


class Predictor:
    """A trained model with the image encoder of its features."""

    def __init__(
        self, trained: Trained, config: Config, tower: Tower, encoding: _Encoding, where: str
    ) -> None:
        self._trained, self._config, self._where = trained, config, where
        self._tower, self._encoding = tower, encoding
        self._device = encoding.device
        self._model = trained.model.to(self._device).eval()
        self._view = View.of(trained.config, config.eval.windows)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        config: Config | None = None,
        checkpoint: Which | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> Predictor:
        """Load a model and build the encoder that it records.

        Args:
            path: Folder of a run, checkpoint folder, or export file.
            config: Location of the encoder and of the dump; default: that of the run.
            checkpoint: The checkpoint of a run; default: ``best``, or ``last`` without a holdout.
            device: Where both run.

        Raises:
            ConfigError: there is no such model, or its encoder must be specified.
            DataError: weights of the encoder are missing.
            StateError: the encoder differs from the recorded one.
        """
        trained = load_model(Path(path), checkpoint or newest(Path(path)))
        used = config or trained.config
        encoding = _encoding(trained, config, pick_device(device), str(path))
        tower = make_tower(encoding.config, encoding.device, encoding.precision)
        _check_encoder(trained, tower, encoding, str(path))
        logger.info("%s", tower.description)
        return cls(trained, used, tower, encoding, str(path))

    def __call__(self, film: str | Path, *, shots: DetectorName = "pyscenedetect") -> Prediction:
        """Return the genres of a film.

        Args:
            film: A video, a folder of frames, or the id of a movie of ``data.dump``.
            shots: Detector of the shots of a video.

        Raises:
            ConfigError: there is no such film.
            DataError: it is corrupt, or the model's logits are not finite.
            MachineError: the extra ``[video]`` is not installed.
        """
        with open_film(str(film), self._config, shots) as opened:
            rows_ND, used = self._encode(opened)
            scoring = self._scoring(opened, rows_ND, used)
            logits_G = scoring.film_logits()
            if not np.isfinite(logits_G).all():
                raise DataError(f"{film}: {self._where} returns logits that are not finite")
            return self._prediction(opened, scoring, logits_G)

    def _encode(self, film: Film) -> tuple[Rows, list[int]]:
        """Return the rows, float16 ``[N, D]``, and the numbers of the stills that they encode."""
        encoding = self._encoding
        decoder = Decoder(self._tower.preprocessing)
        height, width = self._tower.preprocessing.height, self._tower.preprocessing.width
        rows: list[Rows] = []
        used: list[int] = []
        with progress(len(film.stills), label=f"encode {film.title}", unit="images") as bar:
            for begin in range(0, len(film.stills), _BATCH):
                numbers = range(begin, min(begin + _BATCH, len(film.stills)))
                # Always full: the size of a batch affects the last bit.
                pixels = np.zeros((_BATCH, height, width, 3), np.uint8)
                good = [n for n in numbers if _decode(decoder, film, n, pixels[n - begin])]
                images = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
                features_BD = self._tower.encode(images)
                if encoding.normalize:
                    features_BD = normalize(features_BD, dim=-1)
                kept = [number - begin for number in good]
                rows.append(features_BD.to(torch.float16).cpu().numpy()[kept])
                used += good
                bar.advance(len(numbers))
        if not used:
            raise DataError(f"{film.title}: none of its {len(film.stills)} frames can be decoded")
        return np.concatenate(rows), used

    def _scoring(self, film: Film, rows_ND: Rows, used: Sequence[int]) -> FilmScoring:
        shot_N = np.array([film.stills[number].shot for number in used])
        return FilmScoring(self._model, self._device, self._view, rows_ND, shot_N, len(film.shots))

    def _prediction(self, film: Film, scoring: FilmScoring, logits_G: Logits) -> Prediction:
        trained = self._trained
        contributions, group = scoring.contributions()
        points, shots_per_point = scoring.timeline()
        order = np.argsort(-logits_G, kind="stable")
        thresholds = trained.genre_thresholds or (trained.threshold,) * len(trained.genres)
        genres = []
        for g in order.tolist():
            probability = float(sigmoid(logits_G[g]))
            genres.append(
                GenrePrediction(
                    genre=trained.genres[g],
                    probability=probability,
                    threshold=thresholds[g],
                    predicted=probability >= thresholds[g],
                    key_frames=_key_frames(film, contributions, g, group),
                )
            )
        strip = _strip(film)
        stills = {one.still for genre in genres for one in genre.key_frames} | strip.keys()
        encoder, untrained = describe_origin(trained.provenance)
        return Prediction(
            film=film.title,
            kind=film.kind,
            duration_s=film.duration_s,
            shots=len(film.shots),
            frames=len(scoring.rows_ND),
            scored_frames=scoring.n_scored,
            genres=tuple(genres),
            timeline=tuple(_point(film, first, after, p_G) for first, after, p_G in points),
            timeline_genres=trained.genres,
            shots_per_point=shots_per_point,
            strip=strip,
            contribution="occlusion",
            model=ModelFacts(
                model=trained.config.model.class_,
                run=trained.config.training.run_name,
                epoch=trained.epoch,
                step=trained.step,
                encoder=encoder,
                untrained=untrained,
            ),
            notes=tuple(self._notes(film, scoring, group)),
            stills={
                number: data for number in sorted(stills) if (data := film.read(number)) is not None
            },
        )

    def _notes(self, film: Film, scoring: FilmScoring, group: int) -> list[str]:
        notes = list(self._encoding.notes)
        n_frames, n_bad = len(scoring.rows_ND), len(film.stills) - len(scoring.rows_ND)
        if n_bad:
            notes.append(f"{n_bad} of {len(film.stills)} frames cannot be decoded.")
        if scoring.n_scored < n_frames:
            notes.append(
                f"The probabilities are computed from {scoring.n_scored} of {n_frames} key frames, "
                f"as in a report ({self._view.windows} windows of {self._view.frames}); pass "
                "--config FILE eval.windows=whole to use all."
            )
        if group > 1:
            notes.append(f"Contributions are those of {group} adjacent shots at once.")
        return notes


# --- the encoder ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoding:
    """How key frames become rows, as recorded by the model."""

    config: EncoderConfig
    device: torch.device
    precision: str
    normalize: bool
    notes: tuple[str, ...] = ()


def _encoding(
    trained: Trained, config: Config | None, device: torch.device, where: str
) -> _Encoding:
    record = trained.provenance.get("encoder")
    if record is None:
        return _assumed(config, device, where)
    encoder = (config or trained.config).encoder
    for key in ("model", "pretrained"):
        if str(getattr(encoder, key)).startswith("…/"):
            raise ConfigError(
                f"{where}: encoder.{key}: got {getattr(encoder, key)!r}, of which an export "
                "contains only the name; pass --config FILE with the encoder of the features"
            )
    precision, notes = _precision(str(record["precision"]), device)
    return _Encoding(encoder, device, precision, bool(record["normalize"]), notes)


def _assumed(config: Config | None, device: torch.device, where: str) -> _Encoding:
    """Return the encoder that the user specifies for a model of imported features."""
    if config is None or "model" not in config.encoder.model_fields_set:
        raise ConfigError(
            f"{where}: trained on imported features, which name no encoder; pass --config FILE "
            "encoder.model=NAME encoder.pretrained=TAG with the encoder that computed them, e.g. "
            "encoder.model=ViT-B-32-quickgelu encoder.pretrained=openai"
        )
    encoder = config.encoder
    weights = "" if encoder.is_custom else f" with {encoder.pretrained or 'random'} weights"
    note = (
        f"The model was trained on imported features, which name no encoder. {encoder.model}"
        f"{weights} is assumed; if another one computed them, the figures carry no information."
    )
    precision = resolve_precision(encoder.precision, device)
    return _Encoding(encoder, device, precision, encoder.normalize, (note,))


def _precision(recorded: str, device: torch.device) -> tuple[str, tuple[str, ...]]:
    """Return the recorded precision if the device has it, else fp32 with a note."""
    if recorded == "fp32" or resolve_precision("auto", device) == recorded:
        return recorded, ()
    if recorded == "fp16" and device.type == "cuda":
        return recorded, ()
    note = f"Encoded in fp32, because this device has no {recorded}, the precision of the features."
    return "fp32", (note,)


def _check_encoder(trained: Trained, tower: Tower, encoding: _Encoding, where: str) -> None:
    """Raise ``StateError`` if the tower is not the one whose features the model was trained on."""
    if tower.dim != trained.dim:
        raise StateError(
            f"{where}: got an encoder of {tower.dim} values ({tower.name}), want {trained.dim} as "
            "in its features; set encoder.model"
        )
    record = trained.provenance.get("encoder")
    if record is None:
        return
    actual = {**tower.provenance, "preprocessing": tower.preprocessing.as_dict()}
    for key in ("architecture", "weights", "preprocessing"):
        if actual[key] != record[key]:
            raise StateError(
                f"{where}: encoder {key}: got {_short(actual[key])} "
                f"({_named(encoding.config.model, tower.provenance)}), trained on features of "
                f"{_short(record[key])} ({_named(record['name'], record)}); pass --config FILE "
                "with that encoder"
            )


def _named(model: object, encoder: Mapping[str, object]) -> str:
    """Return model and weights; a custom encoder need not take ``pretrained``."""
    return f"{model}, {encoder['pretrained']}" if "pretrained" in encoder else str(model)


def _short(value: object) -> str:
    return f"sha256 {value[:12]}" if isinstance(value, str) else str(value)


def _decode(decoder: Decoder, film: Film, still: int, out_HW3: NDArray[np.uint8]) -> bool:
    """Write a key frame's pixels; return whether it can be decoded."""
    data = film.read(still)
    try:
        if data is not None:
            decoder.decode(data, out_HW3)
    except BadImage as error:
        logger.warning("%s: %s: %s", film.title, film.stills[still].name, error)
        return False
    return data is not None


# --- explanation ----------------------------------------------------------------------------------


def _key_frames(film: Film, drop_SG: Logits, genre: int, group: int) -> tuple[KeyFrame, ...]:
    """Return the strongest positive contributions, one per group of shots."""
    drop_S = drop_SG[:, genre]
    # The shot in the middle of each group represents it.
    places = [min(first + group // 2, len(drop_S) - 1) for first in range(0, len(drop_S), group)]
    positive = [shot for shot in places if drop_S[shot] > 0]  # nan is not
    strongest = sorted(positive, key=lambda shot: (-drop_S[shot], shot))[:KEY_FRAMES]
    middle = _middle_stills(film)
    return tuple(
        KeyFrame(
            still=middle[shot],
            name=film.stills[middle[shot]].name,
            shot=film.shots[shot].number,
            time_s=film.stills[middle[shot]].time_s,
            drop=float(drop_S[shot]),
        )
        for shot in strongest
    )


def _middle_stills(film: Film) -> Mapping[int, int]:
    """Return the number of the middle key frame of each shot."""
    by_shot: dict[int, list[int]] = {}
    for number, still in enumerate(film.stills):
        by_shot.setdefault(still.shot, []).append(number)
    return {shot: numbers[len(numbers) // 2] for shot, numbers in by_shot.items()}


def _strip(film: Film) -> dict[int, float | None]:
    """Return the key frames of the filmstrip, of shots at equal distances, with their times."""
    middle = _middle_stills(film)
    n_shown = min(STRIP, len(film.shots))
    places = [(2 * k + 1) * len(film.shots) // (2 * n_shown) for k in range(n_shown)]
    return {middle[place]: film.stills[middle[place]].time_s for place in places}


def _point(film: Film, first: int, after: int, p_G: NDArray[np.float64]) -> TimelinePoint:
    return TimelinePoint(
        first_shot=first,
        begin_s=film.shots[first].begin_s,
        end_s=film.shots[after - 1].end_s,
        probabilities=tuple(p_G.tolist()),
    )
