"""Build steps that pyproject.toml cannot express: the C++ core by CMake, and kernels/ installed as mfd_fast.kernels."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Let CMakeLists.txt compile the extension straight into its package."""

    def build_extension(self, ext: Extension) -> None:
        package_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve() / ext.name
        # A cache left by an isolated build names a pybind11 folder that no longer exists.
        shutil.rmtree(build_dir, ignore_errors=True)
        # The cmake of this interpreter's environment first: it is not on PATH unless the environment is activated.
        beside_python = Path(sys.executable).parent / "cmake"
        cmake = str(beside_python) if beside_python.exists() else "cmake"
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build_dir)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package_dir}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build_dir), "--parallel"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if self.editable_mode:
                # What an earlier build left beside the sources is not what they say now.
                (ROOT / "mfd_fast" / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
            # The extension is optional: setuptools reports this and goes on; the Python definitions then run instead.
            raise CompileError(
                f"the C++ core was not built ({error}); it needs a C++17 compiler and Python.h"
            ) from error


kernel_packages = [f"mfd_fast.{name}" for name in find_packages(str(ROOT), include=["kernels", "kernels.*"])]
setup(
    packages=find_packages(str(ROOT), include=["mfd_fast", "mfd_fast.*"]) + kernel_packages,
    package_dir={"mfd_fast.kernels": "kernels"},
    package_data={"": ["py.typed", "*.pyi", "*.html", "*.css", "*.js"]},
    ext_modules=[Extension("mfd_fast._core", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
