"""Memory on the host that updates stage in, kept from one to the next.

What is staged becomes live by changing places with what was live, and the next update is staged in that. So an engine
has one staged copy more than its weights, from the first update on. Handed to malloc in between, it grew to nearly two:
aligned memory of one size finds no room where memory of that size was.
"""

from __future__ import annotations

from collections import defaultdict

import torch

__all__ = ["Spare", "is_alone", "uses"]


class Spare:
    """Tensors that nobody uses, by shape and dtype. Any thread may call.

    >>> spare = Spare()
    >>> like = torch.empty(4, 8, device="meta")
    >>> staged = spare.take(like)
    >>> address = staged.data_ptr()
    >>> spare.keep(staged)
    >>> del staged
    >>> spare.nbytes, spare.take(like).data_ptr() == address, spare.nbytes
    (128, True, 0)
    """

    def __init__(self) -> None:
        self._free: defaultdict[object, list[torch.Tensor]] = defaultdict(list)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(tensor.nbytes for tensors in list(self._free.values()) for tensor in list(tensors))

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor on the host with the shape and dtype of `like`, whatever it holds."""
        try:
            return self._free[like.shape, like.dtype].pop()
        except IndexError:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu")

    def keep(self, tensor: torch.Tensor) -> None:
        """Take it back, unless another tensor shares its memory. The caller must not use it any more."""
        if is_alone(tensor) and tensor.is_contiguous():
            self._free[tensor.shape, tensor.dtype].append(tensor)


def is_alone(tensor: torch.Tensor) -> bool:
    """Whether no other tensor shares its memory."""
    return uses(tensor) == 2  # itself, and the storage that is asked about


def uses(tensor: torch.Tensor) -> int | None:
    """How many refer to its memory; None if this torch does not say."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return None if count is None else int(count(tensor.untyped_storage()._cdata))
