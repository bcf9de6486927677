"""One fuzz target per parser: a corpus of small valid files, how they are mutated, and the parser.

Each example is written to a file, which is read as the product reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from configs.load import load_config
from configs.runtime.attempt import read_attempt
from configs.tensor_files import read_tensors
from encoders.decode import Decoder, Preprocessing
from encoders.encode_plan import EncodePlan
from eval.prediction import read_prediction
from sharding.dump.archives import open_source
from sharding.dump.jpeg import BadImage, jpeg_defect, undecodable
from sharding.dump.listing import Listing
from sharding.dump.scan import read_movies
from sharding.dump.video import read_frames, read_header
from sharding.format import tar
from sharding.format.encoding import read_npy_header
from sharding.format.index import FeatureIndex, FrameIndex
from sharding.format.manifest import Manifest, Sidecar
from sharding.format.names import movie_id, movie_name
from sharding.format.plan import Plan
from sharding.index_tars import index_tars
from sharding.label_files import read_split_file
from sharding.labels import Labels, read_genres, read_metadata
from slurm.freeze import open_submission
from slurm.records import read_lives
from tests.hostile import corpus
from tests.hostile.mutations import mutated, mutated_json, with_checksums
from tests.sharding.external_films import config_of
from training.export import load_exported
from training.metrics_file import read_progress

Mutate = Callable[[Sequence[bytes]], st.SearchStrategy[bytes]]


@dataclass(frozen=True)
class Target:
    """A parser under test."""

    file: str
    """Name of the file that is written for each example, below its folder."""

    corpus: Callable[[], Sequence[bytes]]
    parse: Callable[[Path], object]
    mutate: Mutate = mutated
    reasons: tuple[type[Exception], ...] = ()
    """Exceptions of the module besides the product's own, e.g. why an image is rejected."""


def _from_bytes(parser: Callable[[bytes, str], object]) -> Callable[[Path], object]:
    return lambda path: parser(path.read_bytes(), path.name)


def _yaml(files: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    tokens = (
        b"&a ", b"*a", b"<<: *a\n", b"<<: ", b"!!python/object/apply:os.system [touch canary]",
        b"!!binary ", b"!!timestamp ", b"!!set {", b"!!omap ", b"!!pairs ", b"!!int ", b"!!float ",
        b"? ", b"- " * 50, b"{" * 500, b"|2\n", b"%YAML 9.9\n", b"---\n", b"...\n", b"\t", b".inf",
        b"190:20:30", b"0b2", b"=", b"<<: [1, 2]\n", b"'", b'"\\x', b"? [a]\n: b\n", b"? {a: b}\n",
        b"data:\n", b"  root: 1\n", b"a: &a [*a]\n",
    )  # fmt: skip
    return mutated(files, tokens)


def _tar(files: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    sizes = (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0", b"0o777\0")
    pax = (b"20 size=99999999999\n", b"13 path=../x\n", b"22 GNU.sparse.major=1\n", b"9 size=-1\n")
    return mutated(files, (*sizes, *pax, *(b"123456LKxgSDV"[k : k + 1] for k in range(13)))).map(
        with_checksums
    )


def _pickle(files: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    return mutated(files, _CODE)


_CODE = (
    b"cposix\nsystem\n(S'touch canary'\ntR",
    b"\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85R",
    b"cbuiltins\nbytearray\n(I999999999999\ntR", b"cbuiltins\nbytes\n(I99999999\ntR",
    b"cbuiltins\nlist\n", b"cbuiltins\nstr\n", b"(lp0\n", b"2", b"h\x00", b"\x81", b"b", b"R",
    b"\x93", b"\x80\xff", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f",
    b"r\xff\xff\xff\xff", b"L" + b"9" * 4400 + b"L\n", b"\x8a\xff", b"\x8b\xff\xff\xff\x7f",
    b"i__main__\nx\n", b"\x82\x01",
)  # fmt: skip


def _weights_pickle(files: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Change the pickle in a zip of weights, with the right check sum, or any byte of the file."""

    def of(archive: bytes) -> st.SearchStrategy[bytes]:
        if not archive.startswith(b"PK"):
            return mutated([archive], _CODE)
        table = corpus.member_of(archive, "/data.pkl")
        inner = mutated([table], _CODE)
        return inner.map(lambda data: corpus.with_member(archive, "/data.pkl", data))

    return st.sampled_from(files).flatmap(of) | mutated(files)


def _model(path: Path) -> object:
    from encoders.clip import read_model  # imports OpenCLIP, which takes seconds

    return read_model(str(path))


def _npy(path: Path) -> object:
    with path.open("rb") as file:
        size = path.stat().st_size
        header = read_npy_header(file, size, path.name)
        return header.file_bytes


def _tar_members(path: Path) -> object:
    with path.open("rb") as file:
        listed = list(tar.members(file, path.name))
        files = tar.by_name(listed)
        return list(tar.follow_links(listed, lambda _: files))


def _dump(path: Path) -> object:
    """Search the dump in the folder, and read the images of its movies as ``build`` does."""
    reasons = []
    for movie in read_movies(path.parent):
        with open_source(path.parent, movie.source) as source:
            for image in source.images:
                buffer = memoryview(bytearray(image.size))
                reasons.append(source.read_into(image, buffer) or jpeg_defect(buffer))
    return reasons


def _jpeg(path: Path) -> object:
    data = memoryview(path.read_bytes())
    return jpeg_defect(data), undecodable(data)


@cache
def _decoder() -> Decoder:
    half = (0.5, 0.5, 0.5)
    return Decoder(Preprocessing(32, 32, half, half))


def _decode(path: Path) -> object:
    return _decoder().decode(path.read_bytes(), np.zeros((32, 32, 3), np.uint8))


def _video(path: Path) -> object:
    read_header(path)
    return sum(frame.n_bytes for frame in read_frames(path))


def _external(path: Path) -> object:
    return index_tars(config_of(path.parents[1], str(path.parent)))


def _name(path: Path) -> object:
    name = path.read_bytes().decode("utf-8", "surrogateescape")
    written = movie_id(name)
    assert written.isascii()
    assert written == name or movie_name(written) == name
    return written


def _metadata(path: Path) -> object:
    return read_metadata(path.read_bytes(), path.name, ("Drama", "Comedy"))


TARGETS = {
    "config YAML": Target("config.yaml", corpus.configs, load_config, _yaml),
    "plan JSON": Target("plan.json", corpus.plans, _from_bytes(Plan.from_bytes), mutated_json),
    "sidecar JSON": Target(
        "frames-00000.json", corpus.sidecars, _from_bytes(Sidecar.from_bytes), mutated_json
    ),
    "manifest JSON": Target(
        "manifest.json", corpus.manifests, _from_bytes(Manifest.from_bytes), mutated_json
    ),
    "encode plan JSON": Target(
        "plan.json", corpus.encode_plans, _from_bytes(EncodePlan.from_bytes), mutated_json
    ),
    "attempt JSON": Target("attempt-1.json", corpus.attempts, read_attempt, mutated_json),
    "slurm record JSON": Target(
        "attempt-1.json", corpus.attempts, lambda path: read_lives(path.parent), mutated_json
    ),
    "submission JSON": Target(
        "submit-1/jobs.json",
        corpus.submissions,
        lambda path: open_submission(path.parents[1]),
        mutated_json,
    ),
    "prediction JSON": Target("prediction.json", corpus.predictions, read_prediction, mutated_json),
    "metrics JSON lines": Target("metrics.jsonl", corpus.metrics, read_progress),
    "movie JSON": Target("tt1.json", corpus.genres, _from_bytes(read_genres), mutated_json),
    "metadata JSON": Target("genres.json", corpus.tables, _metadata, mutated_json),
    "split JSON": Target("split.json", corpus.splits, read_split_file, mutated_json),
    "model JSON": Target("model.json", corpus.models, _model, mutated_json),
    "metadata CSV": Target("genres.csv", corpus.csv_tables, _metadata),
    "metadata pickle": Target("genres.pkl", corpus.pickles, _metadata, _pickle),
    "npy header": Target("tt1.npy", corpus.npy_files, _npy),
    "frame index npz": Target("x.npz", corpus.frame_indexes, _from_bytes(FrameIndex.from_bytes)),
    "feature index npz": Target(
        "x.npz", corpus.feature_indexes, _from_bytes(FeatureIndex.from_bytes)
    ),
    "labels npz": Target("labels.npz", corpus.labels, _from_bytes(Labels.from_bytes)),
    "listing npz": Target("listing.npz", corpus.listings, _from_bytes(Listing.from_bytes)),
    "tar members": Target("tt1.tar", corpus.tars, _tar_members, _tar),
    "movie tar": Target("tt1.tar", corpus.tars, _dump, _tar),
    "movie tar.gz": Target("tt1.tar.gz", corpus.gzipped_tars, _dump),
    "movies zip": Target("movies.zip", corpus.zips, _dump),
    "feature tar": Target("tars/clip-000.tar", corpus.external_tars, _external, _tar),
    "image check": Target("x.jpg", corpus.images, _jpeg),
    "image decode": Target("x.jpg", corpus.images, _decode, reasons=(BadImage,)),
    "video": Target("tt1.mp4", corpus.videos, _video),
    "safetensors": Target("w.safetensors", corpus.safetensors, read_tensors),
    "export": Target("w.safetensors", corpus.exports, load_exported),
    "torch checkpoint": Target("w.pt", corpus.checkpoints, read_tensors, _weights_pickle),
    "TorchScript archive": Target("w.pt", corpus.torchscripts, read_tensors, _weights_pickle),
    "movie name": Target("name", lambda: (b"tt1", b"a b", "Am\u00e9lie".encode()), _name),
}
