import importlib.metadata
import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mfd_fast import doctor, native
from mfd_fast.doctor import Check, as_json, examine, format_checks, self_test
from mfd_fast.mean_velocity import mean_velocity
from mfd_fast.ops import launchers
from mfd_fast.ops.step_control import ControlState, advance_reference
from mfd_fast.rollout import captured, graphs
from mfd_fast.rollout.execute import RUNNERS
from mfd_fast.rollout.runners import PREPARE


@pytest.fixture
def fresh_core() -> Iterator[None]:
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def found(name: str) -> Check:
    (check,) = [check for check in examine() if check.name == name]
    return check


def test_examine_covers_every_part() -> None:
    checks = {check.name: check for check in examine()}
    assert set(checks) >= {"Python", "torch", "C++ core", "OpenMP threads", "Triton", "CUDA graphs", "torch.compile"}
    assert set(checks) >= {"flash-attn", "xformers", "deepspeed", "diffusers", "torchdiffeq", "torchode"}
    assert set(checks) >= {"tensorboard", "matplotlib", "scikit-learn"}
    assert len(checks) == len(examine())
    assert [check.name for check in checks.values() if not check.detail or check.failed] == []
    assert checks["torch"].detail.startswith(torch.__version__)


def test_examine_imports_no_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["deepspeed", "diffusers", "matplotlib", "sklearn", "tensorboard", "torchdiffeq", "torchode", "xformers"]
    for name in names:
        for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
    examine()
    assert [name for name in names if name in sys.modules] == []


def test_package_versions_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("matplotlib") == Check("matplotlib", True, importlib.metadata.version("matplotlib"))
    absent = doctor.Package("no-such-package", "no_such_package", "zero")
    monkeypatch.setattr(doctor, "OPTIONAL_PACKAGES", (absent,))
    expected = "not installed; pip install 'mfd_fast[zero]'"
    assert found("no-such-package") == Check("no-such-package", False, expected)


def test_module_without_metadata_counts_as_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bare_module.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._package(doctor.Package("bare-module", "bare_module", "zero")).detail == "unknown version"


@pytest.mark.usefixtures("fresh_core")
def test_core_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFD_FAST_CORE", "0")
    check = found("C++ core")
    assert not check.active
    assert "MFD_FAST_CORE=0" in check.detail
    assert "reinstall" not in check.detail


@pytest.mark.usefixtures("fresh_core")
def test_core_that_was_not_built_is_off_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mfd_fast._core", None)
    monkeypatch.delattr("mfd_fast._core", raising=False)
    monkeypatch.delenv("MFD_FAST_CORE", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check = found("C++ core")
    assert not check.active
    assert check.detail.endswith("; the Python definitions run instead; reinstall with a C++17 compiler to get it")
    assert caught == []
    controller = {result.name: result for result in self_test()}["step control, C++"]
    assert (controller.active, controller.failed, controller.detail) == (False, False, "the C++ core is off")


def test_compiler_on_path_decides_about_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "RUNNERS", ("auto", "eager", "compiled"))
    monkeypatch.setenv("CXX", sys.executable)
    assert found("torch.compile") == Check("torch.compile", True, f"runner='compiled' uses it with {sys.executable}")
    monkeypatch.setattr(doctor, "RUNNERS", ("auto", "eager"))
    assert found("torch.compile").detail.endswith("no runner for it (runners: auto, eager)")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    expected = "no C++ compiler on PATH (looked for g++, clang++, c++); install one, such as g++"
    assert found("torch.compile") == Check("torch.compile", False, expected)


def test_runners_of_this_machine_with_reasons_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = "on cpu: eager, compiled, fused; not captured: CUDA graphs need a CUDA device, this one is cpu"
    assert found("runners") == Check("runners", True, expected)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert found("runners").detail.startswith("on cpu: eager, fused; not compiled: no C++ compiler on PATH")
    assert set(PREPARE) | {"auto"} == set(RUNNERS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_without_a_gpu_each_reason_says_so() -> None:
    for name in ("Triton", "CUDA graphs"):
        assert not found(name).active
    assert "CUDA" in found("CUDA device").detail
    assert found("CUDA graphs").detail == "there is no CUDA device"


def test_cuda_build_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert found("torch").detail.endswith("CUDA 12.8 build")
    assert "CUDA_VISIBLE_DEVICES" in found("CUDA device").detail
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in found("CUDA device").detail


def test_triton_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda distribution, module: None)
    assert found("Triton").detail.startswith("not installed; pip install 'mfd_fast[kernels]'")


def test_triton_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda distribution, module: "3.9.0")
    monkeypatch.setenv("MFD_FAST_TRITON", "0")
    expected = (
        "3.9.0 is installed, but it is switched off by the environment variable MFD_FAST_TRITON=0; PyTorch runs instead"
    )
    assert found("Triton") == Check("Triton", False, expected)


def test_self_test_passes() -> None:
    results = self_test("cpu")
    assert [result.name for result in results] == list(doctor.SELF_TESTS)
    assert [result for result in results if result.failed] == []
    assert [result.name for result in results if not result.active] in (
        ["ab2, CUDA graphs", "step control, Triton"],
        ["ab2, CUDA graphs", "step control, C++", "step control, Triton"],
    )


ON_A_DEVICE = ("step control", "ab2, CUDA graphs")


class Repeating:
    """What a device would record is run again."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def begin(self) -> None:
        pass


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_self_test_of_recordings(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(*arguments: Any, runner: str = "eager", **options: Any) -> Any:
        u = mean_velocity(*arguments, runner=runner, **options)
        return factor * u if runner == "captured" else u

    monkeypatch.setitem(graphs.RECORDERS, "cpu", Repeating)
    monkeypatch.setattr(doctor, "mean_velocity", scaled)
    result = {result.name: result for result in self_test()}["ab2, CUDA graphs"]
    assert (result.active, result.failed) == (factor == 1.0, factor != 1.0)
    captured.forget_all()


@pytest.mark.parametrize("name", [name for name in doctor.SELF_TESTS if not name.startswith(ON_A_DEVICE)])
def test_self_test_notices_wrong_velocities(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = mean_velocity
    bound = doctor.SELF_TESTS[name].bound
    monkeypatch.setattr(doctor, "mean_velocity", lambda *args, **options: right(*args, **options) * (1 + 3 * bound))
    result = {result.name: result for result in self_test()}[name]
    assert result.failed
    assert not result.active
    assert "(at most" in result.detail


@pytest.mark.skipif(native.core() is None, reason="the C++ core is not built")
def test_self_test_notices_a_wrong_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    right = advance_reference
    cpu = torch.device("cpu")

    def other_steps(*args: object) -> ControlState:
        expected = right(*args)  # type: ignore[arg-type]
        return expected._replace(step=expected.step + 1e-6)

    monkeypatch.setattr(doctor, "advance_reference", other_steps)
    assert doctor._core_controller(cpu) == pytest.approx(1e-6, rel=1e-3)
    monkeypatch.setattr(
        doctor, "advance_reference", lambda *args: right(*args)._replace(accepted=torch.ones(64, dtype=torch.bool))
    )
    assert doctor._core_controller(cpu) == math.inf


def test_self_test_of_triton_runs_where_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert doctor._triton_controller(cpu) is None
    monkeypatch.setattr(launchers, "load", lambda name, device: sys)
    assert doctor._triton_controller(cpu) == pytest.approx(0.0, abs=1e-12)
    right = advance_reference
    monkeypatch.setattr(
        doctor, "advance_reference", lambda *args: right(*args)._replace(status=torch.zeros(64, dtype=torch.int64))
    )
    assert doctor._triton_controller(cpu) == math.inf


def test_self_test_reports_an_exception_as_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(doctor, "mean_velocity", broken)
    first = self_test()[0]
    assert first == Check("euler, 10 steps, float64", False, "RuntimeError: no kernel image", failed=True)


def test_format_is_aligned_and_json_is_complete() -> None:
    checks = [Check("a", True, "1.0"), Check("longer", False, "why"), Check("b", False, "error", failed=True)]
    assert format_checks(checks) == "a       ok      1.0\nlonger  off     why\nb       FAILED  error"
    assert format_checks([]) == ""
    assert json.loads(as_json(checks))[1] == {"name": "longer", "active": False, "detail": "why", "failed": False}
