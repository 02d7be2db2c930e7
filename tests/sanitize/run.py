"""Build the C++ core with sanitizers and run the tests of every function in it: python tests/sanitize/run.py

What CMakeLists.txt compiles is what is checked. A read or write out of bounds, or undefined behaviour, ends the run
with the sanitizer's report; a function of the core that no test called fails it. Needs g++ with libasan.
"""

import argparse
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
TESTS = (
    "tests/test_step_control_core.py",
    "tests/test_native.py",
    "tests/rollout/test_schedule.py",
    "tests/ops/test_mlp_rollout.py",
)
"""The tests of the core; those of Triton's kernels among them are left out."""


def library(name: str) -> str:
    """The full path of a library of the compiler."""
    asked = ["g++", f"-print-file-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def build() -> Path:
    """The core with sanitizers."""
    cmake = Path(sys.executable).parent / "cmake"
    tool = str(cmake) if cmake.exists() else "cmake"
    configure = [tool, "-S", str(ROOT), "-B", str(BUILD), "-DMFD_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BUILD / 'core'}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([tool, "--build", str(BUILD), "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    return BUILD / "core" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"


class Counted:
    """A module whose functions count how often they are called."""

    def __init__(self, module: ModuleType) -> None:
        self.calls = Counter({name: 0 for name, value in vars(module).items() if callable(value)})
        for name in self.calls:
            setattr(module, name, self._counting(name, getattr(module, name)))

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls[name] += 1
            return function(*arguments, **options)

        return call


def run_tests(core: Path, tests: list[str]) -> int:
    """Run pytest in this process with the given core in place of the installed one."""
    import pytest

    import mfd_fast

    loader = importlib.machinery.ExtensionFileLoader("mfd_fast._core", str(core))
    spec = importlib.util.spec_from_file_location("mfd_fast._core", core, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["mfd_fast._core"] = mfd_fast._core = module  # type: ignore[attr-defined]
    counted = Counted(module)
    options = ["-q", "-s", "-p", "no:cacheprovider", "-W", "default", "--rootdir", str(ROOT), "--durations", "5"]
    code = int(pytest.main([*options, "-k", "not kernel", *tests]))
    print("calls under the sanitizers: " + ", ".join(f"{name} {count}" for name, count in counted.calls.items()))
    forgotten = [name for name, count in counted.calls.items() if not count]
    if forgotten and tests == list(TESTS):
        print(f"no test calls {', '.join(forgotten)}: add one to TESTS in {__file__}", file=sys.stderr)
        return 1
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="FILE", help="these tests in place of all")
    parser.add_argument("--core", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tests = options.only or list(TESTS)
    if options.core is not None:
        return run_tests(options.core, tests)
    core = build()
    print(f"tests of the core: {', '.join(Path(name).name for name in tests)}", flush=True)
    environment = os.environ | {
        "LD_PRELOAD": f"{library('libasan.so')}:{library('libstdc++.so')}",
        # Python itself leaks by design, and torch allocates more than the sanitizer thinks sane.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "2",
    }
    again = [sys.executable, __file__, "--core", str(core), "--only", *tests]
    return subprocess.run(again, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
