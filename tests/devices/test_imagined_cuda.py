"""What users run on a GPU runs on a CUDA device that is only imagined: every tensor in its place, no needless waits.

No kernel of a GPU runs here. See imagined_cuda.py for what the imagined device minds.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """imagined_cuda.cpp, compiled."""
    if torch.version.cuda is not None or sys.platform != "linux":
        pytest.skip("only a CPU build of torch on Linux lets somebody else be its CUDA device")
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("imagined") / "imagined_cuda.so"
    linked = ["-Wl,--no-as-needed", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    source = [str(HERE / "imagined_cuda.cpp"), f"-I{TORCH / 'include'}"]
    subprocess.run([COMPILER, "-std=c++20", "-shared", "-fPIC", *source, *linked, "-o", str(path)], check=True)
    return path


@pytest.mark.slow
def test_every_path_runs_as_on_the_cpu(library: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["MFD_FAST_TRITON"] = "0"
    report = tmp_path / "report.jsonl"
    command = [sys.executable, str(HERE / "imagined_paths.py"), str(report)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in report.read_text("utf-8").splitlines()]
    problems = [f"{result['path']}: {result['problem']}" for result in results if result["problem"] is not None]
    assert problems == [], "\n".join(problems)
    assert len(results) > 30
