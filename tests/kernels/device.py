"""Where the kernels run: on a GPU if there is one, else in Triton's interpreter, on tensors of the CPU."""

import contextlib

import pytest
import torch

from weightwire.engines.vllm import batched_copy
from weightwire.updates import digest_cuda, tiles

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def few_rows():
    """Tiles of two rows in the interpreter, which takes some 5 ms for each row of a tile, also if it is not there."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            for module in (tiles, digest_cuda, batched_copy):
                patch.setattr(module, "ROWS", 2)
        yield
