"""Trial of a model before training: one step, a checkpoint, an export, and both loaded again.

A model that keeps state outside its parameters and buffers is scored as another model than was
trained, without an error. One that cannot be saved, resumed or exported fails after hours. Both are
found here within a second, by the code that saves, loads and exports a run.
"""

from __future__ import annotations

import ast
import errno
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from configs.errors import ConfigError, MachineError, error_text
from configs.runtime.publish import TEMPORARY_PREFIX
from configs.user_code import raised_at
from training.checkpoint import Identity, Position, checkpoint_dir, find, save
from training.export import export, load_exported
from training.optim import make_optimizer
from training.registry import build_model

_SEEDS = (1, 2)
"""Two seeds: state that is not saved differs between the two instances."""

_LR = 1e-3
"""Of the trial's steps: one that diverges by the run's own rate is reported by the run."""

_MOST_CHANGE = 1e-4
"""Relative change of a logit that rounding may cause."""

_FREE = "free disk space and rerun the command"
_DISK = "check this disk and rerun the command"
_DISK_ERRORS = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EIO: _DISK,
    errno.EROFS: _DISK,
    errno.ESTALE: _DISK,
}
"""Errors for which no model is to blame, with their remedies."""

_RANDOM = "use random numbers only `if self.training`"
_UNSAVED = (
    "it keeps state outside its parameters and buffers: use nn.Parameter or register_buffer for "
    "every tensor that its outputs depend on"
)
_ORDER = "return the parameter groups in the same order each time, and keep all state in buffers"

_PACKAGES = frozenset({"configs", "encoders", "eval", "movienet_stream", "sharding", "training"})
"""Our packages: a custom file may import them, also where it is stored next to them."""


@dataclass(frozen=True)
class Sample:
    """A batch of real movies."""

    features_BTD: Tensor
    """float32."""

    mask_BT: Tensor
    """bool, True for a real row."""


def try_model(identity: Identity, sample: Sample, scratch: Path) -> None:
    """Train one step, save, load and export a model of the run, and compare the results.

    The run's own model and generators are not touched.

    Args:
        identity: The run.
        sample: Two movies.
        scratch: Existing folder, in which a temporary one is created.

    Raises:
        ConfigError: the loaded or exported model returns other logits, or a resumed step gives
            other weights; or saving, loading or exporting fails.
    """
    for file in (identity.config.model.class_, identity.config.training.loss):
        check_imports(file)
    with (
        TemporaryDirectory(dir=scratch, prefix=f"{TEMPORARY_PREFIX}trial-") as folder,
        torch.random.fork_rng(devices=[]),
        _report(identity.config.model.class_),
    ):
        _try_in(Path(folder), identity, sample)


def check_imports(name: str) -> None:
    """Check that a custom file imports no file next to it: only the file itself is kept.

    Raises:
        ConfigError: it does; the message names both files.
    """
    path = Path(name.rpartition(":")[0])
    if path.suffix != ".py":
        return
    for module in _imported(path):
        neighbour = _origin(module)
        if neighbour is not None and path.resolve().parent in (
            neighbour.parent,
            neighbour.parents[1],
        ):
            raise ConfigError(
                f"{path}: imports {module!r} from {neighbour}, but a run keeps {path.name} alone; "
                "move the code into this file, or install it as a package"
            )


def _imported(path: Path) -> Iterator[str]:
    """Yield the top-level names of the modules that a file imports, except our own."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        yield from ({name.partition(".")[0] for name in names} - _PACKAGES)


def _origin(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    return Path(spec.origin).resolve()


def _try_in(folder: Path, identity: Identity, sample: Sample) -> None:
    model = _build(identity, _SEEDS[0])
    training = identity.config.training.model_copy(update={"lr": _LR})
    optimizer = make_optimizer(model, training)
    _step(model, optimizer, sample)
    place = checkpoint_dir(folder, "last")
    position = Position(epoch=1, step=1)
    save(
        place, model=model, average=None, optimizer=optimizer, position=position, identity=identity
    )
    want_BG = _logits(model, sample)
    _compare("a second call in evaluation mode", _RANDOM, want_BG, _logits(model, sample))
    torch.manual_seed(_SEEDS[1])
    saved = find(folder, "last")
    if saved is None:
        raise AssertionError("the checkpoint was saved above")
    loaded = saved.build()
    _compare("its checkpoint", _UNSAVED, want_BG, _logits(loaded, sample))
    export(folder, "last", folder / "model.safetensors")
    exported = load_exported(folder / "model.safetensors").model
    _compare("its export", _UNSAVED, want_BG, _logits(exported, sample))
    resumed = make_optimizer(loaded, training)
    saved.load_optimizer(resumed)
    for module, one in ((model, optimizer), (loaded, resumed)):
        _step(module, one, sample)
    _compare("a step after its checkpoint", _ORDER, _logits(model, sample), _logits(loaded, sample))


def _build(identity: Identity, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = identity.config.model
    return build_model(model.class_, model.options, identity.data_stats)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, sample: Sample) -> None:
    """Take one step towards all genres; dropout is the same in every call."""
    torch.manual_seed(_SEEDS[0])
    model.train()
    optimizer.zero_grad()
    logits_BG = model(sample.features_BTD, sample.mask_BT).float()
    loss = binary_cross_entropy_with_logits(logits_BG, torch.ones_like(logits_BG))
    torch.autograd.backward(loss)
    optimizer.step()


def _logits(model: nn.Module, sample: Sample) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits_BG: Tensor = model(sample.features_BTD, sample.mask_BT)
    return logits_BG.float()


def _compare(where: str, advice: str, want_BG: Tensor, got_BG: Tensor) -> None:
    change = float(((got_BG - want_BG).abs() / (1 + want_BG.abs())).max())
    if not change < _MOST_CHANGE:  # also true for nan
        raise ConfigError(f"{where} changes its logits by {change:.2g}; {advice}")


@contextmanager
def _report(name: str) -> Iterator[None]:
    """Begin every message with the key; what the user's code raises becomes one line."""
    short = name.rpartition(":")[2]
    try:
        yield
    except MachineError:
        raise
    except ConfigError as error:
        raise ConfigError(f"model.class: {short}: {error}") from error
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise MachineError(f"{error_text(error)}; {_DISK_ERRORS[error.errno]}") from error
        where = raised_at(error.__cause__ or error, name)
        raise ConfigError(
            f"model.class: {short} cannot be saved, loaded and exported: {where}"
        ) from error
