"""Where the kernels run: on a GPU if there is one, else in Triton's interpreter, on tensors of the CPU."""

import torch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
