"""Speed of encoding, compared with OpenCLIP's transform and the approach of clip-retrieval.

    python tests/bench/bench_encoding.py [--quick] [--json FILE] [--scratch FOLDER]

All ways take turns in one run. The first turn is discarded, the median of the others counts. Each
way is a separate process whose imports are not counted, except for ``start``, the lines that
``movienet-encode plan`` prints. A stub replaces a GPU that takes no time, so that only the input
pipeline matters. Rates per core are images per second of CPU time in one thread.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turns import (
    Measured,
    Row,
    Run,
    Turn,
    Ways,
    cpu_ms,
    main,
    median,
    median_of,
    skip_absent,
    take_turns,
)

if TYPE_CHECKING:
    import torch

    from configs.schema import Config
    from encoders.decode import Preprocessing
    from encoders.extract import Extractor
    from encoders.registry import Tower

CHECKOUT = Path(__file__).resolve().parents[2]
THREADS = 2
BATCH = 256
SIZES = (*[(426, 240)] * 6, *[(576, 240)] * 3, (320, 240))
"""Width and height of each of ten movies."""

MODEL, TOWER_BATCH = "ViT-B-32", 32
"""Untrained: the weights do not affect the time."""


# --- the data -------------------------------------------------------------------------------------


def make_frames(folder: Path, *, movies: int, shots: int) -> int:
    """Write a dump of JPEGs of about 33 KB, build and seal its frame shards; return the images."""
    (folder / "dump").mkdir(parents=True)
    for movie in range(movies):
        name = f"tt{movie:07d}"
        scenes = [_scene(10 * movie + key, *SIZES[movie % len(SIZES)]) for key in range(6)]
        draw = random.Random(movie)
        with tarfile.open(folder / "dump" / f"{name}.tar", "w") as archive:
            for frame in range(3 * shots):
                data = _with_comment(draw.choice(scenes), draw.randbytes(16))
                info = tarfile.TarInfo(f"shot_{frame // 3:04d}_img_{frame % 3}.jpg")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    _build(folder)
    return movies * shots * 3


def _scene(seed: int, width: int, height: int) -> bytes:
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (height // 20, width // 20, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = generator.normal(0, 5, (height, width, 1))
    buffer = io.BytesIO()
    pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _with_comment(jpeg: bytes, comment: bytes) -> bytes:
    """Return a JPEG with an added comment, so that its bytes are unique."""
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


def _config(data: Path, out: Path, **encoder: object) -> Config:
    from configs.schema import Config

    settings = {
        "name": "bench",
        "model": MODEL,
        "pretrained": None,
        "precision": "fp32",
        "batch_size": BATCH,
        "threads": THREADS,
        "device": "cpu",
    }
    return Config.model_validate(
        {
            "version": 1,
            "data": {"dump": str(data / "dump"), "root": str(out)},
            "sharding": {"shard_bytes": 24_000_000},
            "encoder": {**settings, **encoder},
            "training": {"run_name": "none"},
            "tracking": {"wandb": "off"},
        }
    )


def _build(folder: Path) -> None:
    from sharding.build import build_shards, plan_for_build
    from sharding.seal import seal_frames
    from sharding.storage.open import open_storage

    config = _config(folder, folder)
    storage = open_storage(config.frames_dir)
    plan = plan_for_build(storage, config)
    numbers = range(len(plan.shards))
    build_shards(storage, folder / "dump", plan, numbers, max_bad_fraction=0)
    seal_frames(storage, max_bad_fraction=0)


def _jpegs(data: Path, limit: int | None = None) -> list[bytes]:
    """The JPEGs of the set; with a limit so many, evenly spaced."""
    from encoders.shard_reader import ReadBuffers, open_shard, read_by_index
    from sharding.frames import open_frames

    frames = open_frames(_config(data, data).frames_dir)
    shards = [open_shard(frames, number) for number in range(frames.n_shards)]
    images = [
        bytes(image)
        for shard in shards
        for batch in read_by_index(frames, shard, [range(len(shard.index))], ReadBuffers())
        for image in batch
    ]
    return images if limit is None else images[:: max(1, len(images) // limit)][:limit]


# --- decode and preprocess ------------------------------------------------------------------------


def decode(data: Path) -> Run:
    """Decode each image by compiled code, by Pillow alone and by OpenCLIP, in one thread.

    Returns the CPU seconds of each.
    """
    import numpy as np
    import open_clip
    import torch
    from PIL import Image

    from encoders.decode import Decoder
    from encoders.resize import PillowResizer

    torch.set_num_threads(1)
    jpegs = _jpegs(data, _sizes(data)["few"])
    transform = open_clip.image_transform(224, is_train=False)
    ours, fallback = Decoder(_preprocessing()), Decoder(_preprocessing(), PillowResizer())
    out = np.empty((224, 224, 3), np.uint8)
    ways: dict[str, Callable[[bytes], object]] = {
        "openclip": lambda jpeg: transform(Image.open(io.BytesIO(jpeg))),
        "decode": lambda jpeg: ours.decode(jpeg, out),
        "fallback": lambda jpeg: fallback.decode(jpeg, out),
    }

    def run() -> Mapping[str, float]:
        seconds = dict.fromkeys(ways, 0.0)
        for jpeg, (name, way) in itertools.product(jpegs, ways.items()):
            start = time.thread_time()
            way(jpeg)
            seconds[name] += time.thread_time() - start
        return seconds

    return run


def decode_threads(data: Path) -> Run:
    """Decode all frames from memory, in as many threads as the input pipeline has."""
    import numpy as np
    import torch

    from encoders.decode import Decoder

    torch.set_num_threads(1)
    decoder, jpegs = Decoder(_preprocessing()), _jpegs(data)
    out = np.empty((BATCH, 224, 224, 3), np.uint8)
    pool = ThreadPoolExecutor(THREADS)

    def piece(start: int) -> None:
        for number in range(start, min(start + 16, len(jpegs))):
            decoder.decode(jpegs[number], out[number % BATCH])

    def run() -> None:
        list(pool.map(piece, range(0, len(jpegs), 16)))

    return run


def _preprocessing() -> Preprocessing:
    import open_clip

    from encoders.decode import Preprocessing

    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return Preprocessing(height=224, width=224, mean=mean, std=std)


# --- feeding an encoder that takes no time --------------------------------------------------------


class Stub:
    """A tower that takes no time."""

    def __init__(self) -> None:
        import torch

        self.name, self.dim, self.description = "stub", 512, "stub"
        self.preprocessing = _preprocessing()
        self.provenance: Mapping[str, object] = {"name": "stub"}
        self._features_BD = torch.zeros(BATCH, self.dim)

    def encode(self, _frames_BCHW: torch.Tensor) -> torch.Tensor:
        """Return zeros ``[B, 512]``."""
        return self._features_BD

    @classmethod
    def fetch(cls, _config: object) -> None:
        """Return None: a stub has no weights."""

    def versions(self) -> Mapping[str, str]:
        """Return nothing: no library computes the zeros."""
        return {}


def extractor(data: Path, out: Path, tower: Tower, **encoder: object) -> Extractor:
    """Build the product's encoder, from a sealed frame set to published feature shards."""
    import torch

    from encoders.encode_plan import make_plan
    from encoders.extract import Extractor
    from encoders.frame_source import PersistentFrames
    from sharding.frames import open_frames
    from sharding.storage.open import open_storage

    config = _config(data, out, **encoder)
    frames = PersistentFrames(open_frames(_config(data, data).frames_dir))
    plan = make_plan(config.encoder, tower, "fp32", frames)
    return Extractor(
        config.encoder,
        plan,
        tower,
        torch.device("cpu"),
        frames=frames.shards,
        features=open_storage(config.features_dir),
    )


def feed_stub(data: Path, out: Path) -> Run:
    """Encode all frames with the stub and publish them; returns the seconds to the first batch."""
    import torch

    torch.set_num_threads(1)
    tower, turns = Stub(), itertools.count()

    def run() -> Mapping[str, float]:
        begin = time.perf_counter()
        ends: list[float] = []

        def watch(*_: object) -> bool:
            ends.append(time.perf_counter())
            return True

        made = extractor(data, out / str(next(turns)), tower)
        made.run(range(made.n_shards), watch)
        return {"first_batch_s": ends[0] - begin}

    return run


def feed_clip_retrieval(data: Path) -> Run:
    """Read with webdataset, OpenCLIP's transform and two worker processes into float32 batches."""
    import open_clip
    import webdataset
    from PIL import Image
    from torch.utils.data import DataLoader

    transform = open_clip.image_transform(224, is_train=False)
    tars = [str(path) for path in sorted((data / "frames").glob("*.tar"))]

    def pixels(sample: Mapping[str, Any]) -> Any:
        return transform(Image.open(io.BytesIO(sample["jpg"])))

    def run() -> None:
        samples = webdataset.WebDataset(tars, shardshuffle=False).map(pixels)
        for _ in DataLoader(samples, batch_size=BATCH, num_workers=THREADS, prefetch_factor=2):
            pass

    return run


# --- a real encoder -------------------------------------------------------------------------------


def tower(data: Path, out: Path) -> Run:
    """Run the tower on pixels in memory, then encode and publish as many frames.

    Returns the seconds of both, the difference of pixels to OpenCLIP, and the effect of bf16.
    """
    import torch

    from encoders.registry import make_tower

    torch.set_num_threads(THREADS)
    config = _config(data, data).encoder
    made = make_tower(config, torch.device("cpu"), "fp32")
    figures = _differences(data, made, make_tower(config, torch.device("cpu"), "bf16"))
    pixels = torch.randint(0, 255, (TOWER_BATCH, 3, 224, 224), dtype=torch.uint8)
    batches, turns = -(-_sizes(data)["tower_images"] // TOWER_BATCH), itertools.count()

    def run() -> Mapping[str, float]:
        start = time.perf_counter()
        for _ in range(batches):
            made.encode(pixels)
        middle = time.perf_counter()
        ours = extractor(data / "few", out / str(next(turns)), made, batch_size=TOWER_BATCH)
        ours.run(range(ours.n_shards))
        end = time.perf_counter()
        return {"model": middle - start, "end to end": end - middle, **figures}

    return run


def _differences(data: Path, tower: Tower, rough: Tower) -> dict[str, float]:
    """Return the largest 1 - cosine of bf16 to fp32, and the largest pixel difference to OpenCLIP.

    Args:
        data: Folder of the frames.
        tower: A tower in fp32.
        rough: The same tower in bf16.
    """
    import numpy as np
    import open_clip
    import torch
    from PIL import Image

    from encoders.decode import Decoder

    jpegs = _jpegs(data, 16)
    ours_BHW3 = np.empty((len(jpegs), 224, 224, 3), np.uint8)
    decoder = Decoder(tower.preprocessing)
    for jpeg, pixels_HW3 in zip(jpegs, ours_BHW3, strict=True):
        decoder.decode(jpeg, pixels_HW3)
    *steps, _to_float, _normalize = open_clip.image_transform(224, is_train=False).transforms
    images: list[Any] = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]
    for step in steps:
        images = [step(image) for image in images]
    pixels_B3HW = torch.from_numpy(ours_BHW3).permute(0, 3, 1, 2)
    fp32, bf16 = (made.encode(pixels_B3HW).double() for made in (tower, rough))
    return {
        "bf16 loss": float((1 - torch.cosine_similarity(fp32, bf16)).max()),
        "pixels": float(np.abs(np.stack(images).astype(int) - ours_BHW3).max()),
    }


def start(data: Path, out: Path) -> Run:
    """Plan an encoding by the command; returns when it prints lines.

    Returns the seconds to the first one, which names the tower, and the longest time between two.
    """
    from configs.load import dump_config

    frames = _config(data / "few", data / "few").frames_dir
    file, turns = out / "config.yaml", itertools.count()

    def run() -> Mapping[str, float]:
        config = _config(data, out / str(next(turns)), frames_url=str(frames))
        file.write_text(dump_config(config))
        command = [sys.executable, "-m", "encoders", "plan", "--config", str(file)]
        times = [time.perf_counter()]
        with subprocess.Popen(
            command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            times += [time.perf_counter() for _ in process.stdout or ()]
        if process.returncode:
            raise SystemExit("movienet-encode plan failed")
        silence = max(after - before for before, after in itertools.pairwise(times))
        return {"tower_named_s": times[1] - times[0], "longest_silence_s": silence}

    return run


# --- measuring ------------------------------------------------------------------------------------


WAYS: Ways = {
    "decode": lambda data, _: decode(data),
    "decode in threads": lambda data, _: decode_threads(data),
    "stub": feed_stub,
    "clip-retrieval": lambda data, _: feed_clip_retrieval(data),
    "tower": tower,
    "start": start,
}
NEEDS = {"clip-retrieval": "webdataset"}


def _sizes(data: Path) -> dict[str, int]:
    """Return the numbers of images that ``measure`` has stored for the processes of the ways."""
    sizes: dict[str, int] = json.loads((data / "sizes.json").read_text())
    return sizes


def measure(quick: bool, scratch: Path) -> Measured:
    """Run all ways in turn."""
    movies, shots, few, repeats = (10, 35, 100, 3) if quick else (20, 68, 300, 5)
    data = scratch / "data"
    images = make_frames(data, movies=movies, shots=shots)
    tower_images = make_frames(data / "few", movies=4, shots=4 if quick else 16)
    (data / "sizes.json").write_text(json.dumps({"few": few, "tower_images": tower_images}))
    # Libraries must not start more threads than the product.
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    names = skip_absent(WAYS, NEEDS)
    ways = {name: (name,) for name in names}
    turns = take_turns(ways, data=data, scratch=scratch, repeats=repeats)
    return Measured(
        rows=_rows(turns, images, few, tower_images),
        turns=turns,
        title=f"{images:,} images, batch {BATCH}, {THREADS} threads, {repeats} turns",
        method=f"{images} JPEGs of 426x240, 576x240 and 320x240, about 33 KB; ways in turn, one "
        f"turn discarded, median of {repeats}; separate processes, imports and models not "
        f"counted, page cache warm; rates per core by CPU time of one thread over {few} images, "
        "the three ways in turn for each; "
        f"feeding in batches of {BATCH} by {THREADS} threads or workers, wall clock, start of "
        f"workers and publishing included; {MODEL} untrained in fp32 over {tower_images} images "
        "in batches of 32",
    )


def _rows(
    turns: Mapping[str, Sequence[Turn]], images: int, few: int, tower_images: int
) -> list[Row]:
    def core(name: str, goal: float) -> Row:
        seconds = median_of(turns["decode"], name)
        value = median_of(turns["decode"], "openclip") / seconds
        rate, cpu = f"{few / seconds:,.0f} img/s/core", f"{seconds / few * 1000:.3f}"
        return Row.at_least(f"{name}_vs_openclip", value, goal, rate, cpu)

    def against(ratio: str, peer: str, goal: float) -> list[Row]:
        if peer not in turns:
            return []
        rate = f"{images / median(turns['stub']):,.0f} img/s"
        # Turn by turn, so that other load on the machine affects both sides of a ratio.
        pairs = zip(turns[peer], turns["stub"], strict=True)
        value = statistics.median(other.seconds / ours.seconds for other, ours in pairs)
        return [Row.at_least(ratio, value, goal, rate, cpu_ms(turns["stub"], images))]

    seconds = median_of(turns["tower"], "end to end")
    task = median_of(turns["tower"], "model") / seconds
    rate = f"{tower_images / seconds:,.0f} img/s"
    return [
        core("decode", 3.7),
        core("fallback", 1.35),
        Row.at_least("end_to_end_vs_model", task, 0.93, rate),
        *against("stub_vs_decode", "decode in threads", 0.85),
        *against("stub_vs_clip_retrieval", "clip-retrieval", 4.0),
        Row.at_most("first_batch_s", median_of(turns["stub"], "first_batch_s"), 10),
        Row.at_most("tower_named_s", median_of(turns["start"], "tower_named_s"), 1),
        Row.at_most("longest_silence_s", median_of(turns["start"], "longest_silence_s"), 5),
        Row.at_most("pixel_difference", median_of(turns["tower"], "pixels"), 0),
        Row(
            "bf16_feature_loss", "1 - cosine", "", median_of(turns["tower"], "bf16 loss"), "", None
        ),
    ]


if __name__ == "__main__":
    libraries = ("torch", "open_clip_torch", "pillow", "simplejpeg", "webdataset", "numpy")
    main(__doc__, WAYS, measure, versions=libraries)
