"""Types of arguments that several commands take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from pbe.files import expand_home
from pbe.resources import find_model

SETTINGS = Parameter(name="*")  # decorates a settings dataclass: its fields are options


def _path(_type: Any, tokens: Sequence[Any]) -> Path:
    return Path(expand_home(tokens[0].value))


def _text(_type: Any, tokens: Sequence[Any]) -> str:
    return expand_home(tokens[0].value)


def _model(_type: Any, tokens: Sequence[Any]) -> str:
    return find_model(expand_home(tokens[0].value))


# In all three, a leading ~ is the home folder: shells leave it alone in --out=~/x.
File = Annotated[Path, Parameter(converter=_path)]
Place = Annotated[str, Parameter(converter=_text, metavar="PATH")]
"""A path, or a name that is none (of open_clip's weights, of a repository)."""
Model = Annotated[str, Parameter(converter=_model, metavar="MODEL")]
"""A model in any layout, or ``toy``: the one that ships."""

Switch = Annotated[bool, Parameter(negative=None, negative_bool="no-")]
"""On unless ``--no-...`` is given; plain ``bool`` has no such form."""
MANY = Parameter(consume_multiple=True)
"""Several values may follow the option."""
Dtype = Literal["fp32", "bf16", "fp16"]  # pbe.checkpoints.precision.DTYPES
