"""What is active on this machine and why the rest is not, and a numeric self-test. `mfd-fast doctor` prints both."""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfd_fast import native
from mfd_fast.closed_forms import Gaussian
from mfd_fast.fields import sequential_mlp
from mfd_fast.mean_velocity import mean_velocity
from mfd_fast.models.attention import why_unavailable
from mfd_fast.ops import launchers, mlp_rollout
from mfd_fast.ops.step_control import advance_reference
from mfd_fast.rollout.execute import RUNNERS
from mfd_fast.rollout.runners import PREPARE, WHY_NOT
from mfd_fast.step_control import AdaptiveSteps


class Check(NamedTuple):
    """One line of the report."""

    name: str
    active: bool
    detail: str
    """What is there, or why it is off and what to do."""
    failed: bool = False
    """Whether something is wrong here, rather than merely absent."""


class Package(NamedTuple):
    """An optional package: what it is imported as and which extra of this package installs it."""

    distribution: str
    module: str
    extra: str


OPTIONAL_PACKAGES = (
    Package("deepspeed", "deepspeed", "zero"),
    Package("diffusers", "diffusers", "sana"),
    Package("torchdiffeq", "torchdiffeq", "peers"),
    Package("torchode", "torchode", "peers"),
    Package("tensorboard", "tensorboard", "tensorboard"),
    Package("matplotlib", "matplotlib", "report"),
    Package("scikit-learn", "sklearn", "data"),
)


def examine() -> list[Check]:
    """What this machine and installation offer. Imports no optional package and allocates nothing on a device."""
    python = Check("Python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    return [
        python,
        Check("torch", True, f"{torch.__version__}, {_cuda_build()}"),
        *_devices(),
        _core(),
        _threads(),
        _triton(),
        _cuda_graphs(),
        _compile(),
        _runners(),
        _attention("flash-attn", "flash_attn"),
        _attention("xformers", "xformers"),
        *(_package(package) for package in OPTIONAL_PACKAGES),
    ]


def self_test(device: torch.device | str = "cpu") -> list[Check]:
    """Integrals with known results, computed on ``device``; a check has failed if its error is above the bound."""
    device = torch.device(device)
    return [_run_self_test(name, test, device) for name, test in SELF_TESTS.items()]


def format_checks(checks: Sequence[Check]) -> str:
    """An aligned table: name, ok / off / FAILED, detail."""
    if not checks:
        return ""
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{check.name:<{width}}  {_mark(check):<6}  {check.detail}".rstrip() for check in checks)


def as_json(checks: Sequence[Check]) -> str:
    """The checks as a JSON list of objects."""
    return json.dumps([check._asdict() for check in checks], indent=2)


def _mark(check: Check) -> str:
    return "FAILED" if check.failed else "ok" if check.active else "off"


def _cuda_build() -> str:
    version = getattr(torch.version, "hip", None)
    if version is not None:
        return f"ROCm {version} build"
    return "CPU build" if torch.version.cuda is None else f"CUDA {torch.version.cuda} build"


def _devices() -> Iterator[Check]:
    if not torch.cuda.is_available():
        why = "torch is a CPU build; install one for CUDA"
        if torch.version.cuda is not None:
            why = "torch sees no CUDA device; is the driver installed and CUDA_VISIBLE_DEVICES right?"
        yield Check("CUDA device", False, why)
        return
    for index in range(torch.cuda.device_count()):  # pragma: no cover (gpu)
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.1f} GiB"
        detail = f"{found.name}, compute capability {found.major}.{found.minor}, {memory}"
        yield Check(f"CUDA device {index}", True, detail)


def _core() -> Check:
    with warnings.catch_warnings():
        # The reason goes into the table; the warning of the first use would repeat it.
        warnings.simplefilter("ignore", RuntimeWarning)
        core = native.core()
    if core is None:
        why = native.why_no_core() or ""
        remedy = "" if "MFD_FAST_CORE" in why else "; reinstall with a C++17 compiler to get it"
        return Check("C++ core", False, f"{why}; the Python definitions run instead{remedy}")
    threads = "with" if core.HAS_OPENMP else "without"
    return Check("C++ core", True, f"mfd_fast._core, {threads} OpenMP, vectors of {max(core.MLP_LANES)} floats")


def _threads() -> Check:
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"
    if torch.backends.openmp.is_available():
        return Check("OpenMP threads", True, f"torch uses {threads}; OMP_NUM_THREADS or run.threads changes it")
    return Check("OpenMP threads", False, f"torch was built without OpenMP; it uses {threads}")


def _triton() -> Check:
    version = _version("triton", "triton")
    if version is None:
        return Check("Triton", False, "not installed; pip install 'mfd_fast[kernels]' (Linux with a GPU)")
    why = launchers.why_off(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if why is not None:
        return Check("Triton", False, f"{version} is installed, but {why}; PyTorch runs instead")
    return Check("Triton", True, version)  # pragma: no cover (gpu)


def _cuda_graphs() -> Check:
    if not torch.cuda.is_available():
        return Check("CUDA graphs", False, "there is no CUDA device")
    return _runner("CUDA graphs", "captured", "runner='captured' uses them")  # pragma: no cover (gpu)


def _compile() -> Check:
    chosen = os.environ.get("CXX")
    candidates = [chosen] if chosen else ["g++", "clang++", "c++"]
    compiler = next((path for path in map(shutil.which, candidates) if path), None)
    if compiler is None:
        why = f"no C++ compiler on PATH (looked for {', '.join(candidates)}); install one, such as g++"
        return Check("torch.compile", False, why)
    return _runner("torch.compile", "compiled", f"runner='compiled' uses it with {compiler}")


def _runner(name: str, runner: str, detail: str) -> Check:
    """Something the machine offers is active only if this version has a runner for it."""
    if runner in RUNNERS:
        return Check(name, True, detail)
    return Check(name, False, f"possible here, but this version has no runner for it (runners: {', '.join(RUNNERS)})")


def _runners() -> Check:
    """Who may execute rollouts on the device that is there, and why others may not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiler = _compile()
    why_not = {name: why(device) for name, why in WHY_NOT.items()}
    why_not["compiled"] = None if compiler.active else compiler.detail
    possible = ", ".join(name for name in PREPARE if why_not.get(name) is None)
    reasons = "".join(f"; not {name}: {why_not[name]}" for name in PREPARE if why_not.get(name) is not None)
    return Check("runners", True, f"on {device.type}: {possible}{reasons}")


def _attention(backend: str, module: str) -> Check:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why = why_unavailable(backend, device, torch.bfloat16)
    return Check(backend, why is None, why or f"{_version(backend, module)}, in bfloat16 and float16")


def _package(package: Package) -> Check:
    version = _version(package.distribution, package.module)
    if version is None:
        return Check(package.distribution, False, f"not installed; pip install 'mfd_fast[{package.extra}]'")
    return Check(package.distribution, True, version)


def _version(distribution: str, module: str) -> str | None:
    """The version of an installed package without importing it; None if its module is not there."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


_LAW = Gaussian(1.3, 0.6)
_STEP = 0.05


def _run_self_test(name: str, test: "SelfTest", device: torch.device) -> Check:
    try:
        error = test.measure(device)
    except Exception as problem:
        # Whatever goes wrong here is a finding, and the other tests still run.
        return Check(name, False, f"{type(problem).__name__}: {problem}", failed=True)
    if error is None:
        return Check(name, False, test.absent)
    passed = error <= test.bound
    return Check(name, passed, f"error {error:.1e} (at most {test.bound:.0e})", failed=not passed)


def _intervals(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """64 states x ``[64, 8]``, each with an interval of its own from t to r, ``[64]``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    first, second = torch.rand(2, 64, generator=generator, dtype=torch.float64)
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    return x.to(device, dtype), t.to(device, dtype), r.to(device, dtype)


def _relative_rms(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt())


def _euler_product(device: torch.device, dtype: torch.dtype, **options: Any) -> float:
    """Ten Euler steps against the product that they are in closed form: rounding alone, no truncation."""
    x, t, r = _intervals(device, dtype)
    expected = _LAW.euler_mean_velocity(x.double(), t.double(), r.double(), steps=10)
    return _relative_rms(mean_velocity(_LAW, x, t, r, steps=10, **options), expected)


class _Decay(nn.Module):
    """The field ``-rate * x``; CUDA graphs are made of modules alone."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(0.5, 2.0, 8))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.rate * x


def _captured(device: torch.device) -> float | None:
    """Recorded steps against those of the definition."""
    if WHY_NOT["captured"](device) is not None:
        return None
    field, (x, t, r) = _Decay().to(device), _intervals(device, torch.float32)
    found, expected = (mean_velocity(field, x, t, r, solver="ab2", runner=name) for name in ("captured", "eager"))
    return _relative_rms(found, expected)


def _fixed_steps(device: torch.device, solver: str) -> float:
    """Steps of at most 0.05 against the mean velocity of the exact flow."""
    x, t, r = _intervals(device, torch.float32)
    expected = _LAW.mean_velocity(x.double(), t.double(), r.double())
    return _relative_rms(mean_velocity(_LAW, x, t, r, solver=solver, step_size=_STEP), expected)


def _adaptive(device: torch.device, tolerance: float) -> float:
    """bosh3 with steps of its own in every row against the mean velocity of the exact flow."""
    x, t, r = _intervals(device, torch.float64)
    actual = mean_velocity(_LAW, x, t, r, solver="bosh3", rtol=tolerance, atol=tolerance)
    return _relative_rms(actual, _LAW.mean_velocity(x, t, r))


def _core_controller(device: torch.device) -> float | None:
    return _controller(torch.device("cpu"), 8) if _core().active else None


def _triton_controller(device: torch.device) -> float | None:
    if launchers.load("step_control", device) is None:
        return None
    # Short rows take one launch, long ones two.
    return max(_controller(device, width) for width in (8, 5000))


def _controller(device: torch.device, width: int) -> float:
    """Largest difference of the step control from its definition over ten steps; infinite if a decision differs."""
    _, t, r = _intervals(device, torch.float64)
    control = AdaptiveSteps(max_step=0.2)
    state = control.start(t, r)
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for _ in range(10):
        x, candidate, error = torch.randn(3, 64, width, generator=generator, dtype=torch.float64).to(device)
        error = 0.02 * error
        expected = advance_reference(control, state, r, x, candidate, error, 3)
        state = control.advance(state, r, x, candidate, error, 3)
        if not (torch.equal(state.status, expected.status) and torch.equal(state.accepted, expected.accepted)):
            return math.inf
        pairs = zip(state[:3], expected[:3], strict=True)
        worst = max(worst, *(float((actual - exact).abs().max()) for actual, exact in pairs))
    return worst


def _fused_rollout(device: torch.device) -> float | None:
    """A linear field as a network of two layers against the product that Euler steps are in closed form."""
    if mlp_rollout.why_unavailable(device) is not None:
        return None
    x, t, r = _intervals(device, torch.float32)
    first, last = torch.nn.Linear(9, 16), torch.nn.Linear(16, 8)
    with torch.no_grad():
        for tensor in (first.weight, first.bias, last.weight, last.bias):
            tensor.zero_()
        first.weight[:8, :8] = 2 * torch.eye(8)
        last.weight[:, :8] = 0.25 * torch.eye(8)
    network = torch.nn.Sequential(first, torch.nn.Identity(), last)
    actual = mean_velocity(sequential_mlp(network.to(device)), x, t, r, steps=10, runner="fused")
    width = (r - t).double()[:, None]
    expected = x.double() * ((1 + 0.05 * width) ** 10 - 1) / width
    return _relative_rms(actual, expected)


class SelfTest(NamedTuple):
    """An error that can be measured on a device (None: not measurable here) and the bound that it must keep."""

    measure: Callable[[torch.device], float | None]
    bound: float
    absent: str = ""
    """Why it is not measurable."""


SELF_TESTS: dict[str, SelfTest] = {
    "euler, 10 steps, float64": SelfTest(lambda device: _euler_product(device, torch.float64), 1e-12),
    "euler, 10 steps, float32": SelfTest(lambda device: _euler_product(device, torch.float32), 1e-6),
    "euler, 5 rows at once": SelfTest(lambda device: _euler_product(device, torch.float64, max_rows=5), 1e-12),
    "ab2, CUDA graphs": SelfTest(_captured, 1e-5, "no CUDA graphs on this device"),
    "euler, step size 0.05": SelfTest(lambda device: _fixed_steps(device, "euler"), 1e-1),
    "heun, step size 0.05": SelfTest(lambda device: _fixed_steps(device, "heun"), 2e-3),
    "ab2, step size 0.05": SelfTest(lambda device: _fixed_steps(device, "ab2"), 4e-3),
    "midpoint, step size 0.05": SelfTest(lambda device: _fixed_steps(device, "midpoint"), 1e-4),
    "rk4, step size 0.05": SelfTest(lambda device: _fixed_steps(device, "rk4"), 2e-6),
    "bosh3, tolerance 1e-6": SelfTest(lambda device: _adaptive(device, 1e-6), 1e-5),
    "euler, 10 steps, fused": SelfTest(_fused_rollout, 1e-5, "no fused rollouts on this device"),
    "step control, C++": SelfTest(_core_controller, 1e-12, "the C++ core is off"),
    "step control, Triton": SelfTest(_triton_controller, 1e-12, "no Triton kernels on this device"),
}
"""Bounds are a few times the errors measured on a CPU."""
