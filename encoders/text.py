"""Text towers: the text side of the OpenCLIP model whose image tower encoded a feature set."""

# T = texts, D = feature size

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from configs.errors import ConfigError, DataError
from encoders.weights import weights_digest

if TYPE_CHECKING:
    from configs.schema import EncoderConfig

logger = logging.getLogger(__name__)

_BATCH = 64
"""Texts per forward pass."""


class TextTower:
    """Text tower of an OpenCLIP model, in fp32 on the CPU."""

    @classmethod
    def of(cls, config: EncoderConfig, provenance: Mapping[str, Any], where: str) -> Self:
        """Load the text tower that belongs to a feature set.

        Args:
            config: Model and weights; must be those that encoded the set.
            provenance: That of the set's manifest.
            where: Location of the set, for messages.

        Raises:
            ConfigError: the configured model is another one, or has no usable text tower.
            DataError: the set was not encoded by a trained OpenCLIP model, or the weights are
                missing, corrupt, or other ones.
        """
        recorded = _trained_openclip(provenance, where)
        logger.info("importing OpenCLIP")  # takes seconds
        from encoders.clip import load_model, make_tokenizer, read_model

        # First what can be checked without loading weights.
        if (
            config.pretrained is None
            or ":" in config.model
            or read_model(config.model).digest != recorded["architecture"]
        ):
            raise ConfigError(_other_encoder(config, recorded, where))
        tokenize = make_tokenizer(read_model(config.model))
        logger.info("loading the text tower of %s", config.model)
        model = load_model(config).model
        got = weights_digest(model.visual.state_dict())
        if got != recorded["weights"]:
            raise DataError(
                f"encoder.pretrained: {config.pretrained}: got weights {got[:12]}, want "
                f"{str(recorded['weights'])[:12]} ({recorded['pretrained']!r}), which encoded "
                f"{where}"
            )
        return cls(model, tokenize)

    def __init__(self, model: Any, tokenize: Callable[[list[str]], Tensor]) -> None:
        self._model, self._tokenize = model.eval(), tokenize

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one L2-normalised vector per text, float32 ``[T, D]``.

        Texts are cut at the tower's context length, 77 tokens in most models.
        """
        with torch.inference_mode():
            features_TD = torch.cat(
                [
                    self._model.encode_text(self._tokenize(list(texts[first : first + _BATCH])))
                    for first in range(0, len(texts), _BATCH)
                ]
            )
            return np.asarray(normalize(features_TD.float(), dim=-1))


def _trained_openclip(provenance: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the recorded encoder of a feature set, checked to be a trained OpenCLIP model."""
    recorded: Mapping[str, Any] | None = provenance.get("encoder")
    want = "want features of an OpenCLIP model"
    if recorded is None:
        raise DataError(f"{where}: imported features, whose text tower is unknown; {want}")
    if "options" in recorded:
        name = recorded["name"]
        raise DataError(
            f"{where}: encoded by {name}, a custom encoder without a text tower; {want}"
        )
    if recorded.get("pretrained") is None:
        raise DataError(
            f"{where}: encoded with UNTRAINED weights, to which no text tower belongs; {want} and "
            "encoder.pretrained"
        )
    return recorded


def _other_encoder(config: EncoderConfig, recorded: Mapping[str, Any], where: str) -> str:
    return (
        f"encoder.model: got {config.model} with encoder.pretrained {config.pretrained}, want the "
        f"encoder of {where}: {recorded['name']} with {recorded['pretrained']!r}"
    )
