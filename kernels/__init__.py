"""Triton kernels, installed as ``mfd_fast.kernels``. This file imports nothing, so that finding them is free."""
