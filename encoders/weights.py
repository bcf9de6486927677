"""Storage of pretrained weights, and the digest that identifies them.

``movienet-encode fetch`` stores weights on a node with internet; jobs never download. With
``encoder.weights_dir`` weights are one file and one JSON record (sha256, preprocessing); otherwise
they are in the cache of the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, uint8

from configs.corrupt import report_corrupt
from configs.errors import DataError, MachineError
from configs.runtime.hints import hint
from configs.runtime.publish import publish_bytes, publishing, unused_name

HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""File names of OpenCLIP weights in a repository of the hub, in order of preference."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """Pretrained weights published by OpenCLIP."""

    model: str
    """OpenCLIP model name."""

    tag: str
    """OpenCLIP tag, e.g. ``openai``."""

    hub: str
    """``owner/repository/`` on the Hugging Face hub, with or without a file name."""

    preprocessing: Mapping[str, object]
    """Mean, std, interpolation and resize mode used in their training."""

    @property
    def repository(self) -> str:
        """``owner/repository`` on the hub."""
        return self.hub.rpartition("/")[0]

    @property
    def files(self) -> tuple[str, ...]:
        """File names in the repository, in order of preference."""
        name = self.hub.rpartition("/")[2]
        return (Path(name).with_suffix(".safetensors").name, name) if name else HUB_NAMES

    @property
    def name(self) -> str:
        """Stem of the files in ``encoder.weights_dir``."""
        return f"{self.model}.{self.tag}"


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes, sorted by name.

    Args:
        state: State dict of the image tower, in the precision of the loaded weights.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {kind} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()


def find_weights(published: Published, weights_dir: str | None) -> Path:
    """Return the local file of pretrained weights; never uses the network.

    Raises:
        DataError: the weights are not on this machine, or differ from the fetched ones.
    """
    if weights_dir is None:
        file, location = _in_hub_cache(published), "the hub's cache"
    else:
        file, location = _in_folder(published, Path(weights_dir)), weights_dir
    if file is None:
        raise DataError(
            f"weights of {published.model} {published.tag!r}: not in {location}; run "
            f"{hint('movienet-encode fetch')} on a node with internet"
        )
    return file


def fetch_again(file: Path) -> str:
    """Return the advice to replace weights that cannot be loaded.

    In the hub's cache the file is a link: if only that is deleted, the same bytes are linked again.
    """
    damaged = file.resolve() if file.is_symlink() else "it"
    return f"delete {damaged} and run {hint('movienet-encode fetch')}"


def has_weights(published: Published, weights_dir: str | None) -> bool:
    """Return whether pretrained weights are on this machine; their bytes are not read."""
    if weights_dir is None:
        return _in_hub_cache(published) is not None
    return _record(published, Path(weights_dir)).is_file()


def store_weights(
    published: Published, weights_dir: str | None, download: Callable[[Path | None], Path]
) -> Path:
    """Download weights to the place where ``find_weights`` looks, and return the file.

    Args:
        published: Weights to download.
        weights_dir: Folder of weights; None for the hub's cache.
        download: Downloads into a folder (None: the hub's cache) and returns the file.
    """
    if weights_dir is None:
        return download(None)
    folder = Path(weights_dir)
    # Kept after a failure, so that the next attempt resumes.
    loading = folder / ".movienet-download"
    file = download(loading)
    target = folder / f"{published.name}{file.suffix}"
    if target.is_file() and not _record(published, folder).is_file():  # of the user
        kept = target.rename(unused_name(target))
        logger.warning("%s: not fetched by this program, kept as %s", target, kept.name)
    with publishing(target) as copy, file.open("rb") as source:
        shutil.copyfileobj(source, copy, 1 << 22)
    shutil.rmtree(loading, ignore_errors=True)  # on NFS a file that is open elsewhere stays
    record = {
        "file": target.name,
        "sha256": file_digest(target),
        "model": published.model,
        "tag": published.tag,
        "preprocessing": dict(published.preprocessing),
    }
    # Written last: weights without a record do not exist for jobs.
    publish_bytes(_record(published, folder), json.dumps(record, indent=1).encode() + b"\n")
    return target


def download_from_hub(published: Published, cache: Path | None) -> Path:
    """Download weights into a cache of the hub (None: the user's) and return the file.

    Prefers safetensors as OpenCLIP does, but unlike OpenCLIP reports why a download failed.

    Raises:
        MachineError: the hub does not have the weights, or did not respond.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    what = f"fetch {published.model} {published.tag!r}"
    for name in published.files:
        try:
            return Path(hf_hub_download(published.repository, name, cache_dir=cache))
        except LocalEntryNotFoundError as error:  # no response, and nothing in the cache
            reason = _first_line(error.__cause__ or error)
            raise MachineError(
                f"{what}: {ENDPOINT}: {reason}; run it on a node with internet, with an "
                "encoder.weights_dir that jobs can read"
            ) from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # the hub's client and its HTTP library raise many types
            raise MachineError(f"{what}: {_first_line(error)}") from error
    raise MachineError(f"{what}: none of {', '.join(published.files)} in {published.repository}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(published: Published, folder: Path) -> Path:
    return folder / f"{published.name}.json"


def _in_folder(published: Published, folder: Path) -> Path | None:
    record = _record(published, folder)
    if not record.is_file():
        return None
    with report_corrupt(record, f"run {hint('movienet-encode fetch')}"):
        content = json.loads(record.read_bytes())
        name, expected = str(content["file"]), str(content["sha256"])
    file = folder / Path(name).name
    got = file_digest(file) if file.is_file() else "no file"
    if got != expected:
        raise DataError(
            f"{file}: got sha256 {got[:12]}, want {expected[:12]}; run "
            f"{hint('movienet-encode fetch')}"
        )
    return file


def _in_hub_cache(published: Published) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    cached = (try_to_load_from_cache(published.repository, each) for each in published.files)
    return next((Path(file) for file in cached if isinstance(file, str)), None)
