"""Losses per window, and their sum, which is independent of the world size.

B = windows of a micro-batch, G = genres. A loss takes logits and labels ``[B, G]`` and returns
one value per window, ``[B]``, so that padding windows can be given weight 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from configs.errors import ConfigError
from configs.user_code import load_object, raised_at

Loss = Callable[[Tensor, Tensor], Tensor]


def make_loss(name: str, positives_G: Tensor, n_movies: int) -> Loss:
    """Return the loss named by ``training.loss``.

    Args:
        name: ``bce``, ``balanced_bce``, ``weighted_bce``, or the path of a custom loss,
            ``pkg.mod:function`` or ``./loss.py:function``.
        positives_G: float32 ``[G]``, number of train movies per genre.
        n_movies: Number of train movies.

    Returns:
        A function of logits and labels, both float32 ``[B, G]`` on one device, to float32 ``[B]``.

    Raises:
        ConfigError: the loss does not exist, does not return one value per window, or gives the
            logits no gradient.
    """
    if name == "bce":
        return bce
    if name == "balanced_bce":
        return balanced_bce(positives_G, n_movies)
    if name == "weighted_bce":
        return weighted_bce(positives_G)
    if ":" not in name:
        want = "'bce', 'balanced_bce', 'weighted_bce', 'pkg.mod:function' or './file.py:function'"
        raise ConfigError(f"training.loss: got {name!r}, want {want}")
    loss: Loss = load_object(name, key="training.loss")
    _check_loss(loss, name, n_genres=len(positives_G))
    return loss


def _check_loss(loss: Loss, name: str, *, n_genres: int) -> None:
    logits_BG = torch.zeros(2, n_genres, requires_grad=True)
    # A custom loss may raise anything: report it before training instead of after the first reads.
    try:
        # A copy: like the output of a model, and unlike a leaf, it may be changed in place.
        value = loss(logits_BG.clone(), torch.zeros(2, n_genres))
        has_gradient = _has_gradient(value, logits_BG)
    except (Exception, SystemExit) as error:
        shape = list(logits_BG.shape)
        raise ConfigError(
            f"training.loss: {name} fails on logits and labels {shape}: {raised_at(error, name)}"
        ) from error
    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if got != [2]:
        raise ConfigError(f"training.loss: {name} returns {got}, want one value per window, [2]")
    if not has_gradient:
        raise ConfigError(
            f"training.loss: {name} gives the logits no gradient; use differentiable operations "
            "only: no comparison, rounding, argmax, detach() or no_grad()"
        )


def _has_gradient(value: object, logits_BG: Tensor) -> bool:
    if not isinstance(value, Tensor) or not value.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(value.sum(), logits_BG, allow_unused=True)
    return gradient is not None


def bce(logits_BG: Tensor, labels_BG: Tensor) -> Tensor:
    """Return the binary cross-entropy of each window, averaged over genres: ``[B]``.

    Args:
        logits_BG: float32 ``[B, G]``.
        labels_BG: float32 ``[B, G]``, 0 to 1 (fractional after mixup).
    """
    return binary_cross_entropy_with_logits(logits_BG, labels_BG, reduction="none").mean(1)


def balanced_bce(positives_G: Tensor, n_movies: int) -> Loss:
    """Return a binary cross-entropy that gives the positives of rare genres a higher weight.

    The weight is the square root of the ratio of negatives to positives, at least 1. The full
    ratio would make the scores of different genres incomparable. Under this loss the sigmoid of a
    logit no longer estimates the genre's frequency.

    Args:
        positives_G: float32 ``[G]``, number of train movies per genre.
        n_movies: Number of train movies.
    """
    # A genre without positives counts as one, which avoids a division by zero.
    rarity_G = ((n_movies - positives_G) / positives_G.clamp_min(1)).clamp_min(1).sqrt()

    def loss(logits_BG: Tensor, labels_BG: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(
            logits_BG, labels_BG, pos_weight=rarity_G.to(logits_BG), reduction="none"
        ).mean(1)

    return loss


def weighted_bce(positives_G: Tensor) -> Loss:
    """Return the published binary cross-entropy, with genres weighted by ``positives``.

    Weights are scaled to a mean of 1, so that the learning rate keeps its meaning.

    Args:
        positives_G: float32 ``[G]``, number of train movies per genre.
    """
    weight_G = positives_G / positives_G.mean()

    def loss(logits_BG: Tensor, labels_BG: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(
            logits_BG, labels_BG, weight=weight_G.to(logits_BG), reduction="none"
        ).mean(1)

    return loss


def share_of_step(
    loss_B: Tensor, weight_B: Tensor, *, global_weight: float, world_size: int, accumulation: int
) -> Tensor:
    """Return the loss to backpropagate for one micro-batch.

    DDP averages gradients over ranks and Accelerate divides by the accumulation steps. This
    function compensates for both, so that the step minimizes the weighted mean over the global
    batch, however it is divided.

    Args:
        loss_B: float32 ``[B]``, loss of each window.
        weight_B: float32 ``[B]``, 1, or 0 for padding.
        global_weight: Sum of the weights over all ranks and micro-batches of the step.
        world_size: Number of ranks.
        accumulation: Micro-batches per step.

    Returns:
        float32 scalar.
    """
    # Padding has weight 0. Every rank divides by the global weight, so that ranks with few real
    # windows count less.
    return (loss_B * weight_B).sum() * (world_size * accumulation / global_weight)
