"""The text tower is the text side of the very model that encoded the features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from configs.errors import ConfigError, DataError, MovieNetError
from configs.schema import EncoderConfig
from encoders.clip import ClipTower
from encoders.text import TextTower
from tests.encoders.conftest import TOWER

pytestmark = pytest.mark.slow  # as is the import of OpenCLIP

PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.25, 0.25]}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
TEXTS = ["a car chase at night", "two people talk", "snow"]


def save_model(folder: Path, seed: int = 5, **model: Any) -> tuple[EncoderConfig, Any]:
    """Save an OpenCLIP model with both towers; return its configuration and the model itself."""
    folder.mkdir(parents=True, exist_ok=True)
    definition = {**TOWER, "quick_gelu": True, "text_cfg": TEXT, **model}
    tree = {"model_cfg": definition, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(tree))
    torch.manual_seed(seed)
    clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    torch.save(clip.state_dict(), folder / "weights.pt")
    return settings(folder), clip


def settings(folder: Path, **more: Any) -> EncoderConfig:
    fields = {
        "name": "both",
        "model": str(folder / "open_clip_config.json"),
        "pretrained": str(folder / "weights.pt"),
    }
    return EncoderConfig.model_validate({**fields, **more})


def provenance(config: EncoderConfig) -> dict[str, Any]:
    """What a feature set of this encoder records."""
    return {"encoder": dict(ClipTower(config, torch.device("cpu"), "fp32").provenance), "dim": 16}


def refusal(config: EncoderConfig, recorded: dict[str, Any]) -> str:
    with pytest.raises(MovieNetError) as caught:
        TextTower.of(config, recorded, "root/features/both")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_vectors_are_those_of_encode_text_with_length_1(tmp_path: Path) -> None:
    config, clip = save_model(tmp_path)
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    with torch.inference_mode():
        want = clip.encode_text(tokens, normalize=True).numpy()
    got = TextTower.of(config, provenance(config), "root").encode(TEXTS)
    assert got.dtype == np.float32
    assert np.abs(got - want).max() < 1e-6


def test_a_model_with_other_weights_than_the_recorded_ones_is_refused(tmp_path: Path) -> None:
    config, _ = save_model(tmp_path / "a")
    other, _ = save_model(tmp_path / "b", seed=6)
    message = refusal(other, provenance(config))
    assert "got weights" in message
    assert "('checkpoint'), which encoded root/features/both" in message


def test_a_model_of_another_architecture_is_refused(tmp_path: Path) -> None:
    config, _ = save_model(tmp_path / "a")
    other, _ = save_model(tmp_path / "b", embed_dim=8)
    for encoder in (other, settings(tmp_path / "a", model="./tower.py:Tower")):
        message = refusal(encoder, provenance(config))
        assert message.startswith("encoder.model: got ")
        assert "want the encoder of root/features/both: open_clip_config" in message


def test_features_of_untrained_weights_have_no_text_tower(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = settings(tmp_path, pretrained=None)
    assert "encoded with UNTRAINED weights" in refusal(config, provenance(config))


def test_imported_features_and_those_of_a_custom_encoder_have_no_text_tower(tmp_path: Path) -> None:
    config, _ = save_model(tmp_path)
    imported = {"import": {"name": "arrays", "dedup": True}, "dim": 16}
    assert "imported features, whose text tower is unknown" in refusal(config, imported)
    custom = {"name": "tower.py:Tower", "options": {}, "weights": "0", "architecture": "0"}
    message = refusal(config, {"encoder": custom, "dim": 16})
    assert "encoded by tower.py:Tower, a custom encoder without a text tower" in message


def test_a_text_tower_that_is_only_a_placeholder_is_refused(tmp_path: Path) -> None:
    config, _ = save_model(tmp_path, text_cfg=TOWER["text_cfg"])
    message = refusal(config, provenance(config))
    assert "has no usable text tower: got a vocabulary of 9 tokens, want the 49408" in message


def test_a_text_tower_with_a_tokenizer_of_the_hub_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = settings(tmp_path)
    recorded = provenance(config)
    path = tmp_path / "open_clip_config.json"
    tree = json.loads(path.read_text())
    tree["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP"
    path.write_text(json.dumps(tree))
    assert "needs the tokenizer 'timm/ViT-B-16-SigLIP' of the Hugging Face hub" in refusal(
        config, recorded
    )


def test_missing_weights_are_one_line(tmp_path: Path) -> None:
    config, _ = save_model(tmp_path)
    recorded = provenance(config)
    (tmp_path / "weights.pt").unlink()
    with pytest.raises(ConfigError, match="want null, a checkpoint file, or a tag"):
        TextTower.of(config, recorded, "root")
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    with pytest.raises(DataError, match="not a file of weights"):
        TextTower.of(config, recorded, "root")
