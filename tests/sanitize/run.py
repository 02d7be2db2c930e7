"""Build the C++ core with sanitizers and run every test that uses it: python tests/sanitize/run.py [--only FILE ...].

What CMakeLists.txt compiles is what is checked. The tests are those of every module that calls the core. A
read or write out of bounds, or undefined behaviour, ends the run with the sanitizer's report. Needs g++ with libasan.
"""

import argparse
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"


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


def tests_of_the_core() -> list[str]:
    """The test files of every module that calls the core, by name; those about Triton's compiler are not about it."""
    package = (ROOT / "mfd_fast").rglob("*.py")
    callers = {path.stem for path in package if "native.core(" in path.read_text("utf-8")} - {"native", "doctor"}
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [path for path in files if any(path.stem.startswith(f"test_{name}") for name in callers)]
    return [str(path) for path in found if "triton" not in path.read_text("utf-8")]


def run_tests(core: Path, files: list[str]) -> int:
    """Run pytest in this process with the given core in place of the installed one."""
    import pytest

    import mfd_fast

    loader = importlib.machinery.ExtensionFileLoader("mfd_fast._core", str(core))
    spec = importlib.util.spec_from_file_location("mfd_fast._core", core, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["mfd_fast._core"] = mfd_fast._core = module  # type: ignore[attr-defined]
    return int(pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-W", "default", "--rootdir", str(ROOT), *files]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="FILE", help="these tests in place of all")
    parser.add_argument("--core", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    files = options.only or tests_of_the_core()
    if options.core is not None:
        return run_tests(options.core, files)
    core = build()
    print(f"tests of the core: {', '.join(Path(name).name for name in files)}", flush=True)
    environment = os.environ | {
        "LD_PRELOAD": f"{library('libasan.so')}:{library('libstdc++.so')}",
        # Python itself leaks by design, and torch allocates more than the sanitizer thinks sane.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "2",
    }
    again = [sys.executable, __file__, "--core", str(core), "--only", *files]
    return subprocess.run(again, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
