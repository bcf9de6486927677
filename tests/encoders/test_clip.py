from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from configs.errors import ConfigError, DataError
from configs.load import preset_files
from configs.schema import EncoderConfig
from encoders.clip import ClipTower, list_models, read_model
from encoders.decode import Decoder
from encoders.registry import make_tower
from encoders.weights import weights_digest

pytestmark = pytest.mark.slow  # as is the import of OpenCLIP

PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.25, 0.25]}
GOLDEN = Path(__file__).parents[1] / "golden" / "clip_frames.npz"
CPU = torch.device("cpu")


def settings(model: Path | str, **more: object) -> EncoderConfig:
    fields = {"name": "t", "model": str(model), "pretrained": None, **more}
    return EncoderConfig.model_validate(fields)


def jpeg(seed: int, width: int = 100, height: int = 60) -> bytes:
    small = np.random.default_rng(seed).integers(0, 255, (12, 18, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(1)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def encode(tower: ClipTower, images: list[bytes]) -> torch.Tensor:
    want = tower.preprocessing
    pixels = np.zeros((len(images), want.height, want.width, 3), np.uint8)
    decoder = Decoder(want)
    for data, out in zip(images, pixels, strict=True):
        decoder.decode(data, out)
    return tower.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def specified(tower_file: Path, folder: Path) -> Path:
    """Write a definition of the small tower with activation and preprocessing."""
    path = folder / "specified.json"
    model = {**json.loads(tower_file.read_text()), "quick_gelu": True}
    path.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": PREPROCESSING}))
    return path


def save_checkpoint(tower_file: Path, folder: Path, seed: int) -> tuple[Path, open_clip.CLIP]:
    """Save a complete OpenCLIP model with other weights in the format of OpenCLIP's trainer."""
    open_clip.add_model_config(tower_file)
    torch.manual_seed(seed)
    model = open_clip.create_model(tower_file.stem).eval()
    path = folder / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, path)
    return path, model


def test_golden_features_of_a_seeded_small_tower(tower_file: Path) -> None:
    images = [jpeg(seed) for seed in range(3)]
    features = encode(ClipTower(settings(tower_file), CPU, "fp32"), images).numpy()
    if os.environ.get("MOVIENET_WRITE_GOLDEN"):
        jpegs = [np.frombuffer(data, np.uint8) for data in images]
        np.savez(GOLDEN, features=features, jpeg_0=jpegs[0], jpeg_1=jpegs[1], jpeg_2=jpegs[2])
    golden = np.load(GOLDEN)
    # The file contains the images too, because another Pillow may write other JPEGs.
    stored = [golden[f"jpeg_{k}"].tobytes() for k in range(3)]
    features = encode(ClipTower(settings(tower_file), CPU, "fp32"), stored).numpy()
    assert np.abs(features - golden["features"]).max() < 1e-3


def test_a_checkpoint_with_known_preprocessing_gives_the_features_of_encode_image(
    tower_file: Path, tmp_path: Path
) -> None:
    path = specified(tower_file, tmp_path)
    model_only = tmp_path / "quick.json"
    model_only.write_text(json.dumps(json.loads(path.read_text())["model_cfg"]))
    checkpoint, model = save_checkpoint(model_only, tmp_path, seed=5)
    transform = open_clip.image_transform(32, is_train=False, **PREPROCESSING)
    images = [jpeg(seed, 90 + 10 * seed, 60) for seed in range(4)]
    with torch.inference_mode():
        want = torch.cat(
            [model.encode_image(transform(Image.open(io.BytesIO(data)))[None]) for data in images]
        )
    got = encode(ClipTower(settings(path, pretrained=str(checkpoint)), CPU, "fp32"), images)
    assert torch.cosine_similarity(got, want).min() > 0.9999
    assert (got - want).abs().max() < 1e-4


def test_a_checkpoint_with_unknown_preprocessing_is_refused(
    tower_file: Path, tmp_path: Path
) -> None:
    checkpoint, _ = save_checkpoint(tower_file, tmp_path, seed=5)
    with pytest.raises(ConfigError, match=r"specify quick_gelu, mean, std in .*tiny\.json"):
        make_tower(settings(tower_file, pretrained=str(checkpoint)), CPU, "fp32")


def test_a_checkpoint_of_an_openclip_model_needs_the_tag_with_its_preprocessing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "tuned.pt"
    torch.save({"visual.nothing": torch.zeros(3)}, path)

    def tower(model: str, like: str | None) -> None:
        make_tower(settings(model, pretrained=str(path), pretrained_like=like), CPU, "fp32")

    with pytest.raises(
        ConfigError, match=r"encoder\.pretrained_like: got None.* want the tag .* openai"
    ):
        tower("RN50-quickgelu", None)
    with pytest.raises(ConfigError, match=r"encoder\.pretrained_like: got 'opnai'.* openai"):
        tower("RN50-quickgelu", "opnai")
    with pytest.raises(ConfigError, match=r"want encoder\.model=RN50-quickgelu"):
        tower("RN50", "openai")
    with pytest.raises(DataError, match="not weights of RN50-quickgelu"):
        tower("RN50-quickgelu", "openai")


def test_untrained_weights_equal_those_of_open_clip_with_the_same_seed(tower_file: Path) -> None:
    open_clip.add_model_config(tower_file)
    torch.manual_seed(3)
    want = open_clip.create_model(tower_file.stem).visual.state_dict()
    got = ClipTower(settings(tower_file, seed=3), CPU, "fp32")
    assert got.provenance["weights"] == weights_digest(want)


def test_untrained_weights_are_deterministic_and_described_as_untrained(tower_file: Path) -> None:
    towers = [ClipTower(settings(tower_file, seed=seed), CPU, "fp32") for seed in (0, 0, 1)]
    digests = [tower.provenance["weights"] for tower in towers]
    assert digests[0] == digests[1] != digests[2]
    assert "UNTRAINED weights of seed 1" in towers[2].description


def test_building_a_tower_does_not_change_the_random_state_of_the_process(tower_file: Path) -> None:
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    ClipTower(settings(tower_file), CPU, "fp32")
    assert torch.equal(torch.rand(3), want)


def test_bf16_has_the_same_digest_and_similar_features_as_fp32(tower_file: Path) -> None:
    images = [jpeg(seed) for seed in range(4)]
    exact, rough = (ClipTower(settings(tower_file), CPU, p) for p in ("fp32", "bf16"))
    assert exact.provenance == rough.provenance
    similarity = torch.cosine_similarity(encode(exact, images), encode(rough, images))
    assert similarity.min() > 0.99


def test_the_memory_format_of_the_pixels_changes_no_bit(tower_file: Path) -> None:
    tower = ClipTower(settings(tower_file), CPU, "fp32")
    frames = torch.randint(0, 255, (5, 3, 32, 32), dtype=torch.uint8)
    other = frames.to(memory_format=torch.channels_last)
    assert torch.equal(tower.encode(frames), tower.encode(other))


def test_frames_of_another_dtype_are_refused(tower_file: Path) -> None:
    tower = ClipTower(settings(tower_file), CPU, "fp32")
    with pytest.raises(ValueError, match=r"got torch.float32 \[1, 3, 32, 32\], want torch.uint8"):
        tower.encode(torch.zeros(1, 3, 32, 32))


def test_openai_weights_on_a_model_without_quickgelu_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"want encoder\.model=ViT-B-32-quickgelu"):
        make_tower(settings("ViT-B-32", pretrained="openai"), CPU, "fp32")


def test_missing_weights_are_reported_with_the_command_that_fetches_them(
    tmp_path: Path,
) -> None:
    encoder = settings("ViT-B-32-quickgelu", pretrained="openai", weights_dir=str(tmp_path))
    with pytest.raises(
        DataError, match=r"not in .*; run `movienet-encode fetch .*` on a node with internet"
    ):
        make_tower(encoder, CPU, "fp32")


def test_for_a_mistyped_tag_the_nearest_one_is_proposed() -> None:
    with pytest.raises(ConfigError, match="did you mean 'openai'"):
        make_tower(settings("ViT-B-32-quickgelu", pretrained="opnai"), CPU, "fp32")


def test_for_a_mistyped_model_the_nearest_one_is_proposed() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ViT-B-32-quickgelu'"):
        make_tower(settings("ViT-B-32-quickgel"), CPU, "fp32")


def test_a_checkpoint_of_another_model_is_refused_in_one_line(
    tower_file: Path, tmp_path: Path
) -> None:
    path, model = tmp_path / "other.pt", specified(tower_file, tmp_path)
    torch.save({"visual.nothing": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="not weights of specified") as caught:
        make_tower(settings(model, pretrained=str(path)), CPU, "fp32")
    assert "\n" not in str(caught.value)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(DataError, match=r"other\.pt: not a file of weights"):
        make_tower(settings(model, pretrained=str(path)), CPU, "fp32")


def checkpoints(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """Return the same weights as other trainers save them, by the name of the file."""

    def named(prefix: str) -> dict[str, torch.Tensor]:
        return {prefix + name: value for name, value in state.items()}

    moments = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    return {
        "open_clip.pt": {
            "epoch": 3,
            "name": "run",
            "state_dict": named("module."),
            "optimizer": moments,
            "scaler": {"scale": 65536.0},
        },
        "compiled.pt": {"state_dict": named("_orig_mod.module."), "epoch": np.int64(3)},
        "lightning.ckpt": {
            "state_dict": {**named("model._orig_mod."), "loss.scale": torch.ones(1)},
            "hyper_parameters": {"args": argparse.Namespace(lr=1e-3)},
            "callbacks": {},
        },
        "deepspeed.pt": {"module": named("clip."), "optimizer": None},
        "open_clip_model.safetensors": state,
        "wrapped.safetensors": named("model."),
    }


def save_torchscript(model: open_clip.CLIP, path: Path) -> None:
    """Save an archive like OpenAI's, which stores three sizes like tensors."""
    for name in ("input_resolution", "context_length", "vocab_size"):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(32))
    inputs = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, dtype=torch.long))
    with warnings.catch_warnings():  # torch.jit is deprecated
        warnings.simplefilter("ignore")
        trace: Any = torch.jit.trace
        torch.jit.save(trace(model, inputs, check_trace=False), path)


def test_weights_of_any_trainer_have_the_digest_of_the_plain_weights(
    tower_file: Path, tmp_path: Path
) -> None:
    definition = specified(tower_file, tmp_path)
    _, model = save_checkpoint(tower_file, tmp_path, seed=5)
    want, state = weights_digest(model.visual.state_dict()), model.state_dict()
    files = checkpoints(state)
    for name, content in files.items():
        save: Any = save_file if name.endswith(".safetensors") else torch.save
        save(content, tmp_path / name)
    save_torchscript(model, tmp_path / "ViT.pt")
    for name in (*files, "ViT.pt"):
        tower = ClipTower(settings(definition, pretrained=str(tmp_path / name)), CPU, "fp32")
        assert (name, tower.provenance["weights"]) == (name, want)
        assert tower.provenance["pretrained"] == "checkpoint"


def test_the_error_of_another_checkpoint_names_what_differs(
    tower_file: Path, tmp_path: Path
) -> None:
    definition = specified(tower_file, tmp_path)
    path, model = save_checkpoint(tower_file, tmp_path, seed=5)
    state = model.state_dict()

    def error(content: dict[str, torch.Tensor]) -> str:
        torch.save(content, path)
        with pytest.raises(DataError) as caught:
            ClipTower(settings(definition, pretrained=str(path)), CPU, "fp32")
        return str(caught.value)

    visual = {name: value for name, value in state.items() if name.startswith("visual.")}
    assert "not weights of specified: it lacks" in error(visual)
    proj = {**state, "visual.proj": torch.zeros(32, 8)}
    assert "visual.proj is [32, 8], want [32, 16]; choose the checkpoint" in error(proj)


def test_the_error_of_a_folder_names_the_checkpoints_in_it(tmp_path: Path) -> None:
    (tmp_path / "open_clip_model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"is a folder, want .*: open_clip_model\.safetensors$"):
        make_tower(settings("ViT-B-32", pretrained=str(tmp_path)), CPU, "fp32")


def test_a_model_file_may_specify_its_preprocessing(tower_file: Path, tmp_path: Path) -> None:
    tree = {
        "model_cfg": json.loads(tower_file.read_text()),
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "resize_mode": "squash"},
    }
    path = tmp_path / "specified.json"
    path.write_text(json.dumps(tree))
    tower = ClipTower(settings(path), CPU, "fp32")
    assert tower.preprocessing.mean == (0.5, 0.5, 0.5)
    assert tower.preprocessing.resize_mode == "squash"


def test_the_command_that_a_copy_of_the_demo_preset_suggests_copies_its_model(
    tmp_path: Path,
) -> None:
    path = tmp_path / "my folder" / "towers" / "demo.json"
    with pytest.raises(ConfigError, match="no file") as caught:
        read_model(str(path))
    command = str(caught.value).split("`")[1]
    preset = str(preset_files()["towers/demo"])
    pasted = command.replace('"$(movienet-shard presets towers/demo)"', shlex.quote(preset))
    subprocess.run(shlex.split(pasted), check=True)
    assert path.read_bytes() == preset_files()["towers/demo"].read_bytes()
    assert read_model(str(path)).name == "demo"


def test_an_invalid_model_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    with pytest.raises(ConfigError, match=r"no file .* relative to the config file"):
        read_model(str(path))
    path.write_text("{")
    with pytest.raises(ConfigError, match="not an OpenCLIP model"):
        read_model(str(path))
    path.write_text("{}")
    with pytest.raises(ConfigError, match="no 'embed_dim'"):
        read_model(str(path))


def test_the_provenance_depends_on_the_activation(tower_file: Path, tmp_path: Path) -> None:
    model = json.loads(tower_file.read_text())
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({**model, "quick_gelu": True}))
    plain, quick = (ClipTower(settings(file), CPU, "fp32") for file in (tower_file, path))
    assert plain.provenance["weights"] == quick.provenance["weights"]
    assert plain.provenance != quick.provenance


def test_openclip_models_are_listed_with_sizes_and_tags(tmp_path: Path) -> None:
    listed = {model.name: model for model in list_models(str(tmp_path))}
    assert listed["ViT-B-32-quickgelu"].dim == 512
    assert listed["ViT-B-32-quickgelu"].image_size == "224"
    assert listed["ViT-B-32-quickgelu"].tags["openai"] is False
    (tmp_path / "ViT-B-32-quickgelu.openai.json").write_text("{}")
    listed = {model.name: model for model in list_models(str(tmp_path))}
    assert [tag for tag, stored in listed["ViT-B-32-quickgelu"].tags.items() if stored] == [
        "openai"
    ]


def test_a_compiled_tower_gives_similar_features_and_records_that_it_is_compiled(
    tower_file: Path,
) -> None:
    images = [jpeg(seed) for seed in range(4)]
    plain = ClipTower(settings(tower_file), CPU, "fp32")
    compiled = ClipTower(settings(tower_file, compile=True), CPU, "fp32")
    assert (encode(plain, images) - encode(compiled, images)).abs().max() < 1e-4
    assert compiled.provenance == {**plain.provenance, "compiled": True}
