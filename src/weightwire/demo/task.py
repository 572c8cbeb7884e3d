"""The task: count. After a digit the policy is to write the next one, and so on; after 9 comes 0.

Small enough for a random model to learn in a minute, and no constant answer scores: each digit wants another one next.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["DIGITS", "LENGTH", "PROMPTS", "rewards"]

DIGITS = "0123456789"
PROMPTS = tuple(DIGITS)
LENGTH = 12
"""Tokens in each rollout."""


def rewards(prompt: str, continuation: Sequence[str]) -> list[float]:
    """For each token of the continuation: 1.0 if it is the digit that follows the token before it, else 0.0.

    >>> rewards("8", ["9", "0", "5", "6"])
    [1.0, 1.0, 0.0, 1.0]
    """
    before = [prompt[-1], *continuation[:-1]]
    return [1.0 if this == _SUCCESSORS.get(last) else 0.0 for last, this in zip(before, continuation, strict=True)]


_SUCCESSORS = dict(zip(DIGITS, DIGITS[1:] + DIGITS[0], strict=True))
