"""What a run would do, in words: from the index alone, no feature is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharding.features import open_features
from training.given import Given
from training.movies import choose_movies
from training.registry import BUILT_IN, build_model, count_parameters, options_of
from training.stream.plan import count_steps, padding_share

if TYPE_CHECKING:
    from configs.schema import Config


def preview(config: Config, *, ranks: int) -> str:
    """Return the lines of ``training plan``.

    Raises:
        MovieNetError: data and configuration do not go together.
    """
    features = open_features(config.features_dir)
    training, stream = config.training, config.stream
    movies = choose_movies(features, training)
    given = Given.neutral(
        dim=features.dim, n_genres=len(features.labels.genres), frames=stream.frames
    )
    model = build_model(config.model.class_, config.model.options, given)
    n_windows = len(movies.train) * stream.windows_per_movie
    parts = ranks * training.accumulation
    steps = count_steps(n_windows, stream.global_batch, drop_last=stream.drop_last)
    rows = features.index.rows[movies.train].clip(max=stream.frames).sum(dtype=int)
    epoch_bytes = int(rows) * stream.windows_per_movie * features.dim * 2
    padding = padding_share(n_windows, stream.global_batch, parts, drop_last=stream.drop_last)
    return "\n".join(
        (
            f"features    {config.features_dir}   {len(features.movie_ids):,} movies, "
            f"dim {features.dim}, data {features.digest[:12]}",
            f"movies      train {len(movies.train):,}   holdout {len(movies.holdout):,}   "
            f"{training.watch or 'watched'} {len(movies.watch):,}",
            f"model       {config.model.class_}   {count_parameters(model):,} parameters",
            f"epoch       {n_windows:,} windows of {stream.frames} rows   {steps:,} steps of "
            f"{stream.global_batch}   {n_windows:,} reads, {epoch_bytes / 1e6:,.1f} MB",
            f"ranks       {ranks} x {training.accumulation} micro-batches   padding {padding:.1%}",
            f"run         {config.run_dir}   {training.epochs} epochs, "
            f"{training.epochs * steps:,} steps",
        )
    )


def describe_models(*, dim: int, n_genres: int, frames: int) -> str:
    """Return one line a built-in model: its name, parameters and options with defaults."""
    given = Given.neutral(dim=dim, n_genres=n_genres, frames=frames)
    lines = [f"for rows of {dim}, {n_genres} genres, windows of {frames} rows:"]
    for name in BUILT_IN:
        parameters = count_parameters(build_model(name, {}, given))
        options = "  ".join(f"{key}={value!r}" for key, value in options_of(name).items())
        lines.append(f"{name:<34} {parameters:>10,} parameters   {options}")
    return "\n".join(lines)
