"""Losses of one window, and the one sum that makes a step the same on any number of ranks.

B = windows of a micro-batch, G = genres. A loss takes logits and labels ``[B, G]`` and returns
one number a window, ``[B]``, so that padding windows can weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from configs.errors import ConfigError
from training.registry import load_object

Loss = Callable[[Tensor, Tensor], Tensor]


def make_loss(name: str, positives_G: Tensor) -> Loss:
    """Return the loss that ``training.loss`` names.

    ``weighted_bce`` weighs each genre by its number of train movies, as the published
    configuration did, but scaled to a mean weight of 1: the learning rate keeps its meaning.

    Args:
        name: ``bce``, ``weighted_bce`` or ``pkg.mod:function``.
        positives_G: Number of train movies with each genre.

    Raises:
        ConfigError: there is no such loss.
    """
    if name == "bce":
        return bce
    if name == "weighted_bce":
        return weighted_bce(positives_G)
    if ":" not in name:
        raise ConfigError(
            f"training.loss: got {name!r}, want 'bce', 'weighted_bce' or 'pkg.mod:function'"
        )
    loss: Loss = load_object(name, key="training.loss")
    return loss


def bce(logits_BG: Tensor, labels_BG: Tensor) -> Tensor:
    """Return the binary cross-entropy of each window, mean over genres."""
    return binary_cross_entropy_with_logits(logits_BG, labels_BG, reduction="none").mean(1)


def weighted_bce(positives_G: Tensor) -> Loss:
    """Return a binary cross-entropy with genres weighted by ``positives``, mean weight 1."""
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
    """
    return (loss_B * weight_B).sum() * (world_size * accumulation / global_weight)
