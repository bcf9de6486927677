"""Speed of reports, of searches by text, and of the extraction of key frames.

    python tests/bench/bench_eval.py [--quick] [--json FILE] [--scratch FOLDER]

All use one feature set of rows of 512 values. ``score`` is a report on 220 movies without
intervals: reads, the default model on four windows per movie, baselines and curves. ``bootstrap``
draws 1,000 times for the model and two baselines, as a report does. ``search`` ranks all shots;
``numpy`` only reads the same rows, movie by movie, with ``numpy.fromfile``. ``key frames`` extracts
those of a 720p H.264 video, as ``predict`` and a dump of videos do. Files are in the page cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turns import Measured, Row, Run, Turn, cpu_ms, main, median, take_turns

if TYPE_CHECKING:
    from configs.schema import Config

TRAIN, SCORED, ROWS, DIM, GENRES, SHARD = 330, 220, 600, 512, 21, 22
"""Movies by split, rows per movie, values per row, genres, movies per shard."""

FILM, FILM_S, FPS = "film.mp4", 20, 24
"""The video: its file, duration in seconds and frames per second."""

GIGABYTES = (TRAIN + SCORED) * ROWS * DIM * 2 / 1e9


# --- the data -------------------------------------------------------------------------------------


def make_features(folder: Path) -> None:
    """Seal a feature set of random rows, three per shot."""
    import numpy as np

    from configs.schema import GENRES as NAMES
    from sharding.features import MovieFeatures, publish_feature_shard, seal_features
    from sharding.labels import Labels, make_labels
    from sharding.storage.local import DiskStorage

    values = np.random.default_rng(0)

    def labels_for(ids: Sequence[str]) -> Labels:
        genres = {
            movie: [NAMES[number % GENRES], NAMES[number // GENRES % GENRES]]
            for number, movie in enumerate(ids)
        }
        split = {movie: "train" if k < TRAIN else "val" for k, movie in enumerate(ids)}
        return make_labels(ids, NAMES, genres, split)[0]

    storage, n_shards = DiskStorage(folder), (TRAIN + SCORED) // SHARD
    for shard in range(n_shards):
        content = [
            MovieFeatures(
                f"tt{shard * SHARD + number:07d}",
                values.standard_normal((ROWS, DIM), np.float32).astype(np.float16),
                np.arange(ROWS, dtype=np.int32) // 3,
                ROWS,
            )
            for number in range(SHARD)
        ]
        publish_feature_shard(storage, shard, content, input_digest="bench")
    provenance = {"import": {"name": "bench", "dedup": False}, "dim": DIM}
    seal_features(storage, n_shards=n_shards, provenance=provenance, labels_for=labels_for)


def make_film(path: Path) -> None:
    """Write a 720p video of about 3 Mbit/s: panning shots of two to five seconds, with grain."""
    import av
    import numpy as np
    from PIL import Image

    values = np.random.default_rng(0)
    grains = values.normal(0, 8, (4, 720, 1280, 1)).astype(np.int16)
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        stream.bit_rate = 3_000_000
        begin = cut = 0
        for number in range(FILM_S * FPS):
            if number == cut:
                coarse = values.integers(0, 255, (24, 40, 3), dtype=np.uint8)
                large = Image.fromarray(coarse).resize((1600, 720), Image.Resampling.BICUBIC)
                wide = np.asarray(large).astype(np.int16)
                begin, cut = number, number + int(values.integers(2 * FPS, 5 * FPS))
            left = 2 * (number - begin)
            pixels = np.clip(wide[:, left : left + 1280] + grains[number % 4], 0, 255)
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _config(data: Path, out: Path) -> Config:
    from configs.schema import Config

    return Config.model_validate(
        {
            "version": 1,
            "data": {"root": str(out), "runs": str(out)},
            "encoder": {"name": "bench"},
            "stream": {"features_url": str(data), "window": 256, "global_batch": 32},
            "training": {"run_name": "run", "epochs": 1, "holdout": 0, "device": "cpu"},
            "eval": {"checkpoint": "last", "bootstrap": 0},
            "tracking": {"wandb": "off"},
        }
    )


# --- the ways -------------------------------------------------------------------------------------


def score(data: Path, out: Path) -> Run:
    """Return a report of a run of one epoch, without intervals."""
    from configs.runtime.launch import start
    from eval.evaluate import evaluate
    from training.loop import train

    config = _config(data, out)
    distributed = start(device="cpu", precision="fp32", accumulation=1, expected_world_size=1)
    try:
        train(config, distributed)
    finally:
        distributed.close()

    def run() -> Mapping[str, float]:
        result = evaluate(config)
        assert result is not None
        return {"movies": result.report.compared.movies}

    return run


def bootstrap(data: Path, out: Path) -> Run:  # noqa: ARG001  # every way gets both
    """Return 1,000 draws of the scored movies for a model and two baselines."""
    import numpy as np

    from eval.intervals import bootstrap, draw_weights

    random = np.random.default_rng(0)
    labels_MG = (random.random((SCORED, GENRES)) < 0.15).astype(np.uint8)
    scores = [random.random((SCORED, GENRES)) for _ in range(3)]

    def run() -> None:
        weights_RM = draw_weights(SCORED, 1000, seed=0)
        for scores_MG in scores:
            bootstrap(labels_MG, scores_MG, weights_RM)

    return run


def search(data: Path, out: Path) -> Run:  # noqa: ARG001
    """Return a search over all rows."""
    import numpy as np

    from eval.shot_search import search
    from sharding.features import open_features

    features = open_features(str(data))
    vector_D = np.random.default_rng(1).standard_normal(DIM, np.float32)
    vector_D /= np.linalg.norm(vector_D)

    def run() -> None:
        assert len(search(features, vector_D, 20).hits) == 20

    return run


def by_numpy(data: Path, out: Path) -> Run:  # noqa: ARG001
    """Return reads of the same rows."""
    import numpy as np

    from sharding.features import open_features

    features = open_features(str(data))
    places = [
        (data / features.shard_file(movie), int(features.index.offset[movie]))
        for movie in range(len(features))
    ]

    def run() -> None:
        for file, offset in places:
            assert np.fromfile(file, np.float16, ROWS * DIM, offset=offset).size == ROWS * DIM

    return run


def key_frames(data: Path, out: Path) -> Run:  # noqa: ARG001
    """Return the extraction of the key frames of the film."""
    import av  # noqa: F401  # imported here, before the clock starts
    import scenedetect  # noqa: F401

    from sharding.dump.key_frames import read_shots

    def run() -> Mapping[str, float]:
        return {"shots": sum(1 for _ in read_shots(data.parent / FILM))}

    return run


WAYS = {
    "score": score,
    "bootstrap": bootstrap,
    "search": search,
    "numpy": by_numpy,
    "key frames": key_frames,
}


# --- the table ------------------------------------------------------------------------------------


def measure(quick: bool, scratch: Path) -> Measured:
    """Measure all ways; search and numpy in alternating turns."""
    repeats = 3 if quick else 5
    data = scratch / "features"
    make_features(data)
    make_film(scratch / FILM)
    turns: dict[str, list[Turn]] = {}
    for names in (("score",), ("bootstrap",), ("search", "numpy"), ("key frames",)):
        ways = {name: (name,) for name in names}
        turns |= take_turns(ways, data=data, scratch=scratch, repeats=repeats)
    return Measured(
        rows=_rows(turns),
        turns=turns,
        method=f"{SCORED} movies of {ROWS} x {DIM} scored, {TRAIN} to fit the baselines, default "
        f"model, 4 windows of 256; search and numpy in turn over {GIGABYTES:.2f} GB in the page "
        f"cache; key frames of {FILM_S} s of 1280 x 720 H.264 at {FPS} frames/s; median of "
        f"{repeats} turns after one discarded",
        title=f"{TRAIN + SCORED} movies of {ROWS} rows, {repeats} turns",
    )


def _rows(turns: Mapping[str, Sequence[Turn]]) -> list[Row]:
    seconds = {name: median(measured) for name, measured in turns.items()}
    rate = {name: f"{GIGABYTES / seconds[name]:.2f} GB/s" for name in ("search", "numpy")}
    ratio = seconds["numpy"] / seconds["search"]
    frame_rate = f"{FILM_S * FPS / seconds['key frames']:.0f} frames/s"
    cpu = cpu_ms(turns["key frames"], FILM_S * FPS)
    return [
        Row.at_most("score_220_s", seconds["score"], 10),
        Row.at_most("bootstrap_1000_s", seconds["bootstrap"], 5),
        Row("numpy", rate["numpy"], "", 1.0, "", None),
        Row.at_least("search_gbps_vs_read", ratio, 0.5, rate["search"]),
        Row.at_least("keyframes_vs_realtime", FILM_S / seconds["key frames"], 8, frame_rate, cpu),
    ]


if __name__ == "__main__":
    main(__doc__, WAYS, measure, ("torch", "numpy", "scikit-learn", "av", "scenedetect-headless"))
