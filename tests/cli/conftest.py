"""The command line in this process, and runs that take a second."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mfd_fast.cli import main

TINY = (
    *("model.options.width=16", "model.options.depth=1", "teacher.updates=6", "teacher.batch_size=32"),
    *("distill.student_updates=3", "distill.cycle_auxiliary=2", "distill.batch_size=16", "distill.sample_every=2"),
    *("distill.rollout.step_size=0.25", "distill.log_every=1", "run.device=cpu", "run.tensorboard=false"),
    *("evaluate.num_samples=60", "evaluate.teacher_steps=[1,3]"),
)
SETTINGS = [part for setting in TINY for part in ("--set", setting)]
FEW = ("data.options.num_samples=400", "data.options.num_held_out=100")
POINTS = ["--preset", "mixture-2d", *SETTINGS, *(part for setting in FEW for part in ("--set", setting))]


class Result(NamedTuple):
    """What a command gave."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``cli("info", "--settings")`` runs ``mfd-fast`` in this process."""

    def run(*arguments: str | Path) -> Result:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(cli: Callable[..., Result]) -> Callable[..., str]:
    """Runs a command that must be refused: exit code 2 and one line on stderr, which is returned."""

    def run(*arguments: str | Path) -> str:
        result = cli(*arguments)
        assert result.code == 2
        assert "Traceback" not in result.err
        lines = result.err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"mfd-fast {arguments[0]}: ")
        return lines[0]

    return run


@pytest.fixture(scope="session")
def settings() -> list[str]:
    """``--set`` options of a run that takes no time."""
    return SETTINGS


@pytest.fixture(scope="session")
def points() -> list[str]:
    """The same for a run on a few two-dimensional points."""
    return POINTS


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ``mfd-fast demo`` on the digits, not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["demo", "--run", str(run), *SETTINGS]) == 0
    return run


@pytest.fixture(scope="session")
def finished_points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two-dimensional points without classes, not to be changed."""
    run = tmp_path_factory.mktemp("points") / "run"
    for command in ("train-teacher", "distill"):
        assert main([command, "--run", str(run), *POINTS]) == 0
    return run


@pytest.fixture
def run(finished_points: Path, tmp_path: Path) -> Path:
    """A copy of the finished run on points."""
    return Path(shutil.copytree(finished_points, tmp_path / "run"))
