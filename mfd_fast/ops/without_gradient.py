"""When an operation may run as compiled code that has no derivative."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

DEVICES = ["cuda"]
"""Types of device for which there is such code."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compiled_code_may_run(*tensors: Tensor) -> bool:
    """Whether the tensors are on such a device, of such a type, and no derivative is asked for, of any kind."""
    first = tensors[0]
    if first.device.type not in DEVICES or any(part.dtype not in DTYPES for part in tensors):
        return False
    if torch.is_grad_enabled() and any(part.requires_grad for part in tensors):
        return False
    if torch.compiler.is_compiling():
        return True
    wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(part) for part in tensors)
    return not wrapped and all(forward_ad.unpack_dual(part).tangent is None for part in tensors)
