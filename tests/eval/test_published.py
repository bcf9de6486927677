from __future__ import annotations

from configs.schema import GENRES
from eval.published import read_published
from eval.report import PublishedRow


def test_the_published_figures_name_the_original_genres_in_the_original_order() -> None:
    assert list(read_published()) == list(GENRES)


def test_the_published_figures_of_western_are_in_per_cent() -> None:
    assert read_published()["Western"] == PublishedRow(
        resnet_precision=88.89,
        resnet_recall=51.93,
        resnet_ap=73.99,
        lstm_precision=66.67,
        lstm_recall=8.33,
        lstm_ap=22.02,
    )


def test_an_unpublished_figure_is_none() -> None:
    assert read_published()["Animation"].lstm_ap is None
