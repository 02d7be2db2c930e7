"""What the programs two_ranks.py and zero_ranks.py share: processes of one training, and what may go wrong in one."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from mfd_fast.methods.mfd import MeanFlowDistillation
from mfd_fast.training.distill import DistillTraining

Spoil = Callable[[int], None]


def nothing(rank: int) -> None:
    pass


def nan_in_one_rank(rank: int) -> None:
    """The auxiliary's loss of update 4 is NaN where its row 13 is, in process 1."""
    draw, loss = DistillTraining._draw, MeanFlowDistillation.auxiliary_loss

    def noted(self: Any, update: int, share: Any) -> Any:
        draws, condition = draw(self, update, share)
        draws.hit = update == 4 and share.first <= 13 < share.first + share.rows
        return draws, condition

    def spoilt(self: Any, actors: Any, batch: Any, *rest: Any) -> Any:
        result = loss(self, actors, batch, *rest)
        return result._replace(value=result.value * float("nan")) if batch.draws.hit else result

    DistillTraining._draw = noted  # type: ignore[method-assign]
    MeanFlowDistillation.auxiliary_loss = spoilt  # type: ignore[method-assign]


def in_update(number: int, act: Callable[[], object]) -> Spoil:
    """Process 1 does this at the beginning of an update."""

    def spoil(rank: int) -> None:
        original = DistillTraining.run_update

        def run_update(self: Any, update: int) -> Any:
            if update == number and rank == 1:
                act()
            return original(self, update)

        DistillTraining.run_update = run_update  # type: ignore[method-assign]

    return spoil


def fork(processes: int, stem: str, work: Callable[[int], int]) -> list[int]:
    """Exit codes of the processes of one training; what each says goes to ``STEM-RANK.txt``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ |= {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            handle = os.open(f"{stem}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            code = 99
            try:
                code = work(rank)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
