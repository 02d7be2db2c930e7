"""The Triton kernels in `mfd_fast.kernels`, imported on first use; without them the definitions run in torch."""

import os
import subprocess
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

MINIMUM_CAPABILITY = (8, 0)


def why_off(device: torch.device) -> str | None:
    """Why no kernel is used on ``device``, or None if kernels are used where Triton works. Imports nothing."""
    if os.environ.get("MFD_FAST_TRITON") == "0":
        return "it is switched off by the environment variable MFD_FAST_TRITON=0"
    if device.type != "cuda" or torch.version.cuda is None:
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"the device has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    return None


@cache
def load(name: str, device: torch.device) -> ModuleType | None:
    """The module ``mfd_fast.kernels.<name>`` for tensors on ``device``, or None where it cannot be used.

    A Triton that is missing or does not work on a suitable GPU is worth a RuntimeWarning, once. The environment
    variable ``MFD_FAST_TRITON=0``, read on the first call, turns the kernels off without a warning.
    """
    if why_off(device) is not None:
        return None
    try:
        import_module("mfd_fast.kernels.driver").check_driver()
        return import_module(f"mfd_fast.kernels.{name}")
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"the Triton kernels are not available ({error}); the definitions run in torch instead; "
            "Triton needs a C compiler and Python.h; MFD_FAST_TRITON=0 turns this warning off",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
