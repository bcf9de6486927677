"""The attention model computes the published equation."""

from __future__ import annotations

import torch
from torch import nn

from tests.training.models.small import batch, normalized, small
from training.models.attention import GatedAttention


def test_gated_attention_computes_the_published_equation() -> None:
    model = small(GatedAttention, skip=False)
    features, mask = batch(8)
    hidden = nn.functional.gelu(model.project(normalized(features)[0]))
    score = model.score(model.value[0](hidden).tanh() * model.gate[0](hidden).sigmoid())
    pooled = (score.exp() / score.exp().sum() * hidden).sum(0, keepdim=True)
    torch.testing.assert_close(model(features, mask), model.head.linear(pooled))
