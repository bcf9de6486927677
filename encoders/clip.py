"""OpenCLIP models and their image towers; the only module that imports open_clip."""

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

from configs.corrupt import report_corrupt
from configs.errors import ConfigError, DataError
from configs.load import copy_of_preset
from configs.schema import EncoderConfig
from configs.tensor_files import read_tensors
from encoders.checkpoint_names import openclip_names
from encoders.decode import Preprocessing
from encoders.weights import (
    Published,
    download_from_hub,
    fetch_again,
    find_weights,
    has_weights,
    store_weights,
    weights_digest,
)

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes by the value of ``encoder.precision``."""

PREPROCESSING_KEYS = ("mean", "std", "interpolation", "resize_mode")
"""Preprocessing fields in the metadata of published weights."""

CHECKPOINT = "checkpoint"
"""Label of weights from a file of the user."""

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Suffixes of checkpoint files that are proposed where a folder is given."""

_CONSTANTS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Numbers that OpenAI's archives store like tensors."""

_OTHER = "choose the checkpoint of this model, or the model of this checkpoint in encoder.model"

NO_TEXT = {"context_length": 1, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}
"""Smallest possible text tower; OpenCLIP always builds one, after the image tower."""


@dataclass(frozen=True)
class ModelFile:
    """Definition of an OpenCLIP model."""

    name: str
    model: dict[str, Any]
    """``embed_dim``, ``vision_cfg``, ``text_cfg``, ``quick_gelu`` and others."""

    preprocessing: dict[str, Any]
    """Fields that differ from the defaults of OpenCLIP's ``PreprocessCfg``."""

    builtin: bool
    """Whether OpenCLIP defines the model, so that its tags are known."""

    @property
    def quick_gelu(self) -> bool:
        """Whether the activation is QuickGELU."""
        return bool(self.model.get("quick_gelu", False))

    @property
    def digest(self) -> str:
        """Digest of what the weights do not determine: heads, activation, pooling."""
        definition = {key: value for key, value in self.model.items() if key != "text_cfg"}
        text = json.dumps(definition, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class ClipTower:
    """Image tower of an OpenCLIP model, for inference."""

    @classmethod
    def fetch(cls, config: EncoderConfig) -> str | None:
        """Download the weights of a tag and store them for jobs.

        Returns:
            Path of the file; None if ``encoder.pretrained`` is not a tag of the model.

        Raises:
            ConfigError: OpenCLIP does not have the model.
            MachineError: the download failed.
        """
        published = _published(read_model(config.model), config.pretrained)
        if published is None:
            return None
        # The hub's client warns about each retry. The error after the last one contains the reason.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        file = store_weights(
            published, config.weights_dir, lambda cache: download_from_hub(published, cache)
        )
        return str(file)

    def __init__(self, config: EncoderConfig, device: torch.device, precision: str) -> None:
        """Build the model, load its weights, and discard the text tower.

        Raises:
            ConfigError: model or tag do not exist, or their activations differ.
            DataError: weights are missing, corrupt, or belong to another model.
        """
        loaded = load_model(config)
        self._file, source = loaded.file, loaded.source
        visual: nn.Module = loaded.model.visual
        # Before the conversion, so that the digest does not depend on the precision.
        digest = weights_digest(visual.state_dict())
        self._dtype = DTYPES[precision]
        # Channels last like the pixels: the fastest layout for convolutions on GPU and CPU.
        visual = visual.to(device=device, dtype=self._dtype).eval()
        visual = visual.to(memory_format=torch.channels_last)
        self._visual: Callable[[Tensor], Any] = _compiled(visual) if config.compile else visual
        self.name = self._file.name
        self.dim = int(self._file.model["embed_dim"])
        self.preprocessing = _preprocessing(open_clip.get_model_preprocess_cfg(loaded.model))
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
        """Return one feature per frame.

        Args:
            frames_BCHW: uint8, RGB, 0 to 255, at the tower's image size, on its device.

        Returns:
            float32 ``[B, D]``, not L2-normalised, on the same device.

        Raises:
            ValueError: the input does not have four axes, or is not uint8.

        Source: Radford et al. 2021, arXiv 2103.00020. Golden: ``tests/golden/clip_frames.npz``.
        """
        if frames_BCHW.ndim != 4 or frames_BCHW.dtype != torch.uint8:
            got = f"{frames_BCHW.dtype} {list(frames_BCHW.shape)}"
            raise ValueError(f"frames: got {got}, want torch.uint8 [B, 3, H, W]")
        pixels_BCHW = (frames_BCHW.float() / 255 - self._mean_C11) / self._std_C11
        with torch.inference_mode():
            # A fixed memory format, because the format affects the last bit.
            features = self._visual(
                pixels_BCHW.to(self._dtype).contiguous(memory_format=torch.channels_last)
            )
        # Towers that can also return patch features return a pair.
        features_BD: Tensor = features[0] if isinstance(features, tuple) else features
        return features_BD.float()

    def versions(self) -> Mapping[str, str]:
        """Return the version of OpenCLIP."""
        return {"open_clip_torch": version("open_clip_torch")}


@dataclass(frozen=True)
class WeightsSource:
    """Origin of weights."""

    label: str | None
    """Tag, ``checkpoint``, or None for untrained weights."""

    path: Path | None
    preprocessing: Mapping[str, object] = field(default_factory=dict)
    """Preprocessing the weights were trained with."""


@dataclass(frozen=True)
class Listed:
    """Entry of OpenCLIP's list of models."""

    name: str
    dim: int
    """Length of a feature (D)."""

    image_size: str
    """Input size in pixels: ``224``, or ``384x192`` (height, width)."""

    tags: Mapping[str, bool]
    """Tags of pretrained weights, and whether the weights are on this machine."""


def list_models(weights_dir: str | None = None) -> tuple[Listed, ...]:
    """Return OpenCLIP's models, and which of their weights jobs on this machine would find."""
    return tuple(_listed(name, weights_dir) for name in open_clip.list_models())


def _listed(name: str, weights_dir: str | None) -> Listed:
    model = open_clip.get_model_config(name)
    size = model["vision_cfg"]["image_size"]
    tags = open_clip.list_pretrained_tags_by_model(name)
    return Listed(
        name=name,
        dim=int(model["embed_dim"]),
        image_size="x".join(str(side) for side in ([size] if isinstance(size, int) else size)),
        tags={tag: has_weights(_published_weights(name, tag), weights_dir) for tag in tags},
    )


def _published_weights(name: str, tag: str) -> Published:
    cfg = open_clip.get_pretrained_cfg(name, tag)
    preprocessing = {key: cfg[key] for key in PREPROCESSING_KEYS if key in cfg}
    return Published(name, tag, str(cfg.get("hf_hub", "")), preprocessing)


def read_model(model: str) -> ModelFile:
    """Read the definition of a model, by the name of an OpenCLIP model or from a JSON file.

    The file contains a model definition in OpenCLIP's format, or ``{"model_cfg": …,
    "preprocess_cfg": …}`` as OpenCLIP saves it for the hub.

    Raises:
        ConfigError: the model does not exist, or the file is not a model definition.
    """
    if not model.endswith(".json"):
        return ModelFile(model, _builtin(model), {}, builtin=True)
    path = Path(model)
    if not path.is_file():
        raise ConfigError(
            f"encoder.model: no file {model}; want an OpenCLIP model JSON, whose path is relative "
            f"to the config file{copy_of_preset(path)}"
        )
    with report_corrupt(
        f"encoder.model: {model}", "", ConfigError, problem="not an OpenCLIP model"
    ):
        tree = json.loads(path.read_bytes())
        definition = {"text_cfg": {}, **tree.get("model_cfg", tree)}
        missing = [key for key in ("embed_dim", "vision_cfg") if key not in definition]
        if missing:
            raise ConfigError(f"encoder.model: {model}: no {missing[0]!r}; want an OpenCLIP model")
        return ModelFile(path.stem, definition, tree.get("preprocess_cfg", {}), builtin=False)


def _builtin(name: str) -> dict[str, Any]:
    if name in open_clip.list_models():
        definition: dict[str, Any] = open_clip.get_model_config(name)
        return definition
    near = difflib.get_close_matches(name, open_clip.list_models(), n=1)
    advice = f"did you mean {near[0]!r}?" if near else "run `movienet-encode models` for a list"
    raise ConfigError(f"encoder.model: no OpenCLIP model {name!r}; {advice}")


def _published(file: ModelFile, pretrained: str | None) -> Published | None:
    """Return the weights of a tag; None if ``pretrained`` is not a tag of the model."""
    if pretrained is None or not file.builtin:
        return None
    cfg = open_clip.get_pretrained_cfg(file.name, pretrained)
    if not cfg:
        return None
    _check_activation(file, pretrained, quick=bool(cfg.get("quick_gelu", False)))
    return _published_weights(file.name, pretrained)


def _check_activation(file: ModelFile, tag: str, *, quick: bool) -> None:
    """Raise where OpenCLIP only warns: the wrong activation gives wrong features."""
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
    if Path(config.pretrained).is_dir():
        files = sorted(f.name for f in Path(config.pretrained).iterdir() if f.suffix in SUFFIXES)
        raise ConfigError(
            f"encoder.pretrained: {config.pretrained} is a folder, want a checkpoint file in it: "
            f"{', '.join(files) or 'it has none'}"
        )
    if Path(config.pretrained).is_file():
        preprocessing = _checkpoint_preprocessing(config, file)
        return WeightsSource(CHECKPOINT, Path(config.pretrained), preprocessing)
    tags = open_clip.list_pretrained_tags_by_model(file.name) if file.builtin else []
    near = difflib.get_close_matches(config.pretrained, tags, n=1)
    advice = f"; did you mean {near[0]!r}?" if near else f" ({', '.join(tags) or 'it has none'})"
    raise ConfigError(
        f"encoder.pretrained: got {config.pretrained!r}, want null, a checkpoint file, or a tag "
        f"of {file.name}{advice}"
    )


def _checkpoint_preprocessing(config: EncoderConfig, file: ModelFile) -> Mapping[str, object]:
    """Return the preprocessing of a checkpoint as far as the model file does not specify it.

    A checkpoint contains neither preprocessing nor activation. Nothing is guessed, because a wrong
    guess would silently give wrong features.

    Raises:
        ConfigError: the configuration specifies neither.
    """
    if not file.builtin:
        specified = {**file.model, **file.preprocessing}
        missing = [key for key in ("quick_gelu", "mean", "std") if key not in specified]
        if missing:
            raise ConfigError(
                f"encoder.pretrained: {config.pretrained} does not contain how it was trained; "
                f"specify {', '.join(missing)} in {config.model}: quick_gelu in model_cfg, mean "
                "and std in preprocess_cfg"
            )
        return {}
    published = _published(file, config.pretrained_like)
    if published is None:
        tags = open_clip.list_pretrained_tags_by_model(file.name)
        raise ConfigError(
            f"encoder.pretrained_like: got {config.pretrained_like!r}, but the checkpoint "
            f"{config.pretrained} does not contain its activation and preprocessing; want the tag "
            "with the same ones: "
            f"{', '.join(tags) or 'the model has none, so define it in a JSON file'}"
        )
    return published.preprocessing


@dataclass(frozen=True)
class LoadedModel:
    """A complete OpenCLIP model, in fp32 on the CPU."""

    file: ModelFile
    source: WeightsSource
    model: Any
    """With ``visual`` and ``encode_text``. Untrained models have the smallest text tower."""


def load_model(config: EncoderConfig) -> LoadedModel:
    """Build the model of a configuration and load its weights.

    Raises:
        ConfigError: model or tag do not exist, or their activations differ.
        DataError: weights are missing, corrupt, or belong to another model.
    """
    file = read_model(config.model)
    source = _find_source(config, file)
    return LoadedModel(file, source, _build(file, source, config.seed))


def make_tokenizer(file: ModelFile) -> Callable[[list[str]], Tensor]:
    """Return OpenCLIP's tokenizer of a model; it works without a network.

    Returns:
        A function from T texts to int64 ``[T, context length]``; longer texts are cut.

    Raises:
        ConfigError: the text tower does not use OpenCLIP's own tokenizer.
    """
    text = file.model["text_cfg"]
    other = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if other:
        raise ConfigError(
            f"encoder.model: the text tower of {file.name} needs the tokenizer {other!r} of the "
            "Hugging Face hub, want a model with OpenCLIP's own, e.g. ViT-B-32-quickgelu"
        )
    with _quiet_root(), _folder_of(file) as folder:
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    known = int(text.get("vocab_size", tokenizer.vocab_size))
    if known < tokenizer.vocab_size:
        raise ConfigError(
            f"encoder.model: {file.name} has no usable text tower: got a vocabulary of {known} "
            f"tokens, want the {tokenizer.vocab_size} of OpenCLIP's tokenizer"
        )
    tokenize: Callable[[list[str]], Tensor] = tokenizer
    return tokenize


def _build(file: ModelFile, source: WeightsSource, seed: int) -> Any:
    # A checkpoint needs the full text tower, else nothing uses it and the smallest suffices.
    text = {} if source.path or "multimodal_cfg" in file.model else {"text_cfg": NO_TEXT}
    # Untrained weights depend on the seed alone, and the caller's random state does not change.
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
            raise ConfigError(f"encoder.model: {file.name}: OpenCLIP raises: {error}") from error
    if source.label == CHECKPOINT and source.path:
        _load_checkpoint(model, source.path, file.name)
    elif source.path:
        _load_by_openclip(model, source.path, file.name, fetch_again(source.path))
    return model


@contextmanager
def _folder_of(file: ModelFile) -> Iterator[str]:
    """Write a model folder for OpenCLIP, whose registry of names then stays unchanged."""
    tree = {"model_cfg": file.model, "preprocess_cfg": file.preprocessing}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(tree), encoding="utf-8")
        yield folder


def _load_by_openclip(model: nn.Module, path: Path, name: str, remedy: str) -> None:
    with report_corrupt(path, remedy, problem=f"not weights of {name}"):
        open_clip.load_checkpoint(model, str(path))


def _load_checkpoint(model: nn.Module, path: Path, name: str) -> None:
    """Load a checkpoint of any trainer; other names and shapes are left to OpenCLIP."""
    if path.suffix in (".npz", ".npy"):  # of big_vision
        _load_by_openclip(model, path, name, _OTHER)
        return
    expected = model.state_dict()
    unsaved = _CONSTANTS | (dict(model.named_buffers()).keys() - expected.keys())
    tensors = openclip_names(read_tensors(path), expected, path)
    state = {key: value for key, value in tensors.items() if key not in unsaved}
    if _shapes(state) == _shapes(expected):
        model.load_state_dict(state)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pt"
        torch.save(state, file)
        try:
            _load_by_openclip(model, file, name, _OTHER)
        except DataError as error:
            difference = _difference(_shapes(state), _shapes(expected))
            raise DataError(f"{path}: not weights of {name}: {difference}; {_OTHER}") from error


def _shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in state.items()}


def _difference(got: Mapping[str, list[int]], want: Mapping[str, list[int]]) -> str:
    """Return which tensors are missing or unknown, else one of another shape."""
    sides = (("lacks", want.keys() - got.keys()), ("has unknown", got.keys() - want.keys()))
    counts = [f"it {verb} {len(keys)} tensors, e.g. {min(keys)}" for verb, keys in sides if keys]
    shapes = (f"{key} is {got[key]}, want {want[key]}" for key in want if got[key] != want[key])
    return ", ".join(counts) or next(shapes)


def _compiled(visual: nn.Module) -> Callable[[Tensor], Any]:
    """Compile a tower; an error of the compiler at the first call becomes a ``ConfigError``."""
    forward, ready = torch.compile(visual, dynamic=False), False

    def run(pixels_BCHW: Tensor) -> Any:
        nonlocal ready
        if not ready:
            logger.info("compiling the tower, which may take minutes")
        try:
            features = forward(pixels_BCHW)
        except RuntimeError as error:
            if ready:
                raise
            reason = str(error).strip().splitlines()[0][:200]
            raise ConfigError(
                f"encoder.compile: torch.compile fails: {reason}; set encoder.compile=false"
            ) from error
        ready = True
        return features

    return run


@contextmanager
def _quiet_root() -> Iterator[None]:
    """Hide OpenCLIP's log lines; ``description`` contains what matters."""
    root = logging.getLogger()

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root.addFilter(is_error)
    try:
        yield
    finally:
        root.removeFilter(is_error)


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
    size = tower.preprocessing
    origin = f"weights {source.label}" if source.label else f"UNTRAINED weights of seed {seed}"
    return (
        f"{tower.name}: {origin} ({digest[:12]}), {size.width}x{size.height} px to "
        f"{tower.dim} values"
    )
