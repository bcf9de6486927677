"""Find a model by name, give it what it asks for, and try it before anyone waits.

A model may take from its signature what it needs of ``dim, genres, frames, prior, rows``
(``training.given``), and its own options. It is found as ``pkg.mod:Net`` or as a file,
``/path/net.py:Net``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.user_code import load_object
from training.data_stats import DataStats

BUILT_IN = (
    "training.models.mean:MeanLinear",
    "training.models.mean:MeanMLP",
    "training.models.attention:GatedAttention",
    "training.models.lstm:MaskedLSTM",
    "training.models.transformer:Transformer",
    "training.models.lstm:OriginalLSTM",
)


def build_model(name: str, options: Mapping[str, Any], given: DataStats) -> nn.Module:
    """Return a model with fresh weights.

    Args:
        name: ``pkg.mod:Net`` or ``/path/net.py:Net``.
        options: ``model.options`` of the config.
        given: What the data say.

    Raises:
        ConfigError: no such module or class, or an option that it does not take.
    """
    cls = load_object(name, key="model.class")
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(f"model.class: {name!r} is {cls!r}, want a class derived from nn.Module")
    offered = given.arguments()
    known, takes_any = _parameters(cls)
    for option in options:
        _check_option(option, name, known - offered.keys(), offered, takes_any=takes_any)
    arguments = {key: value for key, value in offered.items() if key in known}
    try:
        return cls(**arguments, **options)
    except Exception as error:
        kind = type(error).__name__
        raise ConfigError(f"model.options: {name} refuses them: {kind}: {error}") from error


def check_model(model: nn.Module, features_BTD: Tensor, mask_BT: Tensor, n_genres: int) -> None:
    """Try a model on a batch of two movies.

    Raises:
        ConfigError: it fails, or gives another shape than ``[B, G]``, values that are no numbers,
            or no gradient to a parameter (several ranks would wait for that one for ever); or
            padding changes its output, and it does not say so by ``fixed_frames`` or
            ``reads_padding = True``.
    """
    name = type(model).__name__
    try:
        logits_BG = _logits(model, features_BTD, mask_BT)
    except Exception as error:
        shape = list(features_BTD.shape)
        raise ConfigError(f"model.class: {name} fails on features {shape}: {error}") from error
    want = [len(features_BTD), n_genres]
    if not isinstance(logits_BG, Tensor) or list(logits_BG.shape) != want:
        got = list(logits_BG.shape) if isinstance(logits_BG, Tensor) else type(logits_BG).__name__
        raise ConfigError(f"model.class: {name} returns {got}, want logits {want}")
    if not logits_BG.isfinite().all():
        raise ConfigError(f"model.class: {name} returns values that are no numbers on real movies")
    _check_gradients(model, features_BTD, mask_BT)
    if fixed_frames(model) or getattr(model, "reads_padding", False):
        return
    change = _change_by_padding(model, features_BTD, mask_BT)
    if not change < 1e-4:  # nan is none
        raise ConfigError(
            f"model.class: {name} reads rows outside the mask: padding changes its logits by "
            f"{change:.2g}; use the mask, or state `reads_padding = True` in the class"
        )


def _check_gradients(model: nn.Module, features_BTD: Tensor, mask_BT: Tensor) -> None:
    name = type(model).__name__
    logits_BG = model(features_BTD, mask_BT)
    if not logits_BG.requires_grad:
        raise ConfigError(f"model.class: the logits of {name} lead back to no parameter")
    logits_BG.sum().backward()
    trained = [(key, value) for key, value in model.named_parameters() if value.requires_grad]
    unused = [key for key, value in trained if value.grad is None]
    model.zero_grad(set_to_none=True)
    if unused:
        raise ConfigError(
            f"model.class: {name} does not use its parameter {unused[0]!r}; "
            "use it, remove it, or set its requires_grad to False"
        )


def fixed_frames(model: nn.Module) -> int | None:
    """Return the only window length that a model takes, if it says one."""
    frames = getattr(model, "fixed_frames", None)
    return frames if isinstance(frames, int) else None


def count_parameters(model: nn.Module) -> int:
    """Return the number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def options_of(name: str) -> dict[str, Any]:
    """Return the options of a model with their defaults; a required one has no default."""
    cls = load_object(name, key="model.class")
    given = DataStats.neutral(dim=1, n_genres=1, frames=1).arguments()
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.name not in given
    }


def _logits(model: nn.Module, features_BTD: Tensor, mask_BT: Tensor) -> Any:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(features_BTD, mask_BT)
    model.train(was_training)
    return logits


def _change_by_padding(model: nn.Module, features_BTD: Tensor, mask_BT: Tensor) -> float:
    """Return the largest change of a logit, in parts of its size, where hidden rows change."""
    mask_BT = mask_BT.clone()
    mask_BT[:, mask_BT.shape[1] // 2 + 1 :] = False
    other_BTD = features_BTD.masked_fill(~mask_BT.unsqueeze(-1), 7.0)
    before, after = _logits(model, features_BTD, mask_BT), _logits(model, other_BTD, mask_BT)
    return float(((after - before).abs() / (1 + before.abs())).max())


def _parameters(cls: type) -> tuple[set[str], bool]:
    parameters = inspect.signature(cls).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    nameable = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {parameter.name for parameter in parameters if parameter.kind in nameable}, takes_any


def _check_option(
    option: str, name: str, known: set[str], offered: Mapping[str, Any], *, takes_any: bool
) -> None:
    if option in offered:
        raise ConfigError(f"model.options: {option!r} is given by the data, leave it out")
    if takes_any or option in known:
        return
    near = difflib.get_close_matches(option, known, n=1)
    options = f"options: {', '.join(sorted(known)) or 'none'}"
    hint = f"did you mean {near[0]!r}?" if near else options
    raise ConfigError(f"model.options: {name} has no option {option!r}; {hint}")
