from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from configs.errors import DataError
from encoders.weights import Published, fetch_again, find_weights, store_weights, weights_digest

OPENAI = Published("ViT-B-32-quickgelu", "openai", "owner/repository/", {"mean": [0.5, 0.5, 0.5]})


def download(folder: Path | None) -> Path:
    """Do what OpenCLIP's download does, without the network."""
    assert folder is not None
    folder.mkdir(parents=True)
    file = folder / "open_clip_model.safetensors"
    file.write_bytes(b"weights")
    return file


def test_fetched_weights_are_stored_with_a_record_of_their_preprocessing(tmp_path: Path) -> None:
    stored = store_weights(OPENAI, str(tmp_path), download)
    assert find_weights(OPENAI, str(tmp_path)) == stored
    assert stored.read_bytes() == b"weights"
    record = json.loads((tmp_path / "ViT-B-32-quickgelu.openai.json").read_bytes())
    assert record["preprocessing"] == {"mean": [0.5, 0.5, 0.5]}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ViT-B-32-quickgelu.openai.json",
        "ViT-B-32-quickgelu.openai.safetensors",
    ]


def test_weights_of_the_user_with_the_same_name_are_kept(tmp_path: Path) -> None:
    name = "ViT-B-32-quickgelu.openai"
    (tmp_path / f"{name}.safetensors").write_bytes(b"mine")
    assert store_weights(OPENAI, str(tmp_path), download).read_bytes() == b"weights"
    assert (tmp_path / f"{name}-1.safetensors").read_bytes() == b"mine"


def test_corrupt_weights_are_refused(tmp_path: Path) -> None:
    store_weights(OPENAI, str(tmp_path), download).write_bytes(b"cut")
    with pytest.raises(DataError, match=r"got sha256 .*, want .*; run `movienet-encode fetch"):
        find_weights(OPENAI, str(tmp_path))


def test_weights_in_the_hub_cache_are_found_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="not in the hub's cache"):
        find_weights(OPENAI, None)
    folder = tmp_path / "models--owner--repository"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    file = folder / "snapshots" / "abc" / "open_clip_pytorch_model.bin"
    file.write_bytes(b"weights")
    assert find_weights(OPENAI, None) == file


def test_the_advice_for_unusable_weights_names_the_bytes_and_not_the_link_of_the_hub_cache(
    tmp_path: Path,
) -> None:
    blob, link = tmp_path / "blobs" / "1a2b", tmp_path / "snapshots" / "model.bin"
    for file in (blob, link):
        file.parent.mkdir()
    blob.write_bytes(b"cut")
    link.symlink_to("../blobs/1a2b")
    assert fetch_again(link).startswith(f"delete {blob.resolve()} and run `movienet-encode fetch")
    assert fetch_again(blob).startswith("delete it and run `movienet-encode fetch")


def test_the_digest_depends_on_names_shapes_dtypes_and_values_but_not_on_order() -> None:
    state = {"a": torch.arange(6.0), "b": torch.tensor(1.0)}
    same = {"b": torch.tensor(1.0), "a": torch.arange(6.0)}
    others = [
        {"a": torch.arange(6.0), "c": torch.tensor(1.0)},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0)},
        {"a": torch.arange(6.0).double(), "b": torch.tensor(1.0)},
        {"a": torch.arange(6.0) + 1, "b": torch.tensor(1.0)},
    ]
    assert weights_digest(state) == weights_digest(same)
    assert len({weights_digest(each) for each in [state, *others]}) == 5
