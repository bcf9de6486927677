"""The LSTMs equal reference implementations."""

from __future__ import annotations

import torch
from torch import nn

from tests.training.models.small import DIM, FRAMES, GENRES, batch, normalized, small
from training.models.lstm import MaskedLSTM, OriginalLSTM


def test_the_masked_lstm_equals_a_bidirectional_lstm_on_packed_sequences() -> None:
    model, lengths = small(MaskedLSTM, skip=False, fold=1), torch.tensor([3, 8, 1])
    features, mask = batch(*lengths.tolist())
    reference = nn.LSTM(4, 5, batch_first=True, bidirectional=True)
    reference.load_state_dict(
        {
            **model.ahead.state_dict(),
            **{f"{k}_reverse": v for k, v in model.back.state_dict().items()},
        }
    )
    rows = model.steps.linear(normalized(features))
    packed = nn.utils.rnn.pack_padded_sequence(
        rows, lengths, batch_first=True, enforce_sorted=False
    )
    states, _ = nn.utils.rnn.pad_packed_sequence(reference(packed)[0], batch_first=True)
    pooled = [
        torch.cat([row[:n].mean(0), row[:n].amax(0)])
        for row, n in zip(states, lengths, strict=True)
    ]
    torch.testing.assert_close(model(features, mask), model.head.linear(torch.stack(pooled)))


def test_folded_rows_are_concatenated_and_the_last_step_is_padded_with_zeros() -> None:
    model = small(MaskedLSTM, fold=3)
    features, mask = batch(5)
    mask[0, 1] = False  # rows 0, 2, 3, 4 remain
    steps, real = model.steps(model.rows(features), mask)
    rows = model.steps.linear(normalized(features))[0]
    zeros = torch.zeros(4)
    want = [torch.cat([rows[0], rows[2], rows[3]]), torch.cat([rows[4], zeros, zeros])]
    assert real.tolist() == [[True, True, False]]
    torch.testing.assert_close(steps[0], torch.stack([*want, torch.zeros(12)]))


def test_the_published_lstm_equals_the_last_step_of_a_bidirectional_lstm() -> None:
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


def test_the_published_lstm_has_the_published_size() -> None:
    model = OriginalLSTM(dim=512, genres=21, frames=256)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["norm.weight"] == (256, 512)
    assert shapes["ahead.weight_ih_l0"] == shapes["back.weight_ih_l0"] == (4 * 128, 512)
    assert shapes["head.weight"] == (21, 64)
    assert model.fixed_frames == 256


def test_the_published_lstm_pads_a_short_movie_with_zeros() -> None:
    model = OriginalLSTM(dim=DIM, genres=GENRES, frames=FRAMES, hidden=4).eval()
    features, mask = batch(3)
    full = torch.ones_like(mask)
    torch.testing.assert_close(
        model(features + 5 * ~mask.unsqueeze(-1), mask), model(features, full)
    )
