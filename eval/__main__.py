"""``movienet-eval``: score and report, compare runs, predict genres of films, search by text."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from configs.errors import ConfigError, DataError, MovieNetError, error_text
from configs.runtime.cli import CommandGroup, echo, run, want_folder

if TYPE_CHECKING:
    from configs.schema import Config

commands = CommandGroup(
    "movienet-eval", "Evaluate and compare models, predict genres of films, search shots by text."
)
logger = logging.getLogger("eval")

_OVERRIDE = re.compile(r"[a-z_]+\.[a-z_.]+=")
"""A configuration key, as opposed to the name of a run such as ``lr=1e-3``."""


@commands.command(example="eval.split=test", takes_run=True)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Export file, run or checkpoint folder.  [default: the run of the configuration]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=want_folder,
    metavar="FOLDER",
    help="Folder of the report.  [default: RUN/report/SPLIT, or NAME-report/SPLIT next to PATH]",
)
def report(config: Config, run: Path | None, model: Path | None, out: Path | None) -> None:
    """Score a model on eval.split and write its report.

    RUN is the folder of a run. Without --config its own configuration is used.

    The report is report.html, report.md, report.json and pictures, with the predictions in
    predictions.csv and predictions.npz. The model is that of training.run_name, by its checkpoint
    eval.checkpoint. Alone or under `accelerate launch`.
    """
    model = model or run
    # The imports below take seconds.
    logger.info("report: checkpoint %s of %s", config.eval.checkpoint, model or config.run_dir)
    from configs.runtime.tracking import upload_report
    from configs.runtime.wandb_files import last_run_id, offline_segments
    from eval.evaluate import evaluate
    from eval.model import report_dir
    from eval.predictions import write_predictions
    from eval.render import render_table, uploads, write_report

    result = evaluate(config, model)
    if result is None:  # rank 0 writes the report
        return
    folder = out or report_dir(model or config.run_dir, config.eval.split)
    # The report contains the digest of the predictions.
    paths = write_predictions(folder, result.predictions) | write_report(folder, result.report)
    echo(render_table(result.report))
    echo(f"report: {paths['report.html']}")
    # A run that was not tracked has no group on the dashboard to which pictures belong.
    if config.tracking.upload == "report" or last_run_id(config.run_dir):
        pictures, files = uploads(paths, config.tracking.upload)
        step = result.report.compared.step
        upload_report(config, folder, pictures=pictures, files=files, step=step)
    for segment in (*offline_segments(model or config.run_dir), *offline_segments(folder)):
        echo(f"wandb, offline: wandb leet inspect --summary {segment}")


@commands.command(example='"a car chase at night" --top 50')
@click.argument("query")
@click.option(
    "--top", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Shots to list."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=want_folder,
    metavar="FOLDER",
    help="Folder of the page.  [default: RUNS/search/QUERY]",
)
@click.option("--no-stills", is_flag=True, help="Draw the page without pictures.")
def search(config: Config, query: str, top: int, out: Path | None, *, no_stills: bool) -> None:
    """List the shots that are most similar to a text, over all films of a feature set.

    The features must be those of an OpenCLIP model whose weights are on this machine. The page
    search.html shows a still of each shot, if the frame shards are stored; search.json contains
    the same data.
    """
    logger.info("search: %s, loading PyTorch", config.features_dir)
    from eval.search_forms import render_table, search_folder, write_search
    from eval.text_search import search_text

    result = search_text(config, query, top=top, with_stills=not no_stills)
    paths = write_search(out or search_folder(config.run_dir.parent, query), result)
    echo(render_table(result))
    echo()
    echo(f"page: {paths['search.html']}")


@click.command("predict", epilog="Example: movienet-eval predict trailer.mp4 --model RUN")
@click.argument("words", nargs=-1, required=True, metavar="FILM... [KEY=VALUE]...")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PATH",
    help="Export file, run or checkpoint folder.",
)
@click.option(
    "--config",
    "config_path",
    metavar="FILE",
    help="Config with encoder and dump.  [default: that of the model]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=want_folder,
    default=Path("predictions"),
    show_default=True,
    metavar="FOLDER",
    help="Folder for FILM/prediction.html and .json.",
)
@click.option("--no-stills", is_flag=True, help="Draw the page without pictures.")
@click.option(
    "--shots",
    type=click.Choice(["pyscenedetect", "transnetv2"]),
    default="pyscenedetect",
    show_default=True,
    help="Detector of the shots of a video.",
)
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    help="Checkpoint of a run.  [default: best if any]",
)
@click.option("--debug", is_flag=True, help="Log details and show full tracebacks.")
def predict(
    words: tuple[str, ...],
    model: Path,
    config_path: str | None,
    out: Path,
    no_stills: bool,  # noqa: FBT001  # click passes by name
    shots: Literal["pyscenedetect", "transnetv2"],
    checkpoint: Literal["best", "last"] | None,
    debug: bool,  # noqa: FBT001
) -> None:
    """Predict the genres of films.

    FILM is a video, a folder of frames, or the id of a movie of data.dump. The key frames are
    encoded by the encoder that the model records. Nothing is uploaded.
    """
    from configs.runtime.logs import start_logging

    start_logging(debug=debug)
    config, films = _config_and_films(config_path, words)
    logger.info("predict: %d films by %s, loading PyTorch", len(films), model)
    from eval.predict import Predictor
    from eval.prediction_page import render_text, write_prediction

    predictor = Predictor.load(model, config=config, checkpoint=checkpoint)
    failed: list[str] = []
    for film in films:
        try:
            prediction = predictor(film, shots=shots)
        except (MovieNetError, OSError) as error:
            if len(films) == 1:
                raise
            failed.append(error_text(error))
            logger.error("%s", failed[-1])
            continue
        page, _ = write_prediction(out / prediction.folder, prediction, stills=not no_stills)
        echo(render_text(prediction))
        echo(f"\npage: {page}\n")
    if failed:
        raise DataError(f"{len(failed)} of {len(films)} films failed, the first: {failed[0]}")


def _config_and_films(
    config_path: str | None, words: Sequence[str]
) -> tuple[Config | None, list[str]]:
    """Return the configuration, None without ``--config``, and the films among the words."""
    from configs.load import load_config
    from configs.runtime.hints import remember_arguments

    overrides = [word for word in words if _OVERRIDE.match(word)]
    films = [word for word in words if word not in overrides]
    if not films:
        raise ConfigError("FILM: got none, want a video, a folder of frames or the id of a movie")
    if config_path is None and overrides:
        raise ConfigError(f"{overrides[0]}: got no --config FILE, which it would change; pass one")
    if config_path is None:
        return None, films
    remember_arguments(config_path, overrides)
    return load_config(Path(config_path), overrides), films


commands.add_command(predict)


@click.command("compare", epilog="Example: movienet-eval compare runs/a runs/b --split test")
@click.argument("words", nargs=-1, metavar="RUN RUN... [KEY=VALUE]...")
@click.option("--config", "config_path", metavar="FILE", help="Config file whose runs have names.")
@click.option("--split", help="Split of the reports.  [default: eval.split of --config, else val]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=want_folder,
    metavar="FOLDER",
    help="Folder of compare.json and compare.html.  [default: compare in the first report]",
)
@click.option("--debug", is_flag=True, help="Log details and show full tracebacks.")
def compare_runs(
    words: tuple[str, ...],
    config_path: str | None,
    split: str | None,
    out: Path | None,
    debug: bool,  # noqa: FBT001  # click passes by name
) -> None:
    """Compare the reports of runs on the same movies, paired, and average over seeds.

    RUN is the name of a run of --config, or the path of a run, an export, a checkpoint folder or
    the folder of a report. The first RUN is the reference.
    """
    from configs.runtime.hints import remember_arguments
    from configs.runtime.logs import start_logging

    start_logging(debug=debug)
    overrides = [word for word in words if _OVERRIDE.match(word)]
    config = _config_of_runs(config_path, overrides)
    remember_arguments(config_path, overrides)
    from eval.compare import compare, find_reports
    from eval.compare_forms import render_table, write_comparison

    runs = find_reports(
        [word for word in words if word not in overrides],
        split or (config.eval.split if config else "val"),
        config.run_dir.parent if config else None,
    )
    comparison = compare(runs)
    paths = write_comparison(out or runs[0].folder / "compare", comparison)
    echo(render_table(comparison))
    echo(f"comparison: {paths['compare.html']}")


def _config_of_runs(path: str | None, overrides: Sequence[str]) -> Config | None:
    from configs.load import load_config

    if path is not None:
        return load_config(Path(path), overrides)
    if overrides:
        raise ConfigError(f"--config: missing, {overrides[0]} changes a configuration")
    return None


commands.add_command(compare_runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(commands, argv)


if __name__ == "__main__":
    sys.exit(main())
