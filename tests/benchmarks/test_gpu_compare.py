"""The GPU benchmark at toy size on the CPU, and where there is no GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_compare
import gpu_networks
from gpu_networks import SanaShaped, SanaSizes, sana_case
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
        assert set(rollout) == {"released loop", "mfd_fast, Euler 0.2", "mfd_fast, AB2 0.25"}
        assert all(0 < seen["gradient_error"] < 0.2 for seen in rollout.values())
        assert all(seen["seconds"] > 0 and seen["synchronisations"] is None for seen in cycle.values())
        update, forecast = found[f"student update, batch {rows}"], found[f"forecast, batch {rows}"]
        # Ten times as many auxiliary updates are in a cycle.
        assert all(0 < update[name]["seconds"] < cycle[name]["seconds"] for name in ("released loop", "mfd_fast"))
        assert set(forecast) == {"teacher, 10 steps", "student, 1 step"}
        for seen in forecast.values():
            assert seen["frames_per_second"] == pytest.approx(2 * rows / seen["seconds"])
        assert forecast["student, 1 step"]["seconds"] < forecast["teacher, 10 steps"]["seconds"]
    said = capsys.readouterr().out
    assert "OccFM toy" in said
    assert said.count("frames/s") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: Any) -> None:
    assert gpu_compare.main(["--out", str(tmp_path / "gpu.json")]) == 1
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_both_forms_of_the_roles_are_one_network() -> None:
    pytest.importorskip("diffusers", reason="diffusers is an extra")
    torch.manual_seed(0)
    case = sana_case(True)
    roles, plain = case.roles(torch.device("cpu"), 4)
    assert roles is not plain
    gpu_compare.perturb(roles)
    x, t, condition = torch.randn(2, *case.sample_shape).bfloat16(), torch.tensor([0.2, 0.9]), case.condition(2)
    with torch.no_grad():
        for value in roles.parameters("auxiliary"):
            value.mul_(10)
        before = plain.auxiliary(x, t, **condition)
        plain.load_state_dict("auxiliary", roles.state_dict("auxiliary"))
        own, loops = (field(x, t, **condition).float() for field in (roles.auxiliary, plain.auxiliary))
    assert (loops - before.float()).norm() > 0.01 * loops.norm()
    assert (own - loops).norm() < 0.02 * loops.norm()


def test_the_stand_in_has_the_size_of_the_real_thing() -> None:
    pytest.importorskip("diffusers", reason="diffusers is an extra")
    sizes = SanaSizes(20, 70, 20, 32, 300, 2304)
    with torch.device("meta"):
        networks = gpu_networks._transformer(sizes), SanaShaped(sizes)
    real, stand_in = (sum(parameter.numel() for parameter in network.parameters()) for network in networks)
    assert stand_in == pytest.approx(real, rel=0.02)


def test_the_stand_in_keeps_rows_apart() -> None:
    torch.manual_seed(0)
    network = SanaShaped(SanaSizes(2, 2, 2, 8, 6, 64))
    x, t, condition = torch.randn(2, 32, 8, 8), torch.tensor([0.2, 0.9]), sana_case(True).condition(2)
    one = network(x[1:], t[1:], **{name: value[1:] for name, value in condition.items()})
    torch.testing.assert_close(network(x, t, **condition)[1:], one, rtol=1e-4, atol=1e-4)
