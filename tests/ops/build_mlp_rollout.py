"""Compile what `launch_mlp_rollouts` would launch: python build_mlp_rollout.py OUT, see offline.py."""

import sys

import torch
from offline import write_builds

from mfd_fast.kernels import mlp_rollout


def launch() -> None:
    mlp_rollout.launch_mlp_rollouts(torch.zeros(64, dtype=torch.int64), 2, 3, 4096)


if __name__ == "__main__":
    write_builds(sys.argv[1], [mlp_rollout], {"rollout": launch}, ("rollout", 32))
