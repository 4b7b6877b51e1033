"""Errors of the editing calls: for the person at the keyboard, and of the kind that Python callers expect."""

from __future__ import annotations

from pbe.errors import UserError


class EditValueError(UserError, ValueError):
    """An argument, picture or file of the right kind with a value that cannot be used."""


class EditTypeError(UserError, TypeError):
    """An argument of the wrong kind."""


class EditAttributeError(UserError, AttributeError):
    """An attribute that a pipeline does not have, or that cannot be assigned."""
