import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import mfd_fast

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCES = (".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__", "shared")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    # Copies of the package in temporary folders are not what the coverage of this run is about.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    finished = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


class Built(NamedTuple):
    """A clean copy of the sources, the sdist made of it, the wheel made of the sdist, and the names inside them."""

    sources: Path
    sdist: Path
    wheel: Path

    def sdist_names(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def wheel_names(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def read(self, name: str) -> str:
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.read(f"mfd_fast-{mfd_fast.__version__}.dist-info/{name}").decode()

    def package_files(self) -> set[str]:
        """Every module and data file of the sources, by its path when installed."""
        kernels = (f"mfd_fast/{path}" for path in files_under(self.sources, "kernels"))
        return files_under(self.sources, "mfd_fast") | set(kernels)


def files_under(root: Path, folder: str) -> set[str]:
    return {path.relative_to(root).as_posix() for path in (root / folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("packaging")
    sources, dist = folder / "sources", folder / "dist"
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    run("-m", "build", "--no-isolation", "--outdir", dist, sources, cwd=folder)
    return Built(sources, next(dist.glob("*.tar.gz")), next(dist.glob("*.whl")))


def test_sdist_can_be_built_from(built: Built) -> None:
    core = files_under(built.sources, "csrc")
    assert core >= {"csrc/bindings.cpp", "csrc/step_controller.cpp", "csrc/step_controller.hpp"}
    needed = core | files_under(built.sources, "mfd_fast") | files_under(built.sources, "kernels")
    needed |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"}
    assert needed - built.sdist_names() == set()


def test_wheel_is_complete(built: Built) -> None:
    names = built.wheel_names()
    assert {"mfd_fast/py.typed", "mfd_fast/_core.pyi", "mfd_fast/kernels/__init__.py"} <= names
    assert built.package_files() - names == set()
    assert [name for name in names if re.fullmatch(r"mfd_fast/_core\..*(so|pyd)", name)]
    assert {name.partition("/")[0] for name in names} == {"mfd_fast", f"mfd_fast-{mfd_fast.__version__}.dist-info"}


def test_installed_wheel_works_elsewhere(built: Built, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(site)
    program = (
        "import mfd_fast, mfd_fast.kernels, mfd_fast.native\n"
        "print(mfd_fast.native.core().__file__, mfd_fast.kernels.__file__)\n"
    )
    files = run("-c", program, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert [Path(file).is_relative_to(site) for file in files] == [True, True]


def test_metadata(built: Built) -> None:
    metadata = built.read("METADATA")
    assert "License-Expression: Apache-2.0" in metadata
    requirements = dict(re.findall(r"^Requires-Dist: (?!.*extra ==)([\w-]+)(.*)$", metadata, re.MULTILINE))
    assert set(requirements) == {"torch", "numpy", "safetensors", "tqdm", "tomli"}
    # A pin would replace the torch that a user's GPU needs.
    assert requirements["torch"] == ">=2.11"
    assert "mfd-fast = mfd_fast.cli:main" in built.read("entry_points.txt")


def test_without_a_compiler_the_package_still_installs(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    sources = next(tmp_path.glob("mfd_fast-*"))
    output = run("-m", "build", "--no-isolation", "--wheel", sources, cwd=tmp_path, CXX="/nonexistent/c++")
    assert "the C++ core was not built" in output
    names = Built(sources, built.sdist, next((sources / "dist").glob("*.whl"))).wheel_names()
    assert "mfd_fast/step_control.py" in names
    assert not [name for name in names if name.endswith(".so")]


NOT_NEEDED = (
    *("deepspeed", "diffusers", "jinja2", "matplotlib", "numpy", "peft", "safetensors", "scipy", "sklearn"),
    *("tensorboard", "torchdiffeq", "torchode", "tqdm", "transformers", "triton"),
)


def test_import_needs_torch_alone(tmp_path: Path) -> None:
    """None in ``sys.modules`` makes an import fail as if the library were not installed."""
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({NOT_NEEDED}))\n"
        "import mfd_fast, torch\n"
        "print(mfd_fast.__version__, torch.cuda.is_initialized())\n"
    )
    output = run("-W", "ignore", "-c", program, cwd=tmp_path)
    assert output.split() == [mfd_fast.__version__, "False"]
