"""The commands for OccFM, as a new user would call them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_occfm import CONFIG, save, write_checkout

from mfd_fast.cli import main
from mfd_fast.data import load_dataset
from mfd_fast.data.occupancy import OccupancyDataset
from mfd_fast.metrics.iou import IoUCounter
from mfd_fast.models.occfm import OccupancyVelocity
from mfd_fast.occfm_repo import load_decoder
from mfd_fast.run_folder import RunFolder
from mfd_fast.settings_io import load_settings

TINY = (
    *("model.options.model_channels=8", "model.options.init_3d_conv_channels=4", "model.options.attn_dim=4"),
    *("teacher.updates=4", "teacher.batch_size=4", "distill.student_updates=2", "distill.cycle_auxiliary=1"),
    *("distill.batch_size=4", "distill.rollout.step_size=0.5", "distill.log_every=1", "run.tensorboard=false"),
    *("evaluate.num_samples=4", "evaluate.batch_size=4", "evaluate.teacher_steps=[1,2]", "run.device=cpu"),
    *("evaluate.teacher_guidance_scale=1.5", "run.threads=1"),
)
SETTINGS = ["--preset", "occfm-toy", *(part for setting in TINY for part in ("--set", setting))]
FEW = [part for key in ("training", "validation") for part in ("--set", f"data.options.{key}_scenes=2")]


@pytest.fixture(scope="module")
def finished_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the toy set in memory, guided, with full-parameter roles; not to be changed."""
    run = tmp_path_factory.mktemp("occupancy") / "run"
    assert main(["demo", "--run", str(run), *SETTINGS, *FEW, "--set", "distill.guidance_scale=1.5"]) == 0
    return run


def test_demo_leaves_iou_and_pictures(finished_toy: Path) -> None:
    metrics = json.loads((finished_toy / "metrics.json").read_text())
    rows = {(row["role"], row["steps"]): row for row in metrics["occupancy"]["rows"]}
    assert list(rows) == [("teacher", 1), ("teacher", 2), ("student", 1), ("recorded", None), ("repeated", None)]
    assert all(0 <= row["mean_iou"] <= 100 and len(row["miou"]) == 3 for row in rows.values())
    assert rows["recorded", None]["mean_iou"] == 100
    page = (finished_toy / "report.html").read_text()
    for text in ("Ground truth", "Teacher, 2 steps", "Student, 1 step", "mIoU, +3", "Last frame again", "truck"):
        assert text in page
    assert "There are no evaluated samples yet" not in page
    assert page.count("data:image") >= 4
    assert {"sample", "evaluate", "report", "teacher", "distill"} <= metrics["seconds"].keys()


def test_the_null_condition_is_trained_and_used(finished_toy: Path) -> None:
    teacher = RunFolder(finished_toy).read_teacher()
    assert isinstance(teacher, OccupancyVelocity)
    assert teacher.null_condition()["history"].shape == (1, 3, 4, 12, 12)
    described = json.loads((finished_toy / "student.json").read_text())
    assert described["condition_names"] == ["history", "trajectory"]


def test_sample_takes_held_out_histories(finished_toy: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli("sample", finished_toy, "--num", 3, "--out", "samples.npz")
    assert result.code == 0, result.err
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["x"].shape == (3, 3, 4, 12, 12)
    assert cli("sample", finished_toy, "--num", 3, "--out", "again.npz").code == 0
    with np.load(tmp_path / "again.npz") as first, np.load(tmp_path / "samples.npz") as second:
        np.testing.assert_array_equal(first["x"], second["x"])


def test_evaluate_again_says_the_same(finished_toy: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(finished_toy, tmp_path / "copy"))
    before = json.loads((copied / "metrics.json").read_text())["occupancy"]["rows"]
    result = cli("evaluate", copied)
    assert result.code == 0, result.err
    assert "student     1 step   IoU" in result.out
    after = json.loads((copied / "metrics.json").read_text())["occupancy"]["rows"]
    assert [row["mean_iou"] for row in before] == [row["mean_iou"] for row in after]


@pytest.mark.timeout(300)
def test_processes_share_the_windows(finished_toy: Path, tmp_path: Path) -> None:
    """Three windows one by one in two processes: the numbers of one process, said once."""
    run = Path(shutil.copytree(finished_toy, tmp_path / "run"))
    settings = RunFolder(run).read_settings()
    few = replace(settings.evaluate, num_samples=3, batch_size=1)
    RunFolder(run).write_settings(replace(settings, evaluate=few))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    said = []
    for ranks in (
        [{"OMP_NUM_THREADS": "1"}],
        [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)],
    ):
        command = [sys.executable, "-W", "ignore", "-m", "mfd_fast", "evaluate", str(run)]
        started = [
            subprocess.Popen(command, env=os.environ | rank, stdout=subprocess.PIPE, text=True) for rank in ranks
        ]
        said += [process.communicate(timeout=120)[0] for process in started]
        assert [process.returncode for process in started] == [0] * len(ranks)
    assert "\nteacher     1 step   IoU" in said[0]
    assert said[1:] == [said[0], ""]


OWN_TEACHER = """
import torch
from torch import nn


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2, 1)

    def forward(self, x, t, history, trajectory):
        seen = self.mix(torch.stack([x, history], -1)).squeeze(-1)
        return seen + trajectory.sum((1, 2)).view(-1, 1, 1, 1, 1)


def make():
    torch.manual_seed(0)
    return Forecaster()
"""


def test_a_teacher_of_the_users_own_with_histories(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factory for the teacher, conditions from the data: distil, sample, evaluate."""
    Path("own_forecaster.py").write_text(OWN_TEACHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["--run", "run", "--teacher", "own_forecaster:make", *SETTINGS, *FEW]
    unguided = ["--set", "evaluate.teacher_guidance_scale=1.0"]
    result = cli("distill", *arguments, *unguided)
    assert result.code == 0, result.err
    described = json.loads(Path("run/student.json").read_text())
    assert described["network"] == {"factory": "own_forecaster:make"}
    assert described["condition_names"] == ["history", "trajectory"]
    assert cli("sample", "run", "--num", 2, "--out", "samples.npz", "--trust-code").code == 0
    result = cli("evaluate", "run", "--trust-code")
    assert result.code == 0, result.err
    assert "teacher     2 steps  IoU" in result.out
    # Guidance needs something to push away from, which this teacher does not say.
    guided = cli("distill", *arguments, *unguided, "--fresh", "--set", "distill.guidance_scale=2.0")
    assert guided.code == 2
    assert "the teacher has no negative condition" in guided.err


def test_evaluate_decodes_with_a_checkout(finished_toy: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    """The decoder of a checkout in place of the toy set's codec: every line is what that decoder makes of latents."""
    config = CONFIG.replace("HEIGHT_NUM: 5", "HEIGHT_NUM: 4").replace("OUT_DIM: 15", "OUT_DIM: 12")
    checkout = write_checkout(tmp_path / "occfm", config=config)
    checkpoint = save(
        tmp_path,
        **{
            "module.decoder.up.weight": torch.randn(4, 12, 2, 2, generator=torch.Generator().manual_seed(0)),
            "module.decoder.up.bias": torch.zeros(12),
        },
    )
    copied = Path(shutil.copytree(finished_toy, tmp_path / "copy"))
    result = cli("evaluate", copied, "--occfm-repo", checkout, "--occfm-checkpoint", checkpoint)
    assert result.code == 0, result.err
    rows = {row["role"]: row for row in json.loads((copied / "metrics.json").read_text())["occupancy"]["rows"]}

    settings = RunFolder(copied).read_settings()
    data = load_dataset(settings.data.name, **settings.data.options)
    assert isinstance(data, OccupancyDataset)
    assert data.truth is not None
    chosen = torch.linspace(0, len(data.held_out_x) - 1, 4, dtype=torch.float64).round().long()
    decode = load_decoder(checkout, checkpoint, 4, torch.device("cpu"))
    counter = IoUCounter(3, 17)
    latents = data.held_out_x[chosen] / data.scale
    truth = torch.stack([data.truth.labels(start, 3) for start in data.truth_starts[chosen].tolist()])
    counter.update(decode(latents.flatten(0, 1)).unflatten(0, (4, 3)), truth)
    expected = 100 * counter.result().mean_iou
    assert expected < 60
    assert rows["recorded"]["mean_iou"] == pytest.approx(expected)
    for name in [name for name in sys.modules if name.partition(".")[0] == "forecast"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--occfm-repo", "x"], "--occfm-repo and --occfm-checkpoint belong together"),
        (["--occfm-repo", "x", "--occfm-checkpoint", "y"], "expected a checkout of OccFM with a folder 'forecast'"),
        (["--labels", "nowhere"], "labels: expected the folder that holds SCENE/TOKEN/labels.npz, got nowhere"),
    ],
)
def test_evaluate_refuses(
    options: list[str], message: str, finished_toy: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    result = cli("evaluate", finished_toy, *options)
    assert result.code == 2
    assert message in result.err


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy set as released and converted, by the commands."""
    from mfd_fast.data.occupancy.toy import write_release

    folder = tmp_path_factory.mktemp("released")
    write_release(folder / "released", 0, {"training": 2, "validation": 2})
    for split in ("training", "validation"):
        files = [folder / "released" / name for name in (f"nus_sem_occ_{split}.pkl", f"nuscenes_infos_{split}.pkl")]
        arguments = [str(files[0]), "--infos", str(files[1]), "--out", str(folder / "latents" / split)]
        assert main(["convert-occfm", *arguments]) == 0
    return folder


def test_the_whole_way_over_files(released: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    labels = released / "released" / "data" / "nuscenes" / "gts"
    options = [*SETTINGS, "--set", f"data.root={released / 'latents'}", "--set", f"evaluate.labels={labels}"]
    assert cli("train-teacher", "--run", "run", *options).code == 0
    assert cli("distill", "--run", "run", *options).code == 0
    result = cli("evaluate", "run")
    assert result.code == 0, result.err
    assert "teacher     2 steps  IoU" in result.out
    assert "recorded latents     IoU 100.00" in result.out
    assert "latents were compared" not in result.out
    settings = RunFolder(Path("run")).read_settings()
    RunFolder(Path("run")).write_settings(replace(settings, evaluate=replace(settings.evaluate, labels=None)))
    result = cli("evaluate", "run")
    assert result.code == 0, result.err
    assert "recorded latents     distance of latents 0.000" in result.out
    assert "latents were compared: IoU needs --labels" in result.out


def test_toy_command(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfd_fast.data.occupancy.toy.SPLITS", {"training": (1, 0), "validation": (1, 1)})
    assert cli("make-occupancy-toy", "toy").code == 0
    assert len(list(Path("toy/data/nuscenes/gts").glob("*/*/labels.npz"))) == 24
    again = cli("make-occupancy-toy", "toy")
    assert again.code == 2
    assert "toy exists already" in again.err


def test_convert_refuses_with_one_line(released: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    latents, infos = (
        released / "released" / f"{name}.pkl" for name in ("nus_sem_occ_training", "nuscenes_infos_training")
    )
    assert "is no cache of latents" in refused("convert-occfm", infos, "--infos", infos, "--out", "out")
    assert "is no infos file" in refused("convert-occfm", latents, "--infos", latents, "--out", "out")
    other = released / "released" / "nuscenes_infos_validation.pkl"
    assert "are they of the same split?" in refused("convert-occfm", latents, "--infos", other, "--out", "out")
    assert not Path("out").exists()


def test_import_a_checkpoint_and_distil_it(cli: Callable[..., Any], tmp_path: Path) -> None:
    settings = load_settings("occfm-toy", overrides=TINY)
    torch.manual_seed(0)
    network = OccupancyVelocity((3, 4, 12, 12), **settings.model.options)
    weights = {f"module.transition_model.{name}": value for name, value in network.network.state_dict().items()}
    torch.save({"state_dict": weights | {"module.encoder.x": torch.zeros(1)}, "ema_model": None}, "occfm.ckpt")
    result = cli("import-occfm", "occfm.ckpt", "--run", "run", *SETTINGS, *FEW)
    assert result.code == 0, result.err
    assert "from occfm.ckpt (state_dict)" in result.out
    assert "left over: 1 tensors of other parts (encoder)" in result.out
    kept = RunFolder(Path("run")).read_teacher().state_dict()
    assert torch.equal(kept["network.init_conv.weight"], network.network.init_conv.weight)
    assert cli("distill", "--run", "run", *SETTINGS, *FEW).code == 0
    again = cli("import-occfm", "occfm.ckpt", "--run", "run", *SETTINGS, *FEW)
    assert again.code == 2
    assert "already has its teacher" in again.err


def test_import_refuses(refused: Callable[..., str], tmp_path: Path) -> None:
    torch.save({"state_dict": {"transition_model.x": torch.zeros(1)}}, "other.ckpt")
    message = refused("import-occfm", "other.ckpt", "--run", "run", *SETTINGS, *FEW)
    assert "does not fit the model: missing" in message
    assert "more" in message
    assert not (tmp_path / "run" / "teacher.json").exists()
    assert "there is no file nowhere.ckpt" in refused("import-occfm", "nowhere.ckpt", "--run", "r", *SETTINGS, *FEW)
    digits = refused("import-occfm", "other.ckpt", "--run", "r", "--preset", "mixture-2d")
    assert "model.name must be 'occfm'" in digits
