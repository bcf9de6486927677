"""Checkpoints of the library transformers are converted to OpenCLIP's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from configs.schema import EncoderConfig
from encoders.clip import ClipTower, load_model

pytestmark = pytest.mark.slow  # as are the imports of OpenCLIP and transformers

TOWER = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1},
}


def test_a_model_of_transformers_gives_its_own_features_of_frames_and_texts(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    words = {"hidden_size": 8, "intermediate_size": 32, "max_position_embeddings": 4}
    vision = {"hidden_size": 32, "intermediate_size": 128, "image_size": 32, "patch_size": 16}
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **words,
                "vocab_size": 9,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "bos_token_id": 7,
                "eos_token_id": 8,
            },
            vision_config={**vision, "num_hidden_layers": 2, "num_attention_heads": 2},
            projection_dim=16,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    definition = tmp_path / "tower.json"
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3}
    definition.write_text(json.dumps({"model_cfg": TOWER, "preprocess_cfg": preprocessing}))
    config = EncoderConfig(
        name="t", model=str(definition), pretrained=str(tmp_path / "model.safetensors")
    )
    frames = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        pooled = model.vision_model(pixel_values=(frames.float() / 255 - 0.5) / 0.5).pooler_output
        want = model.visual_projection(pooled)
        tokens = torch.tensor([[7, 3, 8, 0], [7, 8, 0, 0]])
        text = model.text_projection(model.text_model(input_ids=tokens).pooler_output)
        assert (load_model(config).model.encode_text(tokens) - text).abs().max() < 1e-5
    got = ClipTower(config, torch.device("cpu"), "fp32").encode(frames)
    assert (got - want).abs().max() < 1e-5
