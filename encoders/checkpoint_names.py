"""Names of tensors in the checkpoints of other trainers, converted to those of OpenCLIP."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from configs.tensor_files import matching_tensors

_TRANSFORMERS = "vision_model.embeddings.class_embedding"
"""A tensor that only ``CLIPModel`` of the library transformers has."""

_RENAMED = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # as spelled there
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)

_PROJECTIONS = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}
"""Linear layers there, plain matrices in OpenCLIP: transposed."""


def openclip_names(
    tensors: Mapping[str, Tensor], names: Collection[str], where: object
) -> dict[str, Tensor]:
    """Return the tensors of a CLIP model under OpenCLIP's names.

    Args:
        tensors: Of a file, with the prefixes and wrappers of its trainer.
        names: Names in the OpenCLIP model.
        where: File, for error messages.

    Raises:
        DataError: the file contains several models.
    """
    if any(name.endswith(_TRANSFORMERS) for name in tensors):
        return _from_transformers(matching_tensors(tensors, [_TRANSFORMERS], where))
    return matching_tensors(tensors, names, where)


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in _PROJECTIONS:
            renamed[_PROJECTIONS[name]] = value.t()
        elif ".self_attn.q_proj." in name:
            # OpenCLIP multiplies by query, key and value at once.
            parts = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            merged = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
            renamed[_rename(merged)] = torch.cat(parts)
        elif not re.search(r"\.(k_proj|v_proj)\.|position_ids$", name):
            renamed[_rename(name)] = value
    return renamed


def _rename(name: str) -> str:
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name
