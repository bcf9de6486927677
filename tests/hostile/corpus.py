"""Small valid files of every format, from which the hostile ones are made."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import warnings
import zipfile
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as save_safetensors

from configs.load import PRESETS
from configs.runtime.attempt import AttemptRecord
from encoders.encode_plan import EncodePlan
from eval.prediction import GenrePrediction, KeyFrame, ModelFacts, Prediction, TimelinePoint
from sharding.dump.listing import Collector
from sharding.format.encoding import canonical_json, npy_bytes
from sharding.format.index import FeatureIndex, FrameIndex
from sharding.format.manifest import Manifest, ManifestShard, Rejected, Sidecar
from sharding.format.plan import Plan, PlanExtension, PlannedMovie
from sharding.labels import Labels
from training.data_stats import DataStats
from training.export import FORMAT
from training.registry import build_model

Files = tuple[bytes, ...]
_DIGEST = "ab" * 32
_GENRES = {"tt1": ["Drama"], "tt2": ["Drama", "Comedy"], "tt3": []}


@cache
def configs() -> Files:
    presets = (path.read_bytes() for path in sorted(PRESETS.glob("*.yaml")))
    aliases = b"data: &a {root: out}\nmodel:\n  options: {<<: *a, x: [*a, 0x1F, 1_0, 1:30, ~]}\n"
    return (*presets, aliases)


@cache
def plans() -> Files:
    rest = ("name", "a.tar", "1:2")
    movies = [PlannedMovie(f"tt{k}", *rest, k or None, 10 * k, k // 2) for k in range(4)]
    extended = Plan(10, tuple(movies), "decode", (PlanExtension(1, _DIGEST),))
    return Plan(10, tuple(movies)).to_bytes(), extended.to_bytes()


def _sidecar() -> Sidecar:
    rejected = (Rejected("tt1", "shot_0000_img_0.jpg", "empty"),)
    counts = {"images": [1, 2], "rows": [3, 4]}
    return Sidecar(
        "frames-00000.tar", 20_480, _DIGEST, 3, ("tt1", "tt2"), _DIGEST, _DIGEST, counts, rejected
    )


@cache
def sidecars() -> Files:
    return (_sidecar().to_bytes(),)


@cache
def manifests() -> Files:
    shard = ManifestShard.of(_sidecar())
    frames = Manifest("frames", {}, (shard, shard), None, None, {"x_a_20b": "a b"})
    provenance = {"encoder": {"name": "vit", "mean": [0.1, 0.2]}, "dim": 4, "frames": _DIGEST}
    return frames.to_bytes(), Manifest("features", provenance, (shard,), _DIGEST).to_bytes()


@cache
def encode_plans() -> Files:
    plan = EncodePlan({"name": "vit", "weights": _DIGEST}, 512, 32, 2, _DIGEST, 3)
    return (plan.to_bytes(),)


@cache
def attempts() -> Files:
    record = AttemptRecord(
        1, "done", 3, "m", "2026-01-01T00:00:00", "2026-01-01T00:01:00", "host", 7, "x", "1"
    )
    return (canonical_json(asdict(record)),)


@cache
def submissions() -> Files:
    job = {"name": "train", "stage": "train", "step": "run", "tasks": 1, "array": None, "offset": 0,
           "after_ok": ["encode"], "after_any": [], "overrides": ["a=1"], "job_id": 7}  # fmt: skip
    return (canonical_json({"label": "x", "jobs": [job, job]}),)


@cache
def metrics() -> Files:
    lines = ({"step": k, "epoch": 0, "kind": "train", "train/loss": 0.5} for k in range(3))
    last = {"step": 3, "epoch": 1, "kind": "validation", "val/map": None}
    return (b"".join(map(canonical_json, (*lines, last))),)


@cache
def predictions() -> Files:
    frames = (KeyFrame(1, "shot_0000_img_1.jpg", 0, 0.5, 0.1),)
    made = Prediction(
        *("A film", "video", 9.5, 2, 6, 6),
        genres=(GenrePrediction("Drama", 0.7, 0.5, True, frames),),
        timeline=(TimelinePoint(0, 0.0, None, (0.7,)),),
        timeline_genres=("Drama",),
        shots_per_point=3,
        strip={1: 0.5, 4: None},
        contribution="occlusion",
        model=ModelFacts("net.py:Net", "run", 3, 9, "ViT", untrained=False),
        notes=("one",),
    )
    return (made.to_json(),)


@cache
def genres() -> Files:
    return canonical_json({"genres": ["Drama", "Comedy"], "id": 1}), b'{"genres": null}'


@cache
def tables() -> Files:
    hot = {movie: [1, 0] for movie in _GENRES}
    nested = {movie: {"genres": names} for movie, names in _GENRES.items()}
    return tuple(map(canonical_json, (_GENRES, hot, nested)))


@cache
def splits() -> Files:
    return (canonical_json({"train": ["tt1"], "val": ["tt2"], "test": ["tt3"]}),)


@cache
def csv_tables() -> Files:
    return b'movie,genres\ntt1,Drama|Comedy\n"tt,2","Drama"\r\n', b"tt1,Drama\n"


@cache
def pickles() -> Files:
    arrays = {"tt1": np.array([1, 0]), "tt2": [np.float32(1), b"x", 2.5, True, None]}
    shared = ["Drama"]
    values: tuple[object, ...] = (_GENRES, arrays, {"a": shared, "b": shared, "c": {1, 2}})
    return tuple(pickle.dumps(value, protocol) for value in values for protocol in (0, 2, 4, 5))


@cache
def npy_files() -> Files:
    rows = np.arange(12, dtype="<f4").reshape(3, 4)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, rows.T, (2, 0))
    python2 = b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 4L)"
    old = python2.ljust(78) + b"}\n" + rows.tobytes()
    return npy_bytes(rows), npy_bytes(rows.astype("<f2")), buffer.getvalue(), old


@cache
def frame_indexes() -> Files:
    columns = {"offset": "u8", "size": "u4", "movie": "u4", "shot": "i4", "image": "i2"}
    index = FrameIndex(**{name: np.arange(3, dtype=f"<{kind}") for name, kind in columns.items()})
    return (index.to_bytes(),)


@cache
def feature_indexes() -> Files:
    numbers = np.arange(3)
    index = FeatureIndex(
        np.array([b"tt1", b"tt2", b"tt3"]),
        numbers.astype("<u4"), numbers.astype("<u8"), numbers.astype("<u4"),
    )  # fmt: skip
    return (index.to_bytes(),)


@cache
def labels() -> Files:
    hot_MG = np.eye(3, 2, dtype=np.uint8)
    table = Labels(("Drama", "Comedy"), hot_MG, np.array(["train", "val", ""]), _DIGEST)
    return (table.to_bytes(),)


@cache
def listings() -> Files:
    collector = Collector("x.zip")
    for k in range(4):
        number = collector.number(f"tt{k // 2}", "name")
        collector.mark_movie(number, folder=True)
        collector.add(number, 100 * k, 100)
    return (collector.listing().to_bytes(),)


@cache
def images() -> Files:
    """Return JPEGs of several kinds, and the other formats that are decoded."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    flat = Image.new("RGB", (40, 20), (200, 30, 90))

    def saved(image: Image.Image, form: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        return buffer.getvalue()

    return (
        saved(flat, "JPEG"),
        saved(noise, "JPEG", quality=60, progressive=True),
        saved(flat.convert("L"), "JPEG"),
        saved(noise.convert("CMYK"), "JPEG"),
        *(saved(flat, form) for form in ("PNG", "GIF", "BMP", "WEBP")),
    )


def movie_files() -> list[tuple[str, bytes]]:
    """Return the images of a movie by name."""
    return [(f"shot_000{k}_img_{k}.jpg", image) for k, image in enumerate(images()[:3])]


@cache
def tars() -> Files:
    """Return tars of images in every format, with links, devices and sparse members."""
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for name, data in movie_files():
                member = tarfile.TarInfo(f"tt1/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
                link = tarfile.TarInfo("tt1/shot_0009_img_0.jpg")
                link.type, link.linkname = kind, "tt1/shot_0000_img_0.jpg"
                archive.addfile(link)
            if form != tarfile.USTAR_FORMAT:
                archive.addfile(tarfile.TarInfo("tt1/" + "x" * 200))
        found.append(buffer.getvalue())
    return tuple(found)


@cache
def gzipped_tars() -> Files:
    return tuple(gzip.compress(tar, 1, mtime=0) for tar in tars())


@cache
def zips() -> Files:
    """Return a stored and a deflated zip of one movie, and one with a tar in it."""
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, data in movie_files():
                archive.writestr(zipfile.ZipInfo(f"tt1/{name}"), data, method)
            archive.writestr(zipfile.ZipInfo("tt2.tar"), tars()[0], method)
            archive.comment = b"comment"
        found.append(buffer.getvalue())
    return tuple(found)


@cache
def external_tars() -> Files:
    """Return feature tars as webdataset writes them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for movie in ("tt0000001", "tt0000002"):
            for suffix, data in (("json", b"{}"), ("features.npy", npy_files()[1])):
                member = tarfile.TarInfo(f"{movie}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return (buffer.getvalue(),)


def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2).half()}


@cache
def safetensors() -> Files:
    return save_safetensors(weights(), {"format": "pt"}), save_safetensors({"x": torch.ones(1)})


@cache
def exports() -> Files:
    """Return an export of a small model, without its digest: its other fields are read."""
    stats, name = DataStats.neutral(dim=4, n_genres=2, frames=8), "training.models.mean:MeanLinear"
    structured = {
        "options": {},
        "data_stats": {key: value.tolist() for key, value in stats.tensors().items()},
        "genres": ["Drama", "Comedy"],
        "threshold": 0.5,
        "frames": 8,
        "provenance": {"dim": 4},
    }
    metadata = {key: json.dumps(value) for key, value in structured.items()}
    model = build_model(name, {}, stats)
    return (save_safetensors(model.state_dict(), metadata | {"format": FORMAT, "class": name}),)


@cache
def checkpoints() -> Files:
    """Return files of ``torch.save`` in both of its formats."""
    found = []
    for tree in (weights(), {"state_dict": weights(), "epoch": 1, "lr": [0.1]}):
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(tree, buffer, _use_new_zipfile_serialization=zipped)
            found.append(buffer.getvalue())
    return tuple(found)


@cache
def torchscripts() -> Files:
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        path, jit = Path(folder) / "net.pt", cast(Any, torch.jit)
        jit.save(jit.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3)), path)
        return (path.read_bytes(),)


def with_member(archive: bytes, end: str, data: bytes) -> bytes:
    """Return a stored zip with other contents of the member whose name has this end."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, data if name.endswith(end) else source.read(name))
    return buffer.getvalue()


def member_of(archive: bytes, end: str) -> bytes:
    """Return the contents of the member of a zip whose name has this end."""
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        (name,) = (name for name in source.namelist() if name.endswith(end))
        return source.read(name)


@cache
def models() -> Files:
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16}
    plain = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": {"width": 32}}
    return canonical_json(plain), canonical_json({"model_cfg": plain, "preprocess_cfg": {}})


@cache
def videos() -> Files:
    from tests.videos import scenes, write_video

    frames = scenes(3, 3, height=32, width=48)
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"x.{suffix}" for suffix in ("mp4", "mkv", "avi")]
        return tuple(
            write_video(path, frames, codec="mpeg4" if path.suffix == ".avi" else "libx264")
            .read_bytes()
            for path in paths
        )  # fmt: skip
