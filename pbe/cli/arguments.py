"""Types of arguments that several commands take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from inspect import get_annotations
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, dataclass_transform, get_type_hints

from cyclopts import Group, Parameter

from pbe.editing.settings import Dtype as Dtype
from pbe.errors import UserError
from pbe.files import expand_home
from pbe.resources import find_model

if TYPE_CHECKING:
    from cyclopts import App, ArgumentCollection

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def options(cls: type[T]) -> type[T]:
    """Decorate a class of settings: it becomes a frozen dataclass whose fields are a command's options.

    A field whose metadata name a ``group`` begins a group of the help, which goes on to the next such field.
    A class's own groups stand before inherited ones. A switch that is on gets a ``--no-...`` form.
    """
    cls = dataclass(frozen=True, kw_only=True)(cls)
    known = {each.name: each for each in fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls, include_extras=True)
    marked: dict[str, Any] = {}
    for base in cls.__mro__:
        group: dict[str, Any] = {}
        for name in get_annotations(base):
            if title := known[name].metadata.get("group"):
                group = {"group": Group.create_ordered(title)}
            negative = "no-" if known[name].default is True else ()
            mark = Parameter(negative_bool=negative, **group)
            marked.setdefault(name, Annotated[hints[name], mark])
    cls.__annotations__ = marked
    return Parameter(name="*")(cls)


def _text(_type: Any, tokens: Sequence[Any]) -> str:
    return expand_home(tokens[0].value)


def _model(_type: Any, tokens: Sequence[Any]) -> str:
    return find_model(expand_home(tokens[0].value))


Place = Annotated[str, Parameter(converter=_text, metavar="PATH")]
"""A path, or a name that is none (of open_clip's weights, of a repository)."""
Model = Annotated[str, Parameter(converter=_model, metavar="MODEL")]
"""A model in any layout, or ``toy``: the one that ships."""
Repeatable = Annotated[list[str], Parameter(consume_multiple=False)]
"""One value each time. Several values may follow the option of any other list, and the last time counts."""
Several = Annotated[list[str], Parameter(consume_multiple=1)]
"""Several values each time, and all times count."""


def limits(low: float, high: float = math.inf) -> Parameter:
    """Return the mark of an option whose number lies in [low, high]."""
    wanted = f"be at least {low:g}" if high == math.inf else f"lie between {low:g} and {high:g}"

    def check(_type: Any, value: float | None) -> None:
        if value is not None and not low <= value <= high:
            raise ValueError(f"It must {wanted}.")

    return Parameter(validator=check)


Natural = Annotated[int, limits(0)]
Count = Annotated[int, limits(1)]
ANY_NUMBER = (0, None)  # what cyclopts makes of consume_multiple=True, the command's default


def tidy(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Put the home folder in place of a leading ``~`` of paths, and let the last of repeated options count.

    Shells leave ``~`` alone in ``--out=~/x``; cyclopts itself would join the values of a repeated list.
    """
    for argument in arguments:
        if "Path" in str(argument.hint):
            argument.tokens[:] = [each.evolve(value=expand_home(each.value)) for each in argument.tokens]
        starts = [place for place, each in enumerate(argument.tokens) if each.keyword and each.index == 0]
        if starts and argument.parameter.consume_multiple == ANY_NUMBER:
            del argument.tokens[: starts[-1]]


def refuse_fractions(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse whole numbers with a point, which would be rounded in silence."""
    for argument in arguments:
        for each in argument.tokens:
            if argument.hint in (int, int | None) and "." in each.value:
                raise UserError(f"{argument.name} is {each.value}; it must be a whole number")


def parse_part(text: str, option: str) -> tuple[int, int]:
    """Read ``I/N``, part I of N counted from 0, that an option holds."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise UserError(f"{option} is '{text}'; it must be I/N with I from 0 to N - 1, such as 0/8")
    return int(part), int(parts)
