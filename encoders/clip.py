"""OpenCLIP's image towers; the only file that imports open_clip."""

# B = frames in the batch, C = 3 (RGB), H, W = pixels, D = feature size

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from configs.errors import ConfigError, DataError, MovieNetError
from configs.schema import EncoderConfig
from encoders.decode import Preprocessing
from encoders.weights import (
    Published,
    download_from_hub,
    find_weights,
    has_weights,
    store_weights,
    weights_digest,
)

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

    @classmethod
    def fetch(cls, config: EncoderConfig) -> str | None:
        """Download a tag's weights to where jobs look for them; return the path of the file.

        Returns:
            None if ``encoder.pretrained`` is not a tag of the model.

        Raises:
            ConfigError: OpenCLIP has no such model.
            MachineError: the download failed.
        """
        published = _published(read_model(config.model), config.pretrained)
        if published is None:
            return None
        # The hub's client warns of each retry. The error after the last one contains the reason.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        file = store_weights(
            published, config.weights_dir, lambda cache: download_from_hub(published, cache)
        )
        return str(file)

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
        # Channels last, as the pixels come: what convolutions like best, on a GPU and on a CPU.
        visual = visual.to(device=device, dtype=self._dtype).eval()
        visual = visual.to(memory_format=torch.channels_last)
        self._visual: Callable[[Tensor], Any] = _compiled(visual) if config.compile else visual
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
            **({"compiled": True} if config.compile else {}),
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
            features = self._visual(
                pixels_BCHW.to(self._dtype).contiguous(memory_format=torch.channels_last)
            )
        # Towers that can also return their patches give a pair.
        features_BD: Tensor = features[0] if isinstance(features, tuple) else features
        return features_BD.float()

    def versions(self) -> Mapping[str, str]:
        """Return the version of OpenCLIP."""
        return {"open_clip_torch": version("open_clip_torch")}


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from."""

    label: str | None
    """Tag, ``checkpoint``, or None for untrained."""

    path: Path | None
    preprocessing: Mapping[str, object] = field(default_factory=dict)
    """What the weights say of their pictures."""


@dataclass(frozen=True)
class Listed:
    """A model that OpenCLIP knows."""

    name: str
    dim: int
    """Length of a feature."""

    image_size: str
    """Pixels: ``224``, or ``384x192`` (height, width)."""

    tags: Mapping[str, bool]
    """Tags of its pretrained weights, and whether these are on this machine."""


def list_models(weights_dir: str | None = None) -> tuple[Listed, ...]:
    """Return OpenCLIP's models; their weights are looked for as jobs would."""
    return tuple(_listed(name, weights_dir) for name in open_clip.list_models())


def _listed(name: str, weights_dir: str | None) -> Listed:
    model = open_clip.get_model_config(name)
    size = model["vision_cfg"]["image_size"]
    tags = open_clip.list_pretrained_tags_by_model(name)
    return Listed(
        name=name,
        dim=int(model["embed_dim"]),
        image_size="x".join(str(side) for side in ([size] if isinstance(size, int) else size)),
        tags={tag: has_weights(_facts_of(name, tag), weights_dir) for tag in tags},
    )


def _facts_of(name: str, tag: str) -> Published:
    cfg = open_clip.get_pretrained_cfg(name, tag)
    facts = {key: cfg[key] for key in PREPROCESSING_KEYS if key in cfg}
    return Published(name, tag, str(cfg.get("hf_hub", "")), facts)


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


def _builtin(name: str) -> dict[str, Any]:
    if name in open_clip.list_models():
        found: dict[str, Any] = open_clip.get_model_config(name)
        return found
    near = difflib.get_close_matches(name, open_clip.list_models(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`movienet-encode models` lists them"
    raise ConfigError(f"encoder.model: no OpenCLIP model {name!r}; {hint}")


def _published(file: ModelFile, pretrained: str | None) -> Published | None:
    """Return what a tag stands for; None if ``pretrained`` is no tag of the model."""
    if pretrained is None or not file.builtin:
        return None
    cfg = open_clip.get_pretrained_cfg(file.name, pretrained)
    if not cfg:
        return None
    _check_activation(file, pretrained, quick=bool(cfg.get("quick_gelu", False)))
    return _facts_of(file.name, pretrained)


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


def _find_source(config: EncoderConfig, file: ModelFile) -> WeightsSource:
    if config.pretrained is None:
        return WeightsSource(None, None)
    published = _published(file, config.pretrained)
    if published is not None:
        path = find_weights(published, config.weights_dir)
        return WeightsSource(published.tag, path, published.preprocessing)
    if Path(config.pretrained).is_file():
        return WeightsSource("checkpoint", Path(config.pretrained), _stated(config, file))
    tags = open_clip.list_pretrained_tags_by_model(file.name) if file.builtin else []
    near = difflib.get_close_matches(config.pretrained, tags, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f" ({', '.join(tags) or 'it has none'})"
    raise ConfigError(
        f"encoder.pretrained: got {config.pretrained!r}, want null, a checkpoint file, or a tag "
        f"of {file.name}{hint}"
    )


def _stated(config: EncoderConfig, file: ModelFile) -> Mapping[str, object]:
    """Return the preprocessing that a checkpoint says it has; check that it says its activation.

    Raises:
        ConfigError: it is said nowhere: guessed wrong, the features would be wrong in silence.
    """
    if not file.builtin:
        told = {**file.model, **file.preprocessing}
        missing = [key for key in ("quick_gelu", "mean", "std") if key not in told]
        if missing:
            raise ConfigError(
                f"encoder.pretrained: {config.pretrained} does not say how it was trained; state "
                f"{', '.join(missing)} in {config.model}: quick_gelu in model_cfg, mean and std in "
                "preprocess_cfg"
            )
        return {}
    published = _published(file, config.pretrained_like)
    if published is None:
        tags = open_clip.list_pretrained_tags_by_model(file.name)
        raise ConfigError(
            f"encoder.pretrained_like: got {config.pretrained_like!r}, but the "
            f"checkpoint {config.pretrained} does not state its activation and "
            "preprocessing; want the tag that it shares them with: "
            f"{', '.join(tags) or 'it has none, so describe the model in a JSON file'}"
        )
    return published.preprocessing


def _build(
    file: ModelFile, source: WeightsSource, seed: int
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return the image tower in fp32 on the CPU, and OpenCLIP's final preprocessing."""
    # Nothing reads the text tower: without weights to fill it, the smallest will do.
    text = {} if source.path or "multimodal_cfg" in file.model else {"text_cfg": NO_TEXT}
    with _quiet_root(), _folder_of(file) as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = open_clip.create_model(
                f"local-dir:{folder}",
                load_weights=False,
                force_preprocess_cfg=dict(source.preprocessing),
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


def _compiled(visual: nn.Module) -> Callable[[Tensor], Any]:
    """Compile a tower; what fails at the first call is told in one line."""
    forward, ready = torch.compile(visual, dynamic=False), False

    def run(pixels_BCHW: Tensor) -> Any:
        nonlocal ready
        try:
            features = forward(pixels_BCHW)
        except RuntimeError as error:
            if ready:
                raise
            first = str(error).strip().splitlines()[0][:200]
            raise ConfigError(f"encoder.compile: torch.compile fails here: {first}") from error
        ready = True
        return features

    return run


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


def _describe(tower: ClipTower, source: WeightsSource, seed: int, digest: str) -> str:
    want = tower.preprocessing
    origin = f"weights {source.label}" if source.label else f"UNTRAINED weights of seed {seed}"
    return (
        f"{tower.name}   {origin} ({digest[:12]})   {want.width}x{want.height} pixels   "
        f"{tower.dim} values a frame"
    )
