"""The one exception that is meant for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: one clear line that says what is wrong and what to do.

    Command lines print it as ``error: ...`` and exit with status 2; every other exception is a defect.
    """
