"""Counter-based randomness: every draw is a pure function of a key, never of what was drawn before.

A key is a tuple of integers and strings, such as ``(seed, "sample", epoch, image)``. It is hashed to the
128-bit key of a Philox generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so
the order of calls, the number of workers and a restart change nothing.
"""

from __future__ import annotations

import hashlib
from numbers import Integral

import numpy as np

KeyPart = int | str


def _encode(part: KeyPart) -> bytes:
    # Type letter and length come first, so that no two different keys share an encoding.
    if isinstance(part, str):
        text = part.encode()
        return b"s%d:%s" % (len(text), text)
    if isinstance(part, Integral) and not isinstance(part, bool):
        digits = b"%d" % int(part)
        return b"i%d:%s" % (len(digits), digits)
    raise TypeError(f"a key part is an integer or a string, not {type(part).__name__}: {part!r}")


def generator(*key: KeyPart) -> np.random.Generator:
    """Return the random generator that belongs to ``key``.

    Args:
        key: integers of any size (numpy's too) and strings; at least one. ``1`` and ``"1"`` differ.

    Raises:
        TypeError: for any other type; floats and booleans among them, since they hide mistakes.
        ValueError: for an empty key.
    """
    if not key:
        raise ValueError("a generator needs at least one key part")
    digest = hashlib.blake2b(b"".join(_encode(part) for part in key), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def permutation(n: int, *key: KeyPart) -> np.ndarray:
    """Return the permutation of ``0 .. n-1`` that belongs to ``key``, int64 of shape ``(n,)``."""
    return generator(*key).permutation(n).astype(np.int64, copy=False)


ROUNDS = 8


def _round(value: int, number: int, key: bytes, mask: int) -> int:
    data = value.to_bytes(8, "little") + bytes([number])
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little") & mask


def shuffled(position: int, n: int, *key: KeyPart) -> int:
    """Return what stands at a position of a permutation of ``0 .. n-1``, which is never made as a whole.

    A Feistel network over the next even number of bits, walked until it falls below ``n`` (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains"): O(1) in memory, fewer than four walks on average. Its
    permutations are others than those of :func:`permutation`.

    Args:
        position: 0 to ``n - 1``.
        n: 1 to 2**63.
        key: as of :func:`generator`.

    Raises:
        ValueError: for a position that is out of range.
    """
    if not 0 <= position < n:
        raise ValueError(f"position {position} is not within 0 .. {n - 1}")
    half = max((n - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    secret = hashlib.blake2b(b"".join(_encode(part) for part in key), digest_size=16).digest()
    while True:
        left, right = position >> half, position & mask
        for number in range(ROUNDS):
            left, right = right, left ^ _round(right, number, secret, mask)
        position = left << half | right
        if position < n:
            return position
