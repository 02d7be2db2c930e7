"""`mfd-fast export` of a student that was distilled from a tiny SANA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mfd_fast.models.diffusers_lora import FILE_NAME, load_lora
from mfd_fast.models.sana import SanaNetwork, SanaRoles, load_transformer
from mfd_fast.run_folder import RunFolder

Make = Callable[..., Any]


@pytest.fixture
def run(make_sana: Make, randomize: Any, tmp_path: Path) -> Path:
    """The student of a run as a distillation leaves it, and ``pipeline/transformer`` that it came from."""
    make_sana().save_pretrained(tmp_path / "pipeline" / "transformer")
    roles = SanaRoles(make_sana(), rank=4, lora_alpha=6)
    randomize(roles)
    description = {"lora": {"rank": 4, "alpha": 6.0, "targets": ["to_q", "to_k", "to_v"]}}
    RunFolder(tmp_path / "run").write_network("student", roles.state_dict("student"), description)
    return tmp_path / "run"


def test_a_lora_file(cli: Any, run: Path, make_sana: Make, tmp_path: Path) -> None:
    result = cli("export", run, "lora")
    assert (result.code, result.out) == (0, f"LoRA in lora/{FILE_NAME}\n")
    roles = SanaRoles(make_sana(), rank=4, lora_alpha=6)
    load_lora("lora", roles)
    for name, value in RunFolder(run).read_tensors("student").items():
        torch.testing.assert_close(roles.state_dict("student")[name], value)


def test_a_whole_transformer(cli: Any, refused: Any, run: Path, make_sana: Make, sana_batch: Any) -> None:
    result = cli("export", run, "merged", "--merge-into", "pipeline")
    assert (result.code, result.out) == (0, "transformer in merged\n")
    batch, roles = sana_batch(2), SanaRoles(make_sana(), rank=4, lora_alpha=6)
    roles.load_state_dict("student", RunFolder(run).read_tensors("student"))
    with torch.no_grad():
        expected = roles.student(batch.x, batch.t, **batch.condition)
        velocity = SanaNetwork(load_transformer("merged"))(batch.x, batch.t, **batch.condition)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert "merged exists already" in refused("export", run, "merged", "--merge-into", "pipeline")


def test_what_cannot_be_exported(cli: Any, refused: Any, run: Path, finished_points: Path) -> None:
    assert "there is no run folder" in refused("export", run.parent / "nothing", "lora")
    assert "there is no LoRA to export" in refused("export", finished_points, "lora")
    assert "leave --role auxiliary out" in refused(
        "export", run, "x", "--role", "auxiliary", "--merge-into", "pipeline"
    )
    assert "no whole checkpoint with a low-rank auxiliary" in refused("export", run, "x", "--role", "auxiliary")
    assert "holds no transformer" in refused("export", run, "merged", "--merge-into", "elsewhere")
    assert not Path("lora").exists()
