"""Preview of a run, computed from the feature index without reading features."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from training.data_stats import DataStats
from training.loss import make_loss
from training.registry import BUILT_IN, build_model, count_parameters, options_of
from training.split_selection import choose_movies, open_labelled, warn_of_other_data
from training.stream.preview import preview as preview_stream

if TYPE_CHECKING:
    from configs.schema import Config

_COLUMNS = 80


def preview(config: Config, *, ranks: int, ranks_per_node: int | None = None) -> str:
    """Return the text of ``movienet-train preview``.

    Args:
        config: Configuration of the run.
        ranks: World size.
        ranks_per_node: Ranks that share a cache; default: all.

    Raises:
        MovieNetError: data and configuration are inconsistent.
    """
    features = open_labelled(config)
    warn_of_other_data(config, features)
    training = config.training
    movies = choose_movies(features, training)
    data_stats = DataStats.neutral(
        dim=features.dim, n_genres=len(features.labels.genres), frames=config.stream.window
    )
    model = build_model(config.model.class_, config.model.options, data_stats)
    make_loss(training.loss, data_stats.prior, len(movies.train))  # `run` would refuse it
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
    # Locations may be long: they are alone on their lines.
    return "\n".join(
        (
            f"features    {config.features_url}",
            f"            {len(features.movie_ids):,} movies   dim {features.dim}   "
            f"data {features.digest[:12]}",
            f"movies      train {len(movies.train):,}   holdout {len(movies.holdout):,}   "
            f"{training.monitor_split or 'monitored'} {len(movies.monitored):,}",
            f"model       {config.model.class_}   {count_parameters(model):,} parameters",
            epoch.text,
            f"run         {config.run_dir}",
            f"            {training.epochs} epochs, {training.epochs * epoch.steps:,} steps",
        )
    )


def describe_models(*, dim: int, n_genres: int, frames: int) -> str:
    """Return name, size and default options of each built-in model.

    Args:
        dim: Feature size.
        n_genres: Number of genres.
        frames: Rows of a window.
    """
    data_stats = DataStats.neutral(dim=dim, n_genres=n_genres, frames=frames)
    blocks = [f"sizes for dim {dim}, {n_genres} genres and windows of {frames} rows:"]
    for name in BUILT_IN:
        parameters = count_parameters(build_model(name, {}, data_stats))
        options = "  ".join(f"{key}={value!r}" for key, value in options_of(name).items())
        blocks.append(f"\n{name:<48} {parameters:>10,} parameters")
        blocks.append(textwrap.indent(textwrap.fill(options, _COLUMNS - 4), "    "))
    return "\n".join(blocks)
