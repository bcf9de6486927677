"""Construction of models by name, and their check before training.

A model is named ``pkg.mod:Net`` or, in a file, ``/path/net.py:Net``. Its constructor receives
those of ``dim, genres, frames, prior, rows`` (``training.data_stats``) that its signature names,
and its own options.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from configs.errors import ConfigError
from configs.user_code import load_object, raised_at
from training.data_stats import DataStats

BUILT_IN = (
    "training.models.mean:MeanLinear",
    "training.models.mean:MeanMLP",
    "training.models.attention:GatedAttention",
    "training.models.lstm:MaskedLSTM",
    "training.models.transformer:Transformer",
    "training.models.lstm:OriginalLSTM",
)


def build_model(name: str, options: Mapping[str, Any], data_stats: DataStats) -> nn.Module:
    """Return a model with fresh weights.

    Args:
        name: ``pkg.mod:Net`` or ``/path/net.py:Net``.
        options: ``model.options`` of the config.
        data_stats: Statistics of the data, the source of the arguments that are no options.

    Raises:
        ConfigError: the module or class does not exist, its signature does not accept the options,
            or its constructor fails.
    """
    cls = load_object(name, key="model.class")
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(f"model.class: {name!r} is {cls!r}, want a subclass of nn.Module")
    provided = data_stats.arguments()
    parameters, accepts_any = _parameters(cls)
    for option in options:
        _check_option(option, name, parameters - provided.keys(), provided, accepts_any=accepts_any)
    # ``**kwargs`` counts as accepting any option, but not as requesting the statistics.
    arguments = {key: value for key, value in provided.items() if key in parameters}
    try:
        inspect.signature(cls).bind(**arguments, **options)
    except TypeError as error:
        raise ConfigError(
            f"model.options: got {dict(options)}, {name} refuses them: {error}"
        ) from error
    try:
        return cls(**arguments, **options)
    except (Exception, SystemExit) as error:
        given = f" with model.options {dict(options)}" if options else ""
        where = raised_at(error, name)
        raise ConfigError(f"model.class: {name} cannot be constructed{given}: {where}") from error


def check_model(model: nn.Module, features_BTD: Tensor, mask_BT: Tensor, n_genres: int) -> None:
    """Run a model forward and backward on a batch of two movies.

    Args:
        model: The bare model, on the CPU.
        features_BTD: float32 ``[B, T, D]``.
        mask_BT: bool ``[B, T]``, True for a real row.
        n_genres: Number of genres, G.

    Raises:
        ConfigError: one line names what is wrong. The model raises an error, or returns another
            shape than ``[B, G]``, values that are not finite, or probabilities. A parameter is
            lazy, complex or not dense, or receives no gradient (with several ranks, DDP would wait
            for that gradient forever). Padding changes the output, and the class declares neither
            ``fixed_frames`` nor ``reads_padding = True``.
    """
    _check_parameters(model)
    try:
        _check_outputs(model, features_BTD, mask_BT, n_genres)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        name, shape = type(model).__name__, list(features_BTD.shape)
        where = raised_at(error, f"{type(model).__module__}:{name}")
        raise ConfigError(f"model.class: {name} fails on features {shape}: {where}") from error


def _check_outputs(model: nn.Module, features_BTD: Tensor, mask_BT: Tensor, n_genres: int) -> None:
    name = type(model).__name__
    logits_BG = _logits(model, features_BTD, mask_BT)
    want = [len(features_BTD), n_genres]
    if not isinstance(logits_BG, Tensor) or list(logits_BG.shape) != want:
        got = list(logits_BG.shape) if isinstance(logits_BG, Tensor) else type(logits_BG).__name__
        raise ConfigError(f"model.class: {name} returns {got}, want logits {want}")
    if not logits_BG.isfinite().all():
        raise ConfigError(f"model.class: {name} returns logits that are not finite on real movies")
    _check_range(model, features_BTD, mask_BT)
    _check_gradients(model, features_BTD, mask_BT)
    if fixed_frames(model) or getattr(model, "reads_padding", False):
        return
    change = _change_by_padding(model, features_BTD, mask_BT)
    if not change < 1e-4:  # also true for nan
        raise ConfigError(
            f"model.class: {name} reads rows outside the mask: padding changes its logits by "
            f"{change:.2g}; use the mask, or set `reads_padding = True` in the class"
        )


def _check_parameters(model: nn.Module) -> None:
    """Raise for tensors that a checkpoint or the fused optimizer cannot represent."""
    name = type(model).__name__
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            problem = "is lazy; construct it with its size, from the argument `dim`"
        elif tensor.is_complex():
            problem = "is complex; store its real and imaginary part as two parameters"
        elif torch.empty_like(tensor).stride() != tensor.stride():  # gaps, or shared elements
            problem = f"has strides {tensor.stride()}; construct it from a copy, by `.clone()`"
        else:
            continue
        raise ConfigError(f"model.class: {key!r} of {name} {problem}")


def _check_range(model: nn.Module, features_BTD: Tensor, mask_BT: Tensor) -> None:
    """Raise if the outputs are probabilities: the loss and every metric take them for logits."""
    scales = (1.0, -10.0, 10.0)
    logits = torch.stack([_logits(model, scale * features_BTD, mask_BT) for scale in scales])
    # A fresh last layer of zeros gives constant logits, which is fine.
    is_constant = bool((logits == logits[0]).all())
    if not is_constant and bool(((logits >= 0) & (logits <= 1)).all()):
        raise ConfigError(
            f"model.class: {type(model).__name__} returns values between 0 and 1 only, as after a "
            "sigmoid, want logits; remove the final sigmoid, which the loss applies"
        )


def _check_gradients(model: nn.Module, features_BTD: Tensor, mask_BT: Tensor) -> None:
    name = type(model).__name__
    logits_BG = model(features_BTD, mask_BT)
    if not logits_BG.requires_grad:
        raise ConfigError(f"model.class: the logits of {name} depend on no trainable parameter")
    logits_BG.sum().backward()
    trained = [(key, value) for key, value in model.named_parameters() if value.requires_grad]
    unused = [key for key, value in trained if value.grad is None]
    model.zero_grad(set_to_none=True)  # as if this check had not run
    if unused:
        raise ConfigError(
            f"model.class: {name} does not use its parameter {unused[0]!r}; "
            "use it, remove it, or set its requires_grad to False"
        )


def fixed_frames(model: nn.Module) -> int | None:
    """Return the only window length that a model accepts, or None if it accepts any."""
    frames = getattr(model, "fixed_frames", None)
    return frames if isinstance(frames, int) else None


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def options_of(name: str) -> dict[str, Any]:
    """Return the options of a model with their defaults.

    The value of a required option is ``inspect.Parameter.empty``.
    """
    cls = load_object(name, key="model.class")
    provided = DataStats.neutral(dim=1, n_genres=1, frames=1).arguments()
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.name not in provided
    }


def _logits(model: nn.Module, features_BTD: Tensor, mask_BT: Tensor) -> Any:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(features_BTD, mask_BT)
    model.train(was_training)
    return logits


def _change_by_padding(model: nn.Module, features_BTD: Tensor, mask_BT: Tensor) -> float:
    """Return the largest relative change of a logit when the values of masked rows change."""
    mask_BT = mask_BT.clone()
    # The movies may fill their windows: mask the second half to have padding at all.
    mask_BT[:, mask_BT.shape[1] // 2 + 1 :] = False
    changed_BTD = features_BTD.masked_fill(~mask_BT.unsqueeze(-1), 7.0)
    before, after = _logits(model, features_BTD, mask_BT), _logits(model, changed_BTD, mask_BT)
    return float(((after - before).abs() / (1 + before.abs())).max())


def _parameters(cls: type) -> tuple[set[str], bool]:
    """Return the keyword parameters of a constructor, and whether it accepts any others."""
    parameters = inspect.signature(cls).parameters.values()
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {parameter.name for parameter in parameters if parameter.kind in keyword}, accepts_any


def _check_option(
    option: str, name: str, options: set[str], provided: Mapping[str, Any], *, accepts_any: bool
) -> None:
    if option in provided:
        raise ConfigError(f"model.options: {option!r} is set from the data; remove this option")
    if accepts_any or option in options:
        return
    near = difflib.get_close_matches(option, options, n=1)
    listing = f"options: {', '.join(sorted(options)) or 'none'}"
    suggestion = f"did you mean {near[0]!r}?" if near else listing
    raise ConfigError(f"model.options: {name} has no option {option!r}; {suggestion}")
