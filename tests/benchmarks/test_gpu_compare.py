"""The GPU benchmark at toy size on the CPU, and where there is no GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_compare
from gpu_networks import DiffusersSana, SanaShaped, occupancy_case, sana_case
from mfd_fast.storage import read_json


@pytest.mark.slow
def test_toy(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "gpu.json"
    command = ["--toy", "--device", "cpu", "--case", "occupancy", "--repeats", "1", "--out", str(out)]
    assert gpu_compare.main(command) == 0
    results = read_json(out)
    found = results["cases"]["occupancy"]
    assert results["conditions"]["device"] == "cpu"
    for rows in (1, 2):
        rollout, cycle = found[f"rollout, batch {rows}"], found[f"cycle, batch {rows}"]
        assert set(rollout) == {"released loop", "mfd_fast, Euler 0.02", "mfd_fast, AB2 0.05"}
        assert all(0 < seen["gradient_error"] < 0.1 for seen in rollout.values())
        assert all(seen["seconds"] > 0 and seen["synchronisations"] is None for seen in cycle.values())
    assert "occupancy (toy)" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: Any) -> None:
    assert gpu_compare.main(["--out", str(tmp_path / "gpu.json")]) == 1
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [sana_case, occupancy_case])
def test_networks(make: Any) -> None:
    torch.manual_seed(0)
    case = make(True)
    x, t = torch.randn(2, *case.sample_shape), torch.tensor([0.2, 0.9])
    condition = case.condition(2)
    both = case.network(x, t, **condition)
    assert both.shape == x.shape
    one = case.network(x[1:], t[1:], **{name: value[1:] for name, value in condition.items()})
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-4)


def test_the_stand_in_has_the_size_of_the_real_thing() -> None:
    pytest.importorskip("diffusers", reason="diffusers is an extra")
    with torch.device("meta"):
        real = sana_case(False).network
        stand_in = SanaShaped(20, 70, 20, 32, 300)
    assert isinstance(real, DiffusersSana)
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (real, stand_in)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
