"""Errors and remarks of the editing calls: for the person at the keyboard, and of Python's usual kinds."""

from __future__ import annotations

import logging
from functools import cache

from pbe.errors import UserError

logger = logging.getLogger(__name__)


class EditValueError(UserError, ValueError):
    """An argument, picture or file of the right kind with a value that cannot be used."""


class EditTypeError(UserError, TypeError):
    """An argument of the wrong kind."""


class EditAttributeError(UserError, AttributeError):
    """An attribute that a pipeline does not have, or that cannot be assigned."""


@cache
def say_once(text: str) -> None:
    """Log a warning, the first time only: what was decided about an input, for instance."""
    logger.warning(text)
