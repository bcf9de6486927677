"""What the built-in models promise of masks, padding and the published network."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from training.models.lstm import MaskedLSTM, OriginalLSTM
from training.models.mean import MeanLinear
from training.models.rows import Moments, PreparedRows, RowStatistics

M = TypeVar("M", bound=nn.Module)
DIM, GENRES, FRAMES = 6, 3, 8


def statistics() -> RowStatistics:
    return RowStatistics(
        Moments(torch.linspace(-1, 1, DIM), 2.0), Moments(torch.linspace(0, 0.1, DIM), 0.3)
    )


def masked(**options: object) -> MaskedLSTM:
    torch.manual_seed(0)
    model = MaskedLSTM(
        dim=DIM,
        genres=GENRES,
        prior=torch.tensor([0.1, 0.5, 0.9]),
        rows=statistics(),
        hidden=5,
        **options,  # type: ignore[arg-type]
    )
    return awake(model)


def mean(**options: object) -> MeanLinear:
    torch.manual_seed(0)
    return awake(
        MeanLinear(
            dim=DIM,
            genres=GENRES,
            prior=torch.tensor([0.1, 0.5, 0.9]),
            rows=statistics(),
            **options,  # type: ignore[arg-type]
        )
    )


def awake(model: M) -> M:
    """Head and skip start at zero; give them weights, or nothing would be seen."""
    for name, parameter in model.named_parameters():
        if name.startswith(("head", "skip")):
            nn.init.normal_(parameter)
    return model.eval()


def batch(*lengths: int, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), frames, DIM) * mask.unsqueeze(-1), mask


MASKED = [masked(), masked(unit_rows=False), masked(skip=False), mean(), mean(unit_rows=False)]


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
    model, lengths = masked(skip=False), torch.tensor([3, 8, 1])
    features, mask = batch(*lengths.tolist())
    reference = nn.LSTM(DIM, 5, batch_first=True, bidirectional=True)
    reference.load_state_dict(
        {
            **model.ahead.state_dict(),
            **{f"{k}_reverse": v for k, v in model.back.state_dict().items()},
        }
    )
    packed = nn.utils.rnn.pack_padded_sequence(
        model.rows(features), lengths, batch_first=True, enforce_sorted=False
    )
    states, _ = nn.utils.rnn.pad_packed_sequence(reference(packed)[0], batch_first=True)
    pooled = [
        torch.cat([row[:n].mean(0), row[:n].amax(0)])
        for row, n in zip(states, lengths, strict=True)
    ]
    torch.testing.assert_close(model(features, mask), model.head(torch.stack(pooled)))


def test_the_order_of_frames_reaches_the_lstm_and_not_the_mean() -> None:
    features, mask = batch(8)
    turned = features.flip(1)
    assert not torch.allclose(masked()(features, mask), masked()(turned, mask), atol=1e-3)
    torch.testing.assert_close(mean()(features, mask), mean()(turned, mask))


@pytest.mark.parametrize("cls", [MaskedLSTM, MeanLinear])
def test_training_begins_at_the_class_prior(cls: type[nn.Module]) -> None:
    prior = torch.tensor([0.1, 0.5, 0.9])
    model = cls(dim=DIM, genres=GENRES, prior=prior, rows=statistics()).eval()
    torch.testing.assert_close(model(*batch(3, 8)).sigmoid(), prior.expand(2, -1))


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


def test_unit_rows_forget_how_long_a_row_is() -> None:
    prepare = PreparedRows(statistics(), unit_rows=True)
    features, _ = batch(8)
    torch.testing.assert_close(prepare(features * 7), prepare(features))


def test_statistics_travel_in_the_state_dict() -> None:
    state = mean().state_dict()
    torch.testing.assert_close(state["rows.mean"], torch.linspace(0, 0.1, DIM))
    assert state["rows.scale"].item() == pytest.approx(0.3)
