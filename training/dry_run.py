"""What a run would do, in words: from the index alone, no feature is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.data_stats import DataStats
from training.registry import BUILT_IN, build_model, count_parameters, options_of
from training.split_selection import choose_movies, open_labelled
from training.stream.preview import preview as preview_stream

if TYPE_CHECKING:
    from configs.schema import Config


def preview(config: Config, *, ranks: int, ranks_per_node: int | None = None) -> str:
    """Return the lines of ``training plan``.

    Raises:
        MovieNetError: data and configuration do not go together.
    """
    features = open_labelled(config)
    training = config.training
    movies = choose_movies(features, training)
    given = DataStats.neutral(
        dim=features.dim, n_genres=len(features.labels.genres), frames=config.stream.window
    )
    model = build_model(config.model.class_, config.model.options, given)
    epoch = preview_stream(
        features,
        movies.train,
        config.stream,
        world_size=ranks,
        ranks_per_node=ranks_per_node,
        accumulation=training.grad_accumulation,
        shuffle_frames=training.shuffle_frames,
        partners=training.mixup > 0,
    )
    return "\n".join(
        (
            f"features    {config.features_url}   {len(features.movie_ids):,} movies, "
            f"dim {features.dim}, data {features.digest[:12]}",
            f"movies      train {len(movies.train):,}   holdout {len(movies.holdout):,}   "
            f"{training.monitor_split or 'watched'} {len(movies.monitored):,}",
            f"model       {config.model.class_}   {count_parameters(model):,} parameters",
            epoch.text,
            f"run         {config.run_dir}   {training.epochs} epochs, "
            f"{training.epochs * epoch.steps:,} steps",
        )
    )


def describe_models(*, dim: int, n_genres: int, frames: int) -> str:
    """Return one line a built-in model: its name, parameters and options with defaults."""
    given = DataStats.neutral(dim=dim, n_genres=n_genres, frames=frames)
    lines = [f"for rows of {dim}, {n_genres} genres, windows of {frames} rows:"]
    for name in BUILT_IN:
        parameters = count_parameters(build_model(name, {}, given))
        options = "  ".join(f"{key}={value!r}" for key, value in options_of(name).items())
        lines.append(f"{name:<42} {parameters:>10,} parameters   {options}")
    return "\n".join(lines)
