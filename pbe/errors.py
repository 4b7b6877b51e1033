"""Errors and remarks that are meant for the person at the keyboard."""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger(__name__)


class UserError(Exception):
    """Something the user can put right: one clear line that says what is wrong and what to do.

    Command lines print it as ``error: ...`` and exit with status 2; every other exception is a defect.
    """


class EditValueError(UserError, ValueError):
    """An argument, image or file of the right kind with a value that cannot be used."""


class EditTypeError(UserError, TypeError):
    """An argument of the wrong kind."""


class EditAttributeError(UserError, AttributeError):
    """An attribute that a pipeline does not have, or that cannot be assigned."""


def first_line(error: object) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@cache
def warn_once(text: str) -> None:
    """Log a warning, the first time only: what was decided about an input, for instance."""
    logger.warning(text)
