"""The base of every configuration section."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST = 2**31 - 1
"""Largest count: arrays of counts stay 32-bit, and a mistyped one is refused."""

PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
Few = Annotated[int, Field(gt=0, le=65_536)]
"""Threads, processes, or what each movie or step is divided into: each one costs time or memory."""


class Section(BaseModel):
    """One section of the YAML file."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        populate_by_name=True,
        allow_inf_nan=False,
    )
