"""Whether tensors hold the same bits, many of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch

from weightwire.updates.digest import bytes_at, differ

__all__ = ["alike"]


def alike(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether each of `ones` is equal to its counterpart bit for bit: as many, of the same dtypes and numbers of
    elements, all on one device, and on a GPU of one dtype. By one call: for hundreds of small tensors, a call for each
    takes longer than their bytes.

    >>> zeros = torch.zeros(3)
    >>> alike([zeros, zeros], [zeros.clone(), zeros.clone()]), alike([zeros], [-zeros])
    (True, False)
    """
    for one, other in zip(ones, others, strict=True):
        if (one.dtype, one.numel()) != (other.dtype, other.numel()):
            raise ValueError(f"{tuple(one.shape)} {one.dtype} beside {tuple(other.shape)} {other.dtype}")
    if ones and ones[0].is_cuda:
        if len({each.dtype for each in ones}) > 1:
            raise ValueError("tensors of several dtypes on a GPU, where they are laid end to end")
        one, other = (torch.cat([each.reshape(-1) for each in side]).view(torch.uint8) for side in (ones, others))
        return torch.equal(one, other)
    # Held until they are compared: some may be copies.
    flat = [[each if each.is_contiguous() else each.detach().contiguous() for each in side] for side in (ones, others)]
    lines = [(one.data_ptr(), other.data_ptr(), one.nbytes) for one, other in zip(*flat, strict=True)]
    return not lines or not _differ(np.array(lines, np.int64))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _differ(lines: Any) -> Any:
    for i in range(lines.shape[0]):
        size = lines[i, 2]
        if differ(numba.carray(bytes_at(lines[i, 0]), size), numba.carray(bytes_at(lines[i, 1]), size)):
            return True
    return False
