"""Transformer encoder over the rows of a window.

B = windows, T = rows of a window, D = feature size, S = steps, W = width, A = attention heads,
E = size of a head, G = genres.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from training.models.rows import GenreHead, RowNormalizer, RowStatistics, Steps, masked_mean


class Transformer(nn.Module):
    """Pre-norm encoder with rotary or learned positions and mean or class-token pooling."""

    def __init__(
        self,
        *,
        dim: int,
        prior: Tensor,
        rows: RowStatistics,
        frames: int,
        width: int = 64,
        fold: int = 4,
        layers: int = 1,
        heads: int = 4,
        positions: Literal["rotary", "learned"] = "rotary",
        pooling: Literal["mean", "token"] = "mean",
        dropout: float = 0.5,
        input_dropout: float = 0.3,
        unit_rows: bool = True,
        skip: bool = True,
    ) -> None:
        """Start at the class prior.

        Args:
            dim: Feature size.
            prior: Share of train movies with each genre, ``[G]``.
            rows: Statistics of the train movies' rows.
            frames: Rows of a window. Learned positions cover these; later steps share the last.
            width: Size of a step; a multiple of ``2 * heads``.
            fold: Neighboring rows per step.
            layers: Blocks of attention and feed-forward.
            heads: Attention heads.
            positions: ``rotary`` rotates queries and keys, ``learned`` adds a vector to each step.
            pooling: ``mean`` over the real steps, or a class ``token`` prepended to them.
            dropout: Dropout probability inside the blocks and of pooled values.
            input_dropout: Dropout probability of the values of the mean row.
            unit_rows: Scale each row to length 1 before centering.
            skip: Add the linear path from the mean row.
        """
        super().__init__()
        _check_options(width, heads, positions, pooling)
        self.rows = RowNormalizer(rows, unit_rows=unit_rows)
        self.steps = Steps(dim, width=width, fold=fold)
        self.inlet = nn.Linear(self.steps.size, width)
        learned = positions == "learned"
        places_SW = 0.02 * torch.randn(-(-frames // fold), width)
        self.places = nn.Parameter(places_SW) if learned else None
        self.token = nn.Parameter(torch.zeros(width)) if pooling == "token" else None
        self.blocks = nn.ModuleList(
            _Block(width, heads, rotary=not learned, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = GenreHead(
            width, dim, prior, skip=skip, dropout=dropout, input_dropout=input_dropout
        )

    def forward(self, features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return logits ``[B, G]``, independent of masked rows at any position.

        Args:
            features_BTD: float ``[B, T, D]``, rows as stored.
            mask_BT: bool ``[B, T]``, True for a real row.
        """
        rows = self.rows(features_BTD)
        steps_BSF, real_BS = self.steps(rows, mask_BT)  # F = fold * W
        steps_BSW = self.inlet(steps_BSF)
        if self.places is not None:
            index_S = torch.arange(steps_BSW.shape[1], device=steps_BSW.device)
            # Clamped: a window longer than those of training reuses the last position.
            steps_BSW = steps_BSW + self.places[index_S.clamp_max(len(self.places) - 1)]
        if self.token is not None:
            token_B1W = self.token.expand(len(steps_BSW), 1, -1)
            steps_BSW = torch.cat([token_B1W, steps_BSW], dim=1)
            real_BS = nn.functional.pad(real_BS, (1, 0), value=True)  # the token is attended to
        for block in self.blocks:
            steps_BSW = block(steps_BSW, real_BS)
        steps_BSW = self.norm(steps_BSW)
        pooled_BW = masked_mean(steps_BSW, real_BS) if self.token is None else steps_BSW[:, 0]
        logits_BG: Tensor = self.head(pooled_BW, rows.mean(mask_BT))
        return logits_BG

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Apply weight decay to the weights of linear layers only.

        Biases, norms, learned positions and the class token are not decayed.
        """
        matrices = [layer.weight for layer in self.modules() if isinstance(layer, nn.Linear)]
        decayed = {id(value) for value in matrices}
        others = [value for value in self.parameters() if id(value) not in decayed]
        return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]


def _check_options(width: int, heads: int, positions: str, pooling: str) -> None:
    if width % (2 * heads):
        raise ValueError(f"width: got {width}, want a multiple of {2 * heads}, twice the heads")
    for name, got, choices in (
        ("positions", positions, ("rotary", "learned")),
        ("pooling", pooling, ("mean", "token")),
    ):
        if got not in choices:
            raise ValueError(f"{name}: got {got!r}, want {choices[0]!r} or {choices[1]!r}")


class _Block(nn.Module):
    """Attention over the real steps, then a feed-forward layer, each with a residual connection."""

    def __init__(self, width: int, heads: int, *, rotary: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.combine = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, steps_BSW: Tensor, real_BS: Tensor) -> Tensor:
        """Map steps, float ``[B, S, W]``, to the same shape; ``real_BS`` is bool ``[B, S]``."""
        steps_BSW = steps_BSW + self.dropout(self._attention(steps_BSW, real_BS))
        fed_BSW: Tensor = self.dropout(self.feed(self.feed_norm(steps_BSW)))
        return steps_BSW + fed_BSW

    def _attention(self, steps_BSW: Tensor, real_BS: Tensor) -> Tensor:
        three_BSW3 = self.attend(self.attention_norm(steps_BSW)).chunk(3, dim=-1)
        # [B, S, W] -> [B, A, S, E]
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in three_BSW3
        )
        if self.rotary:
            query, key = rotate(query), rotate(key)  # values carry no position
        # torch's kernel computes the [S, S] scores in blocks and never stores them all.
        mixed_BASE = scaled_dot_product_attention(
            query, key, value, attn_mask=real_BS[:, None, None, :]
        )
        combined_BSW: Tensor = self.combine(mixed_BASE.transpose(1, 2).flatten(2))
        return combined_BSW


def rotate(values_BASE: Tensor) -> Tensor:
    """Rotate pairs of values by angles proportional to the step.

    Products of rotated queries and keys then depend on their distance only.

    Args:
        values_BASE: float ``[B, A, S, E]``, queries or keys; E is even.

    Returns:
        The same shape and dtype; computed in float32, since bfloat16 cannot resolve large angles.

    Source: Su et al. 2021, "RoFormer", arXiv 2104.09864, section 3.4.2, with its base 10,000.
    """
    steps, size = values_BASE.shape[-2:]
    half = size // 2
    index_S = torch.arange(steps, device=values_BASE.device)
    frequency_E = 10_000.0 ** (-torch.arange(half, device=values_BASE.device) / half)
    angle_SE = index_S.unsqueeze(1) * frequency_E
    cos_SE, sin_SE = angle_SE.cos(), angle_SE.sin()
    left, right = values_BASE.float().chunk(2, dim=-1)
    rotated = torch.cat([left * cos_SE - right * sin_SE, right * cos_SE + left * sin_SE], dim=-1)
    return rotated.to(values_BASE.dtype)
