"""What the built-in models promise of masks, padding, order and the published network."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from training.models.attention import GatedAttention
from training.models.lstm import MaskedLSTM, OriginalLSTM
from training.models.mean import MeanLinear, MeanMLP
from training.models.rows import Moments, PreparedRows, RowStatistics
from training.models.transformer import Transformer, rotate

M = TypeVar("M", bound=nn.Module)
DIM, GENRES, FRAMES = 6, 3, 8
PRIOR = torch.tensor([0.1, 0.5, 0.9])

SMALL: dict[type[nn.Module], dict[str, object]] = {
    MeanLinear: {"genres": GENRES},
    MeanMLP: {"hidden": 5},
    GatedAttention: {"hidden": 5, "attention": 4},
    MaskedLSTM: {"hidden": 5, "width": 4},
    Transformer: {"frames": FRAMES, "width": 8, "heads": 2},
}
"""Every model that knows a mask, and what makes it small."""

BLIND = (MeanLinear, MeanMLP, GatedAttention)
"""Those that do not see the order of rows."""


def statistics() -> RowStatistics:
    return RowStatistics(
        Moments(torch.linspace(-1, 1, DIM), 2.0), Moments(torch.linspace(0, 0.1, DIM), 0.3)
    )


def small(cls: type[M], **options: object) -> M:
    """A small model in evaluation mode, its head awake."""
    torch.manual_seed(0)
    return awake(cls(dim=DIM, prior=PRIOR, rows=statistics(), **{**SMALL[cls], **options}))


def awake(model: M) -> M:
    """Head, skip and token start at zero; give them weights, or nothing would be seen."""
    for name, parameter in model.named_parameters():
        if name.startswith(("head", "token")):
            nn.init.normal_(parameter)
    return model.eval()


def batch(*lengths: int, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), frames, DIM) * mask.unsqueeze(-1), mask


MASKED = [
    *(pytest.param(small(cls), id=cls.__name__) for cls in SMALL),
    *(pytest.param(small(cls, unit_rows=False), id=f"{cls.__name__}-raw") for cls in SMALL),
    pytest.param(small(MeanMLP, skip=False), id="MeanMLP-alone"),
    pytest.param(small(MaskedLSTM, skip=False, fold=1), id="MaskedLSTM-unfolded"),
    pytest.param(small(MaskedLSTM, fold=3), id="MaskedLSTM-threes"),
    pytest.param(small(Transformer, fold=1, layers=2), id="Transformer-unfolded"),
    pytest.param(small(Transformer, positions="learned", fold=3), id="Transformer-learned"),
    pytest.param(small(Transformer, pooling="token"), id="Transformer-token"),
]


@pytest.mark.parametrize("model", MASKED)
def test_what_stands_in_hidden_rows_changes_nothing(model: nn.Module) -> None:
    features, mask = batch(3, 8, 1)
    noisy = features.masked_fill(~mask.unsqueeze(-1), 1e3)
    torch.testing.assert_close(model(noisy, mask), model(features, mask), rtol=0, atol=0)


@pytest.mark.parametrize("model", MASKED)
def test_a_movie_scores_the_same_alone_and_padded_among_longer_ones(model: nn.Module) -> None:
    features, mask = batch(3, 8, 1)
    alone = model(features[:1, :3], mask[:1, :3])
    torch.testing.assert_close(alone, model(features, mask)[:1])


@pytest.mark.parametrize("model", MASKED)
def test_rows_hidden_in_the_middle_count_as_if_they_were_cut_out(model: nn.Module) -> None:
    features, mask = batch(6)
    mask[0, [0, 2, 3]] = False
    cut = features[:, [1, 4, 5]]
    torch.testing.assert_close(
        model(features, mask), model(cut, torch.ones(1, 3, dtype=torch.bool))
    )


def test_the_masked_lstm_is_torchs_bidirectional_one_on_packed_sequences() -> None:
    model, lengths = small(MaskedLSTM, skip=False, fold=1), torch.tensor([3, 8, 1])
    features, mask = batch(*lengths.tolist())
    reference = nn.LSTM(4, 5, batch_first=True, bidirectional=True)
    reference.load_state_dict(
        {
            **model.ahead.state_dict(),
            **{f"{k}_reverse": v for k, v in model.back.state_dict().items()},
        }
    )
    rows = model.steps.linear(prepared(features))
    packed = nn.utils.rnn.pack_padded_sequence(
        rows, lengths, batch_first=True, enforce_sorted=False
    )
    states, _ = nn.utils.rnn.pad_packed_sequence(reference(packed)[0], batch_first=True)
    pooled = [
        torch.cat([row[:n].mean(0), row[:n].amax(0)])
        for row, n in zip(states, lengths, strict=True)
    ]
    torch.testing.assert_close(model(features, mask), model.head.linear(torch.stack(pooled)))


def test_folded_rows_stand_side_by_side_and_the_last_step_is_filled_with_zeros() -> None:
    model = small(MaskedLSTM, fold=3)
    features, mask = batch(5)
    mask[0, 1] = False  # rows 0, 2, 3, 4 remain
    steps, real = model.steps(model.rows(features), mask)
    rows = model.steps.linear(prepared(features))[0]
    nothing = torch.zeros(4)
    want = [torch.cat([rows[0], rows[2], rows[3]]), torch.cat([rows[4], nothing, nothing])]
    assert real.tolist() == [[True, True, False]]
    torch.testing.assert_close(steps[0], torch.stack([*want, torch.zeros(12)]))


def test_gated_attention_is_the_published_equation() -> None:
    model = small(GatedAttention, skip=False)
    features, mask = batch(8)
    hidden = nn.functional.gelu(model.project(prepared(features)[0]))
    score = model.score(model.tell[0](hidden).tanh() * model.gate[0](hidden).sigmoid())
    pooled = (score.exp() / score.exp().sum() * hidden).sum(0, keepdim=True)
    torch.testing.assert_close(model(features, mask), model.head.linear(pooled))


def test_the_transformer_is_torchs_encoder_where_its_positions_are_learned() -> None:
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


def test_turned_queries_and_keys_see_how_far_apart_they_are_and_not_where() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4)
    turned_queries, turned_keys = (rotate(each.expand(1, 1, 9, 4))[0, 0] for each in (query, key))
    products = turned_queries @ turned_keys.T
    for distance in range(-5, 6):
        same = products.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same))
    torch.testing.assert_close(products[0, 0], query @ key)
    assert not torch.allclose(products[0, 0], products[0, 3])


def test_learned_positions_end_at_the_window_and_later_steps_share_the_last() -> None:
    model = small(Transformer, positions="learned", fold=1)
    features, mask = batch(20, frames=20)
    assert model(features, mask).isfinite().all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"width": 12, "heads": 4}, "width: got 12, want a multiple of 8"),
        ({"positions": "sine"}, "positions: got 'sine', want 'rotary' or 'learned'"),
        ({"pooling": "max"}, "pooling: got 'max', want 'mean' or 'token'"),
    ],
)
def test_a_transformer_that_cannot_be_is_told(options: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        small(Transformer, **options)


@pytest.mark.parametrize("cls", SMALL)
def test_the_order_of_frames_reaches_sequence_models_and_no_others(cls: type[nn.Module]) -> None:
    features, mask = batch(8)
    model = small(cls)
    same = torch.allclose(model(features, mask), model(features.flip(1), mask), atol=1e-4)
    assert same == (cls in BLIND)


@pytest.mark.parametrize("cls", SMALL)
def test_training_begins_at_the_class_prior(cls: type[nn.Module]) -> None:
    model = cls(dim=DIM, prior=PRIOR, rows=statistics(), **SMALL[cls]).eval()
    torch.testing.assert_close(model(*batch(3, 8)).sigmoid(), PRIOR.expand(2, -1))


@pytest.mark.parametrize("model", MASKED)
def test_every_parameter_gets_a_gradient_and_no_hidden_row_does(model: nn.Module) -> None:
    features, mask = batch(3, 8)
    features.requires_grad_()
    model.zero_grad()
    (model(features, mask) * torch.tensor([1.0, 2.0, -3.0])).sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in model.parameters())
    assert features.grad is not None
    assert not features.grad[0, 3:].any()
    assert features.grad[0, :3].any()


@pytest.mark.parametrize(
    ("cls", "parameters"),
    [
        (MeanLinear, 512 * 21 + 21),
        (MeanMLP, 512 * 128 + 128 + 128 * 21 + 21 + 512 * 21),
        (GatedAttention, 512 * 128 + 128 + 2 * (128 * 64 + 64) + 64 + 128 * 21 + 21 + 512 * 21),
        (MaskedLSTM, 512 * 32 + 32 + 2 * 4 * 64 * (128 + 64 + 2) + 256 * 21 + 21 + 512 * 21),
        (
            Transformer,  # rows, inlet; attention, feed-forward and two norms; norm, head, skip
            (512 * 64 + 64 + 256 * 64 + 64)
            + (64 * 192 + 192 + 64 * 64 + 64 + 64 * 128 + 128 + 128 * 64 + 64 + 4 * 64)
            + (2 * 64 + 64 * 21 + 21 + 512 * 21),
        ),
    ],
)
def test_a_model_has_the_parameters_of_its_layers(cls: type[nn.Module], parameters: int) -> None:
    given = {"genres": 21, "frames": 256}
    extra = {name: given[name] for name in given if name in SMALL[cls]}
    model = cls(dim=512, prior=torch.full((21,), 0.5), rows=RowStatistics.neutral(512), **extra)
    assert sum(value.numel() for value in model.parameters()) == parameters


def test_the_transformer_decays_the_weights_of_its_layers_alone() -> None:
    model = small(Transformer, positions="learned", pooling="token")
    decayed, others = model.parameter_groups()
    assert all(value.ndim == 2 for value in decayed["params"])
    assert not any(value is model.places for value in decayed["params"])
    assert others["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def prepared(features: Tensor) -> Tensor:
    """The definition: rows of length 1, centred, divided by one number."""
    moments = statistics().unit
    return (normalize(features, dim=-1, eps=1e-6) - moments.mean_D) / moments.scale


def test_the_original_equals_a_plain_bidirectional_lstm_read_at_its_last_step() -> None:
    torch.manual_seed(0)
    model = OriginalLSTM(dim=DIM, genres=GENRES, frames=FRAMES, hidden=4).eval()
    features, mask = batch(8, 8, 8)
    plain = nn.LSTM(DIM, 4, batch_first=True, bidirectional=True)
    plain.load_state_dict(
        {
            **model.ahead.state_dict(),
            **{f"{k}_reverse": v for k, v in model.back.state_dict().items()},
        }
    )
    last = plain(model.norm(features))[0][:, -1]
    pooled = last.unflatten(1, (2, 4)).amax(2)
    torch.testing.assert_close(model(features, mask), model.head(pooled))


def test_the_original_has_the_published_size() -> None:
    model = OriginalLSTM(dim=512, genres=21, frames=256)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["norm.weight"] == (256, 512)
    assert shapes["ahead.weight_ih_l0"] == shapes["back.weight_ih_l0"] == (4 * 128, 512)
    assert shapes["head.weight"] == (21, 64)
    assert model.fixed_frames == 256


def test_the_original_reads_a_short_movie_as_zeros_at_the_end() -> None:
    model = OriginalLSTM(dim=DIM, genres=GENRES, frames=FRAMES, hidden=4).eval()
    features, mask = batch(3)
    whole = torch.ones_like(mask)
    torch.testing.assert_close(
        model(features + 5 * ~mask.unsqueeze(-1), mask), model(features, whole)
    )


@pytest.mark.parametrize("unit_rows", [True, False])
def test_mean_and_projection_are_those_of_rows_prepared_one_by_one(unit_rows: bool) -> None:
    rows, linear = PreparedRows(statistics(), unit_rows=unit_rows), nn.Linear(DIM, 4)
    features, mask = batch(3, 8, 1)
    raw = statistics().raw
    want = prepared(features) if unit_rows else (features - raw.mean_D) / raw.scale
    torch.testing.assert_close(rows(features).project(linear), linear(want))
    means = torch.stack([row[:n].mean(0) for row, n in zip(want, (3, 8, 1), strict=True)])
    torch.testing.assert_close(rows(features).mean(mask), means)


def test_unit_rows_forget_how_long_a_row_is() -> None:
    rows = PreparedRows(statistics(), unit_rows=True)
    features, mask = batch(8)
    torch.testing.assert_close(rows(features * 7).mean(mask), rows(features).mean(mask))


def test_a_row_of_zeros_and_a_window_without_rows_are_numbers() -> None:
    rows = PreparedRows(statistics(), unit_rows=True)
    features, mask = batch(8, 0)
    features[0, 2] = 0.0
    assert rows(features).project(nn.Linear(DIM, 4)).isfinite().all()
    assert rows(features).mean(mask)[1].tolist() == [0.0] * DIM


def test_statistics_travel_in_the_state_dict() -> None:
    state = small(MeanLinear).state_dict()
    torch.testing.assert_close(state["rows.mean_row"], torch.linspace(0, 0.1, DIM))
    assert state["rows.scale"].item() == pytest.approx(0.3)
