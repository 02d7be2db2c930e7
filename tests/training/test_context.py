import time

import pytest
import torch

from mfd_fast.config import RunSettings
from mfd_fast.streams import Share
from mfd_fast.training.context import Context, choose_device, gpu_of_process, make_context
from mfd_fast.training.distributed import World, join_world

CPU = torch.device("cpu")
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2)])
def test_shares_of_all_processes_make_up_the_batch(processes: int, accumulation: int) -> None:
    shares = [
        share for rank in range(processes) for share in Context(CPU, World(rank, processes)).shares(16, accumulation)
    ]
    assert len(shares) == processes * accumulation
    assert all(share.total == 16 for share in shares)
    assert [row for share in shares for row in range(share.first, share.first + share.rows)] == list(range(16))


@pytest.mark.parametrize(("batch", "processes", "accumulation"), [(15, 2, 1), (16, 1, 3), (2, 4, 1), (6, 2, 2)])
def test_a_batch_that_cannot_be_split_is_refused(batch: int, processes: int, accumulation: int) -> None:
    words = f"multiple of processes x accumulation = {processes} x {accumulation}, got {batch}"
    with pytest.raises(ValueError, match=words):
        Context(CPU, World(0, processes)).shares(batch, accumulation)


def test_one_process_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_world("cpu") == World(0, 1, 0)
    context = make_context(RunSettings(device="cpu"))
    assert context == Context(CPU, World())
    assert context.world.is_main
    assert context.shares(8, 1) == [Share(8, 0, 8)]


def test_threads_are_set_and_part_of_exactness() -> None:
    context = make_context(RunSettings(device="cpu", threads=1))
    assert torch.get_num_threads() == 1
    assert context.exactness() == {
        **{"device": "cpu", "threads": 1, "processes": 1, "torch": torch.__version__},
        "deterministic": False,
    }


def test_the_time_limit_counts_from_here() -> None:
    before = time.monotonic()
    deadline = make_context(RunSettings(device="cpu", max_seconds=60.0)).deadline
    assert deadline is not None
    assert before + 60 <= deadline <= time.monotonic() + 60


@NO_CUDA
def test_device_that_is_not_there() -> None:
    assert choose_device("auto", "run.device") == CPU
    with pytest.raises(ValueError, match=r"run\.device is 'cuda:1', but torch sees no CUDA device"):
        make_context(RunSettings(device="cuda:1"))


def test_device_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="--device must be auto, cpu, cuda or cuda:N, got 'gpu'"):
        choose_device("gpu", "--device")


@pytest.mark.parametrize("said", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])  # by torchrun, by DeepSpeed's launcher
def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    cuda, second = torch.device("cuda"), torch.device("cuda", 1)
    assert (gpu_of_process(cuda), gpu_of_process(second)) == (torch.device("cuda", 0), second)
    monkeypatch.setenv(said, "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert gpu_of_process(cuda) == second
    with pytest.raises(
        ValueError, match=r"run\.device must be cuda where 3 processes run on one machine, got 'cuda:1'"
    ):
        gpu_of_process(second)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"run\.device of this process is 'cuda:2', but torch sees 2 CUDA device"):
        gpu_of_process(cuda)


def test_a_world_of_one_needs_no_messages() -> None:
    world, values = World(), torch.tensor([1.0, float("nan")])
    assert world.mean(values) is values
    assert world.any(True)
    assert not world.any(False)
    world.broadcast([values])
    world.barrier()
