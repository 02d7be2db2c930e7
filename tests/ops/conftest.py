"""Kernels without a GPU: compiled for GPUs that are not there, or run by Triton's interpreter.

Triton reads its switches when it is imported, so both happen in processes of their own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Interpret = Callable[..., dict[str, np.ndarray]]
UNFUSED = {"TRITON_DEFAULT_FP_FUSION": "0"}
"""Products and sums are rounded one by one, as in torch."""


def apart(program: str, *arguments: Path, **switches: str) -> None:
    """Run a file of this folder with arguments and Triton's switches; it must end well."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name(program)), *map(str, arguments)],
        env=inherited | switches,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="session")
def interpret(tmp_path_factory: pytest.TempPathFactory) -> Interpret:
    """``interpret("interpret_sana.py", arrays)``: what a program makes of arrays in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")

    def run(program: str, given: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        folder = tmp_path_factory.mktemp("interpreter")
        target, files = folder / "out.npz", [folder / "out.npz"]
        if given is not None:
            files = [folder / "in.npz", target]
            np.savez(files[0], **given)
        apart(program, *files, TRITON_INTERPRET="1", **UNFUSED)
        with np.load(target, allow_pickle=False) as results:
            return dict(results)

    return run


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the ``BUILD`` of the module, such as build_sana.py, found out about the kernels it compiled."""
    folder = tmp_path_factory.mktemp("build")
    switches = getattr(request.module, "SWITCHES", UNFUSED)
    apart(request.module.BUILD, folder / "built.json", TRITON_CACHE_DIR=str(folder / "cache"), **switches)
    found: list[dict[str, Any]] = json.loads((folder / "built.json").read_text("utf-8"))
    return found
