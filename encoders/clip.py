"""OpenCLIP's image towers; the only file that imports open_clip."""

# B = frames in the batch, C = 3 (RGB), H, W = pixels, D = feature size

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from configs.errors import ConfigError, DataError, MachineError, MovieNetError
from configs.schema import EncoderConfig
from encoders.decode import Preprocessing
from encoders.weights import Published, find_weights, store_weights, weights_digest

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Arithmetic of the tower by its name in the config."""

PREPROCESSING_KEYS = ("mean", "std", "interpolation", "resize_mode")
"""What published weights say of their pictures."""

NO_TEXT = {"context_length": 1, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}
"""The smallest text tower; OpenCLIP builds one in any case, after the image tower."""


@dataclass(frozen=True)
class ModelFile:
    """Definition of an OpenCLIP model."""

    name: str
    model: dict[str, Any]
    """``embed_dim``, ``vision_cfg``, ``text_cfg``, ``quick_gelu`` …"""

    preprocessing: dict[str, Any]
    """What differs from OpenCLIP's own ``PreprocessCfg``."""

    builtin: bool
    """Whether the name is OpenCLIP's, so that its tags are known."""

    @property
    def quick_gelu(self) -> bool:
        """Whether the activation is QuickGELU."""
        return bool(self.model.get("quick_gelu", False))

    @property
    def digest(self) -> str:
        """What the weights do not say: heads, activation, pooling."""
        parts = {key: value for key, value in self.model.items() if key != "text_cfg"}
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class ClipTower:
    """The image tower of an OpenCLIP model, in inference."""

    def __init__(self, config: EncoderConfig, device: torch.device, precision: str) -> None:
        """Build the model, load its weights, and let the text tower go.

        Raises:
            ConfigError: model, tag and activation do not fit each other, or do not exist.
            DataError: weights are missing, damaged or of another model.
        """
        self._file = read_model(config.model)
        source = _find_source(config, self._file)
        visual, cfg = _build(self._file, source, config.seed)
        # The digest comes first: it names the weights, whatever they are rounded to.
        digest = weights_digest(visual.state_dict())
        self._dtype = DTYPES[precision]
        self._visual = visual.to(device=device, dtype=self._dtype).eval()
        self.name = self._file.name
        self.dim = int(self._file.model["embed_dim"])
        self.preprocessing = _preprocessing(cfg)
        self._mean_C11 = torch.tensor(self.preprocessing.mean, device=device)[:, None, None]
        self._std_C11 = torch.tensor(self.preprocessing.std, device=device)[:, None, None]
        origin = {"seed": config.seed} if source.label is None else {}
        self.provenance: Mapping[str, object] = {
            "name": self.name,
            "pretrained": source.label,
            **origin,
            "architecture": self._file.digest,
            "weights": digest,
        }
        self.description = _describe(self, source, config.seed, digest)

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        """Return one feature per key frame.

        Args:
            frames_BCHW: uint8, RGB, 0 to 255, at the tower's image size, on its device.

        Returns:
            float32 ``[B, D]``, not L2-normalised, on the same device.

        Raises:
            ValueError: the input has not four axes, or is not uint8.

        Source: Radford et al. 2021, arXiv 2103.00020. Golden: ``tests/golden/clip_frames.npz``.
        """
        if frames_BCHW.ndim != 4 or frames_BCHW.dtype != torch.uint8:
            got = f"{frames_BCHW.dtype} {list(frames_BCHW.shape)}"
            raise ValueError(f"frames: got {got}, want torch.uint8 [B, 3, H, W]")
        pixels_BCHW = (frames_BCHW.float() / 255 - self._mean_C11) / self._std_C11
        with torch.inference_mode():
            # One memory order, so that the caller's cannot decide the last bit.
            features = self._visual(pixels_BCHW.to(self._dtype).contiguous())
        # Towers that can also return their patches give a pair.
        features_BD: Tensor = features[0] if isinstance(features, tuple) else features
        return features_BD.float()


@dataclass(frozen=True)
class Source:
    """Where weights come from."""

    label: str | None
    """Tag, ``checkpoint``, or None for untrained."""

    path: Path | None
    published: Published | None = None


def list_models() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return OpenCLIP's models, each with the tags of its pretrained weights."""
    return tuple(
        (name, tuple(open_clip.list_pretrained_tags_by_model(name)))
        for name in open_clip.list_models()
    )


def read_model(model: str) -> ModelFile:
    """Find the definition of a model: OpenCLIP's own by name, or a JSON file.

    The file holds a model definition as OpenCLIP's own do, or ``{"model_cfg": …,
    "preprocess_cfg": …}`` as it saves them for the hub.

    Raises:
        ConfigError: there is no such model, or the file is none.
    """
    if not model.endswith(".json"):
        return ModelFile(model, _builtin(model), {}, builtin=True)
    path = Path(model)
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"encoder.model: no file {model}; want an OpenCLIP model JSON") from None
    except ValueError as error:
        raise ConfigError(f"encoder.model: {model} is not JSON: {error}") from None
    tree = tree if isinstance(tree, dict) else {}
    definition = tree.get("model_cfg", tree)
    missing = [key for key in ("embed_dim", "vision_cfg") if key not in definition]
    if missing:
        raise ConfigError(f"encoder.model: {model} lacks {missing[0]!r}; want an OpenCLIP model")
    preprocessing = tree.get("preprocess_cfg", {})
    return ModelFile(path.stem, {"text_cfg": {}, **definition}, preprocessing, builtin=False)


def fetch(config: EncoderConfig) -> Path | None:
    """Download a tag's weights to where jobs look for them; None if there is nothing to fetch.

    Raises:
        MachineError: the download failed.
    """
    file = read_model(config.model)
    published = _published(file, config.pretrained)
    if published is None:
        return None
    cfg = open_clip.get_pretrained_cfg(file.name, published.tag)

    def download(folder: Path | None) -> Path:
        try:
            return Path(open_clip.download_pretrained(cfg, cache_dir=folder and str(folder)))
        except Exception as error:  # whatever the hub's client and the network may raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MachineError(f"fetch {file.name} {published.tag!r}: {reason}") from error

    return store_weights(published, config.weights_dir, download)


def _builtin(name: str) -> dict[str, Any]:
    if name in open_clip.list_models():
        found: dict[str, Any] = open_clip.get_model_config(name)
        return found
    near = difflib.get_close_matches(name, open_clip.list_models(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`python -m encoders models` lists them"
    raise ConfigError(f"encoder.model: no OpenCLIP model {name!r}; {hint}")


def _published(file: ModelFile, pretrained: str | None) -> Published | None:
    """Return what a tag stands for; None if ``pretrained`` is no tag of the model."""
    if pretrained is None or not file.builtin:
        return None
    cfg = open_clip.get_pretrained_cfg(file.name, pretrained)
    if not cfg:
        return None
    _check_activation(file, pretrained, quick=bool(cfg.get("quick_gelu", False)))
    facts = {key: cfg[key] for key in PREPROCESSING_KEYS if key in cfg}
    return Published(file.name, pretrained, str(cfg.get("hf_hub", "")), facts)


def _check_activation(file: ModelFile, tag: str, *, quick: bool) -> None:
    """Refuse what OpenCLIP only warns of: the wrong activation gives wrong features."""
    if quick == file.quick_gelu:
        return
    other = f"{file.name}-quickgelu" if quick else file.name.removesuffix("-quickgelu")
    names = {True: "QuickGELU", False: "GELU"}
    want = f"encoder.model={other}" if other in open_clip.list_models() else "another model"
    raise ConfigError(
        f"encoder.model: {file.name} computes {names[file.quick_gelu]}, but the weights {tag!r} "
        f"were trained with {names[quick]}; want {want}"
    )


def _find_source(config: EncoderConfig, file: ModelFile) -> Source:
    if config.pretrained is None:
        return Source(None, None)
    published = _published(file, config.pretrained)
    if published is not None:
        path = find_weights(published, config.weights_dir)
        return Source(published.tag, path, published)
    if Path(config.pretrained).is_file():
        return Source("checkpoint", Path(config.pretrained))
    tags = open_clip.list_pretrained_tags_by_model(file.name) if file.builtin else []
    near = difflib.get_close_matches(config.pretrained, tags, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f" ({', '.join(tags) or 'it has none'})"
    raise ConfigError(
        f"encoder.pretrained: got {config.pretrained!r}, want null, a checkpoint file, or a tag "
        f"of {file.name}{hint}"
    )


def _build(file: ModelFile, source: Source, seed: int) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return the image tower in fp32 on the CPU, and OpenCLIP's final preprocessing."""
    facts = dict(source.published.preprocessing) if source.published else {}
    # Nothing reads the text tower: without weights to fill it, the smallest will do.
    text = {} if source.path or "multimodal_cfg" in file.model else {"text_cfg": NO_TEXT}
    with _quiet_root(), _folder_of(file) as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = open_clip.create_model(
                f"local-dir:{folder}",
                load_weights=False,
                force_preprocess_cfg=facts,
                pretrained_text=False,
                **text,
            )
        except (TypeError, ValueError, KeyError, RuntimeError, AssertionError) as error:
            raise ConfigError(f"encoder.model: {file.name}: OpenCLIP says: {error}") from error
    if source.path:
        _load(model, source.path, file.name)
    return model.visual, open_clip.get_model_preprocess_cfg(model)


@contextmanager
def _folder_of(file: ModelFile) -> Iterator[str]:
    """Give a model folder as OpenCLIP loads it: so its registry of names stays as it is."""
    tree = {"model_cfg": file.model, "preprocess_cfg": file.preprocessing}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(tree), encoding="utf-8")
        yield folder


def _load(model: nn.Module, path: Path, name: str) -> None:
    try:
        open_clip.load_checkpoint(model, str(path))
    except MovieNetError:
        raise
    except Exception as error:  # pickle, zip, safetensors and torch each raise their own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: not weights of {name}: {first[:200]}") from error


@contextmanager
def _quiet_root() -> Iterator[None]:
    """Keep OpenCLIP's remarks off the root logger; what matters is said by ``description``."""
    root = logging.getLogger()

    def serious(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root.addFilter(serious)
    try:
        yield
    finally:
        root.removeFilter(serious)


def _preprocessing(cfg: Mapping[str, Any]) -> Preprocessing:
    size = cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocessing(
        height=int(height),
        width=int(width),
        mean=_three(cfg["mean"]),
        std=_three(cfg["std"]),
        interpolation=str(cfg["interpolation"]),
        resize_mode=str(cfg["resize_mode"]),
        fill_color=int(cfg.get("fill_color", 0)),
    )


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _describe(tower: ClipTower, source: Source, seed: int, digest: str) -> str:
    want = tower.preprocessing
    origin = f"weights {source.label}" if source.label else f"UNTRAINED weights of seed {seed}"
    return (
        f"{tower.name}   {origin} ({digest[:12]})   {want.width}x{want.height} pixels   "
        f"{tower.dim} values a frame"
    )
