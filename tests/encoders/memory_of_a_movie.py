"""Encode the frames of a config in a separate process, and print how its memory grows.

    python memory_of_a_movie.py CONFIG [KEY=VALUE]...

Prints the peak resident memory in MB after a tenth of the images, after nine tenths, and after
publishing; and the number of images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from configs.load import load_config
from encoders.extract import Extractor
from encoders.task import open_stage
from sharding.frames import open_frames


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024


def main() -> None:
    config = load_config(Path(sys.argv[1]), sys.argv[2:])
    stage = open_stage(config, torch.device("cpu"))
    frames = open_frames(config.frames_dir)
    extractor = Extractor(
        config.encoder,
        stage.plan,
        stage.tower,
        stage.device,
        frames=frames,
        features=stage.features,
    )
    tenths: list[float] = []

    def watch(*_: object) -> bool:
        if 10 * extractor.done.images > (len(tenths) + 1) * frames.manifest.samples:
            tenths.append(peak_mb())
        return True

    extractor.run(range(frames.n_shards), watch)
    sys.stdout.write(f"{tenths[0]} {tenths[8]} {peak_mb()} {extractor.done.images}\n")


if __name__ == "__main__":
    main()
