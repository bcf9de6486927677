"""Where pretrained weights lie, and the digest that names them.

``encoders fetch`` stores them on a node with internet; jobs only look and never download. With
``encoder.weights_dir`` each set is one file with a JSON beside it (sha256, preprocessing); without,
it is the cache of the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, uint8

from configs.errors import DataError, MachineError
from configs.runtime.publish import publish_bytes, publishing

HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names under which OpenCLIP keeps weights in a repository of the hub; the first found is taken."""


@dataclass(frozen=True)
class Published:
    """Pretrained weights as OpenCLIP publishes them."""

    model: str
    """OpenCLIP model name."""

    tag: str
    """OpenCLIP tag, e.g. ``openai``."""

    hub: str
    """``owner/repository/`` on the Hugging Face hub, with or without a file name."""

    preprocessing: Mapping[str, object]
    """Mean, std, interpolation and resize mode that belong to them."""

    @property
    def repository(self) -> str:
        """``owner/repository`` on the hub."""
        return self.hub.rpartition("/")[0]

    @property
    def files(self) -> tuple[str, ...]:
        """Names in the repository; the first that is there counts."""
        name = self.hub.rpartition("/")[2]
        return (Path(name).with_suffix(".safetensors").name, name) if name else HUB_NAMES

    @property
    def name(self) -> str:
        """Stem of the files in ``encoder.weights_dir``."""
        return f"{self.model}.{self.tag}"


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes, in order of name.

    Args:
        state: State dict of the image tower, in the precision it was loaded in.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {kind} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()


def find_weights(published: Published, weights_dir: str | None) -> Path:
    """Return the local file of pretrained weights; never goes to the network.

    Raises:
        DataError: they are not there (fetch them first), or not as they were fetched.
    """
    if weights_dir is None:
        file, place = _in_hub_cache(published), "the hub's cache"
    else:
        file, place = _in_folder(published, Path(weights_dir)), weights_dir
    if file is None:
        raise DataError(
            f"weights of {published.model} {published.tag!r}: not in {place}; run "
            "`movienet-encode fetch` with the same config on a node with internet"
        )
    return file


def has_weights(published: Published, weights_dir: str | None) -> bool:
    """Tell whether pretrained weights lie where jobs look for them; their bytes are not read."""
    if weights_dir is None:
        return _in_hub_cache(published) is not None
    return _record(published, Path(weights_dir)).is_file()


def store_weights(
    published: Published, weights_dir: str | None, download: Callable[[Path | None], Path]
) -> Path:
    """Download weights to where ``find_weights`` looks; return the file.

    Args:
        published: Which weights.
        weights_dir: Where jobs will look; None for the hub's cache.
        download: Gets the folder to download into (None: the hub's cache); returns the file.
    """
    if weights_dir is None:
        return download(None)
    folder = Path(weights_dir)
    loading = folder / ".download"  # stays after a failure: the next attempt goes on with it
    file = download(loading)
    target = folder / f"{published.name}{file.suffix}"
    with publishing(target) as copy, file.open("rb") as source:
        shutil.copyfileobj(source, copy, 1 << 22)
    shutil.rmtree(loading)
    record = {
        "file": target.name,
        "sha256": file_digest(target),
        "model": published.model,
        "tag": published.tag,
        "preprocessing": dict(published.preprocessing),
    }
    # Last: the record is what makes the weights count as there.
    publish_bytes(_record(published, folder), json.dumps(record, indent=1).encode() + b"\n")
    return target


def download_from_hub(published: Published, cache: Path | None) -> Path:
    """Download weights into a cache of the hub (None: the user's); return the file.

    Asks for safetensors first, as OpenCLIP does; but OpenCLIP swallows why they did not come.

    Raises:
        MachineError: the hub does not have them, or did not answer.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    what = f"fetch {published.model} {published.tag!r}"
    for name in published.files:
        try:
            return Path(hf_hub_download(published.repository, name, cache_dir=cache))
        except LocalEntryNotFoundError as error:  # no answer, and no older copy
            raise MachineError(f"{what}: {_first_line(error.__cause__ or error)}") from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # whatever else the hub's client and the network may raise
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
    try:
        said = json.loads(record.read_bytes())
        name, wanted = str(said["file"]), str(said["sha256"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{record}: damaged; run `movienet-encode fetch` again") from None
    file = folder / Path(name).name
    got = file_digest(file) if file.is_file() else "no file"
    if got != wanted:
        raise DataError(
            f"{file}: sha256 {got[:12]}, want {wanted[:12]}; run `movienet-encode fetch` again"
        )
    return file


def _in_hub_cache(published: Published) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(published.repository, each) for each in published.files)
    return next((Path(file) for file in found if isinstance(file, str)), None)
