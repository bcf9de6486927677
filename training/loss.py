"""Losses of one window, and the one sum that makes a step the same on any number of ranks.

B = windows of a micro-batch, G = genres. A loss takes logits and labels ``[B, G]`` and returns
one number per window, ``[B]``, so that padding windows can have no weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from configs.errors import ConfigError
from configs.user_code import load_object

Loss = Callable[[Tensor, Tensor], Tensor]


def make_loss(name: str, positives_G: Tensor, n_movies: int) -> Loss:
    """Return the loss that ``training.loss`` names.

    Args:
        name: ``bce``, ``balanced_bce``, ``weighted_bce``, or ``pkg.mod:function``.
        positives_G: float32 ``[G]``, number of train movies with each genre.
        n_movies: Number of train movies.

    Returns:
        A function of logits and labels, both float32 ``[B, G]`` on one device, to float32 ``[B]``.

    Raises:
        ConfigError: there is no such loss, or it does not return one number per window.
    """
    if name == "bce":
        return bce
    if name == "balanced_bce":
        return balanced_bce(positives_G, n_movies)
    if name == "weighted_bce":
        return weighted_bce(positives_G)
    if ":" not in name:
        want = "'bce', 'balanced_bce', 'weighted_bce' or 'pkg.mod:function'"
        raise ConfigError(f"training.loss: got {name!r}, want {want}")
    loss: Loss = load_object(name, key="training.loss")
    _try_loss(loss, name, n_genres=len(positives_G))
    return loss


def _try_loss(loss: Loss, name: str, *, n_genres: int) -> None:
    logits_BG, labels_BG = torch.zeros(2, n_genres), torch.zeros(2, n_genres)
    try:
        value = loss(logits_BG, labels_BG)
    except Exception as error:
        shape = list(logits_BG.shape)
        raise ConfigError(
            f"training.loss: {name} fails on logits and labels {shape}: {error}"
        ) from error
    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if got != [2]:
        raise ConfigError(f"training.loss: {name} returns {got}, want one number a window, [2]")


def bce(logits_BG: Tensor, labels_BG: Tensor) -> Tensor:
    """Return the binary cross-entropy of each window, mean over genres: ``[B]``.

    Args:
        logits_BG: float32 ``[B, G]``.
        labels_BG: float32 ``[B, G]``, 0 to 1 (mixup makes fractions).
    """
    return binary_cross_entropy_with_logits(logits_BG, labels_BG, reduction="none").mean(1)


def balanced_bce(positives_G: Tensor, n_movies: int) -> Loss:
    """Return a binary cross-entropy in which the positives of rare genres weigh more.

    By the square root of negatives to positives, at least 1: the whole ratio would make scores of
    different genres incomparable. Logits are then no longer those of the classes' shares.

    Args:
        positives_G: float32 ``[G]``, number of train movies with each genre.
        n_movies: Number of train movies.
    """
    rarity_G = ((n_movies - positives_G) / positives_G.clamp_min(1)).clamp_min(1).sqrt()

    def loss(logits_BG: Tensor, labels_BG: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(
            logits_BG, labels_BG, pos_weight=rarity_G.to(logits_BG), reduction="none"
        ).mean(1)

    return loss


def weighted_bce(positives_G: Tensor) -> Loss:
    """Return a binary cross-entropy with genres weighted by ``positives``, as was published.

    Scaled to a mean weight of 1: the learning rate keeps its meaning.

    Args:
        positives_G: float32 ``[G]``, number of train movies with each genre.
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
    """Return what a rank must send backward for one micro-batch.

    DDP averages gradients over ranks, and Accelerate divides by the accumulation steps; both are
    undone here. What remains is the weighted mean over the global batch, however it was cut.

    Args:
        loss_B: float32 ``[B]``, loss of each window.
        weight_B: float32 ``[B]``, 1, or 0 for padding.
        global_weight: Sum of the weights over all ranks and micro-batches of the step.
        world_size: Ranks.
        accumulation: Micro-batches of the step.

    Returns:
        float32 scalar.
    """
    return (loss_B * weight_B).sum() * (world_size * accumulation / global_weight)
