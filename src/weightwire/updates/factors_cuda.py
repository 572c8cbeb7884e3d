"""What the digest multiplies words by, in Triton, and how kernels add up what comes of it."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["factors", "key_of", "of_threads"]


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def key_of(word):  # type: ignore[no-untyped-def]
    """What the high half of a word's index, int64, brings to its factors."""
    return _mix((word >> 32).to(tl.uint32) ^ tl.full((), 0x9E3779B9, tl.uint32))


@triton.jit
def factors(place, key):  # type: ignore[no-untyped-def]
    """The two factors of words with the low half of their index in `place`."""
    mixed = _mix(place ^ key)
    again = mixed * tl.full((), 0x31848BAB, tl.uint32)
    return (mixed | 1).to(tl.uint64), ((again ^ (again >> 14)) | 1).to(tl.uint64)


@triton.jit  # type: ignore[untyped-decorator]
def of_threads(x, REPEATS: tl.constexpr, THREADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sums of what each thread has of words, of which it loads four at a time: nothing goes from one to another."""
    return tl.sum(tl.sum(tl.reshape(x, (REPEATS, THREADS, 4)), 2), 0)
