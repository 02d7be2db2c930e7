import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mfd_fast

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCES = (".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__", "shared")

# One build serves all tests of this file, so one worker runs them.
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a clean copy of the sources and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "sources", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    run("-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "sources", cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def sdist(distributions: Path) -> Path:
    return next(distributions.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    return next(distributions.glob("*.whl"))


def python_files() -> set[str]:
    """Every module of the sources, by its path when installed."""
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mfd_fast").rglob("*.py")}
    return ours | {f"mfd_fast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}


def data_files() -> set[str]:
    """What is neither Python nor made by a build, and must be installed beside the modules."""
    made = {".py", ".pyc", ".so"}
    files = (path for path in (ROOT / "mfd_fast").rglob("*") if path.is_file() and path.suffix not in made)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_sdist_can_be_built_from(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()}
    assert sources >= {"csrc/bindings.cpp", "csrc/step_controller.cpp", "csrc/step_controller.hpp"}
    needed = sources | data_files() | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"}
    assert needed - names == set()
    assert "kernels/__init__.py" in names


def test_wheel_is_complete(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mfd_fast/py.typed", "mfd_fast/_core.pyi", "mfd_fast/kernels/__init__.py"} <= names
    assert (python_files() | data_files()) - names == set()
    assert [name for name in names if re.fullmatch(r"mfd_fast/_core\..*(so|pyd)", name)]
    assert {name.partition("/")[0] for name in names} == {"mfd_fast", f"mfd_fast-{mfd_fast.__version__}.dist-info"}


def test_installed_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import mfd_fast, mfd_fast.kernels, mfd_fast.native\n"
        "print(mfd_fast.native.core().__file__, mfd_fast.kernels.__file__)\n"
    )
    files = run("-c", program, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert [Path(file).is_relative_to(site) for file in files] == [True, True]


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    folder = f"mfd_fast-{mfd_fast.__version__}.dist-info"
    metadata = archive.read(f"{folder}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    requirements = re.findall(r"^Requires-Dist: (?!.*extra ==)([\w-]+)", metadata, re.MULTILINE)
    assert set(requirements) == {"torch", "numpy", "safetensors", "tqdm", "tomli", "tomli-w"}
    # A pin would replace the torch that a user's GPU needs.
    assert re.findall(r"^Requires-Dist: torch(.*)$", metadata, re.MULTILINE) == [">=2.11"]
    assert "mfd-fast = mfd_fast.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()


def test_without_a_compiler_the_package_still_installs(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    sources = next(tmp_path.glob("mfd_fast-*"))
    output = run("-m", "build", "--no-isolation", "--wheel", sources, cwd=tmp_path, CXX="/nonexistent/c++")
    assert "the C++ core was not built" in output
    names = zipfile.ZipFile(next((sources / "dist").glob("*.whl"))).namelist()
    assert "mfd_fast/step_control.py" in names
    assert not [name for name in names if name.endswith(".so")]


HEAVY = (
    *("deepspeed", "diffusers", "jinja2", "matplotlib", "peft", "safetensors", "scipy", "sklearn", "tensorboard"),
    *("torchdiffeq", "torchode", "tqdm", "transformers", "triton"),
)


def test_import_needs_torch_alone(tmp_path: Path) -> None:
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import mfd_fast\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
        "print(torch.cuda.is_initialized())\n"
    )
    imported, touched_device = run("-W", "ignore", "-c", program, cwd=tmp_path).splitlines()
    assert "mfd_fast" in imported.split()
    assert set(imported.split()) & set(HEAVY) == set()
    assert touched_device == "False"
