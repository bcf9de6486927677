"""The transformer equals its reference and depends on positions as documented."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.training.models.small import batch, small
from training.models.transformer import Transformer, rotate


def test_the_transformer_with_learned_positions_equals_the_encoder_of_torch() -> None:
    model = small(Transformer, positions="learned", fold=1, layers=2, skip=False)
    features, mask = batch(3, 8, 1)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0, activation="gelu", batch_first=True, norm_first=True
    )
    reference = nn.TransformerEncoder(layer, 2, norm=model.norm, enable_nested_tensor=False).eval()
    names = {
        "self_attn.in_proj_weight": "attend.weight",
        "self_attn.in_proj_bias": "attend.bias",
        "self_attn.out_proj.weight": "combine.weight",
        "linear2.bias": "feed.3.bias",
        "self_attn.out_proj.bias": "combine.bias",
        "linear2.weight": "feed.3.weight",
        "linear1.weight": "feed.0.weight",
        "linear1.bias": "feed.0.bias",
        "norm1.weight": "attention_norm.weight",
        "norm1.bias": "attention_norm.bias",
        "norm2.weight": "feed_norm.weight",
        "norm2.bias": "feed_norm.bias",
    }
    for theirs, ours in zip(reference.layers, model.blocks, strict=True):
        state = ours.state_dict()
        theirs.load_state_dict({name: state[own] for name, own in names.items()})
    steps, real = model.steps(model.rows(features), mask)
    states = reference(model.inlet(steps) + model.places, src_key_padding_mask=~real)
    pooled = torch.stack([row[:n].mean(0) for row, n in zip(states, (3, 8, 1), strict=True)])
    torch.testing.assert_close(model(features, mask), model.head.linear(pooled))


def test_products_of_rotated_queries_and_keys_depend_on_their_distance_only() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4)
    queries, keys = (rotate(each.expand(1, 1, 9, 4))[0, 0] for each in (query, key))
    products = queries @ keys.T
    for distance in range(-5, 6):
        same = products.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same))
    torch.testing.assert_close(products[0, 0], query @ key)
    assert not torch.allclose(products[0, 0], products[0, 3])


def test_steps_after_the_last_learned_position_reuse_it() -> None:
    model = small(Transformer, positions="learned", fold=1)
    features, mask = batch(20, frames=20)
    assert model(features, mask).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 12, "heads": 4}, "width: got 12, want a multiple of 8"),
        ({"positions": "sine"}, "positions: got 'sine', want 'rotary' or 'learned'"),
        ({"pooling": "max"}, "pooling: got 'max', want 'mean' or 'token'"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(Transformer, **options)


def test_only_the_weights_of_linear_layers_are_decayed() -> None:
    model = small(Transformer, positions="learned", pooling="token")
    decayed, others = model.parameter_groups()
    assert all(value.ndim == 2 for value in decayed["params"])
    assert not any(value is model.places for value in decayed["params"])
    assert others["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
