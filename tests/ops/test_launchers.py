import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from mfd_fast.ops import launchers

CUDA = torch.device("cuda", 0)


@pytest.fixture
def suitable_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if there were an NVIDIA GPU, on which nothing has been loaded yet."""
    launchers.load.cache_clear()
    monkeypatch.delenv("MFD_FAST_TRITON", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in ("driver", "step_control"):
        stub = ModuleType(name)
        stub.check_driver = lambda: None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"mfd_fast.kernels.{name}", stub)
    yield monkeypatch
    launchers.load.cache_clear()


def test_kernels_are_loaded_for_a_suitable_gpu(suitable_gpu: pytest.MonkeyPatch) -> None:
    assert launchers.why_off(CUDA) is None
    assert launchers.load("step_control", CUDA) is sys.modules["mfd_fast.kernels.step_control"]


def test_off_without_a_warning(suitable_gpu: pytest.MonkeyPatch) -> None:
    assert launchers.load("step_control", torch.device("cpu")) is None
    assert launchers.why_off(torch.device("cpu")) == "there is no CUDA device"
    suitable_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert launchers.why_off(CUDA) == "the device has compute capability 7.5, the kernels need 8.0"
    assert launchers.load("step_control", CUDA) is None
    launchers.load.cache_clear()
    suitable_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    suitable_gpu.setenv("MFD_FAST_TRITON", "0")
    assert "MFD_FAST_TRITON=0" in str(launchers.why_off(CUDA))
    assert launchers.load("step_control", CUDA) is None


def test_other_vendors_devices_are_left_to_torch(suitable_gpu: pytest.MonkeyPatch) -> None:
    """A ROCm build calls its devices cuda, too."""
    suitable_gpu.setattr(torch.version, "cuda", None)
    assert launchers.load("step_control", CUDA) is None


@pytest.mark.parametrize("problem", ["triton-missing", "driver-broken"])
def test_what_should_work_but_does_not_warns_once(suitable_gpu: pytest.MonkeyPatch, problem: str) -> None:
    if problem == "triton-missing":
        suitable_gpu.setitem(sys.modules, "mfd_fast.kernels.step_control", None)
    else:

        def broken() -> None:
            raise RuntimeError("Failed to find C compiler")

        suitable_gpu.setattr(sys.modules["mfd_fast.kernels.driver"], "check_driver", broken)
    with pytest.warns(
        RuntimeWarning, match=r"the Triton kernels are not available \(.+\); the definitions run in torch"
    ):
        assert launchers.load("step_control", CUDA) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launchers.load("step_control", CUDA) is None
