"""Formulas of states against a real training step and against the formulas of the paper of ZeRO."""

import pytest
import torch

from mfd_fast.config import OptimizerSettings
from mfd_fast.estimate.memory import GIB, memory_of
from mfd_fast.estimate.network import SANA_PARAMETERS, sana_1600m
from mfd_fast.estimate.plan import Plan
from mfd_fast.estimate.states import role_states
from mfd_fast.models.lora import LoRARoles
from mfd_fast.models.mlp import MLP
from mfd_fast.training.distributed import World
from mfd_fast.training.optimizing import RoleOptimizer
from mfd_fast.training.roles import FullRoles, Roles

SANA = sana_1600m("bfloat16", 64)
SHARED = ("weights", "gradients", "kept_gradients", "master", "moments")
"""Of the states of a role, those that formulas of ZeRO are about."""


def plan(**changes: object) -> Plan:
    return Plan(**({"auxiliary": "full", "student": "lora", "rows": 1, "precision": "bfloat16"} | changes))  # type: ignore[arg-type]


def bytes_of(tensors: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_states_are_those_of_a_real_update(kind: str) -> None:
    teacher = MLP((3,), width=32, depth=2)
    roles: Roles = FullRoles(teacher) if kind == "full" else LoRARoles(teacher, rank=4, alpha=4.0)
    weights = roles.parameters("student")
    optimizer = RoleOptimizer(
        weights, OptimizerSettings(), total_updates=1, precision="float32", world=World(0, 1, torch.device("cpu"))
    )
    optimizer.backward(roles.student(torch.randn(5, 3), torch.rand(5)).square().mean(), 1)
    gradients = bytes_of(weight.grad for weight in weights)
    optimizer.step()
    moments = bytes_of(value for name, value in optimizer.tensors().items() if "exp_avg" in name)

    count = sum(weight.numel() for weight in weights)
    network = SANA._replace(parameters=count, adapter=count)
    states = role_states(plan(precision="float32"), network, kind, average=False)
    assert (states.weights, states.gradients, states.moments) == (bytes_of(weights), gradients, moments)
    assert (states.master, states.average, states.replica) == (0, 0, 0)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_zero_divides_what_it_divides(gpus: int) -> None:
    def bytes_per_weight(**changes: object) -> float:
        states = role_states(plan(gpus=gpus, **changes), SANA, "full", average=False)
        return sum(getattr(states, name) for name in SHARED) / SANA_PARAMETERS

    assert bytes_per_weight(zero=1) == pytest.approx(4 + 14 / gpus)
    assert bytes_per_weight(zero=2) == pytest.approx(2 + 14 / gpus)
    assert bytes_per_weight(zero=3) == pytest.approx(16 / gpus)
    assert bytes_per_weight(zero=1, offload=True) == pytest.approx(4)
    assert bytes_per_weight(zero=2, offload=True) == pytest.approx(2)
    assert bytes_per_weight(zero=3, offload=True) == pytest.approx(2 / gpus)
    assert bytes_per_weight(zero=2, optimizer_bits=8) == pytest.approx(2 + 8 / gpus)
    assert bytes_per_weight(zero=0) == pytest.approx(16)


def test_offload_moves_states_to_the_host() -> None:
    """Float32 gradients too, and a copy of the weights on their way; one of the gradients where several are added."""
    here = role_states(plan(zero=2, gpus=2), SANA, "full", average=False)
    there = role_states(plan(zero=2, gpus=2, offload=True), SANA, "full", average=False)
    assert there.host == here.master + here.moments + (4 + 2) * SANA_PARAMETERS / 2 == 18 * SANA_PARAMETERS / 2
    assert there.master == there.moments == there.gradients == there.stepped == here.host == 0
    several = role_states(plan(zero=2, gpus=2, offload=True, accumulation=2), SANA, "full", average=False)
    assert several.host == 20 * SANA_PARAMETERS / 2


def test_a_step_makes_float32_gradients_of_one_group_at_a_time() -> None:
    """What a real engine takes is compared in tests/training/test_zero.py."""
    group, share = 200_000_000, SANA_PARAMETERS / 2
    stepped = [role_states(plan(zero=stage, gpus=2), SANA, "full", average=False).stepped for stage in (1, 2, 3)]
    assert stepped == [2 * share + 6 * group / 2, 2 * share + 6 * group / 2, 6 * group / 2]
    memory = memory_of(plan(zero=2, gpus=2, recompute_blocks=True), SANA)
    assert memory.phases["auxiliary step"] == stepped[1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_average_of_a_shared_out_role_is_shared_out_too(stage: int) -> None:
    """Where the float32 weights are, there is their average (`mfd_fast.training.zero_roles.ZeroAverage`)."""
    here = role_states(plan(zero=stage, gpus=4), SANA, "full", average=True)
    assert here.average == here.master == 4 * SANA_PARAMETERS / 4
    there = role_states(plan(zero=stage, gpus=4, offload=True), SANA, "full", average=True)
    without = role_states(plan(zero=stage, gpus=4, offload=True), SANA, "full", average=False)
    assert there.average == 0
    assert there.host - without.host == here.average
    assert role_states(plan(gpus=4), SANA, "full", average=True).average == 4 * SANA_PARAMETERS


def test_in_float32_the_numbers_of_zero_are_those_of_the_page() -> None:
    """docs/zero.md: 8 + 16/N, 4 + 16/N and 20/N bytes, the last beside a replica of 4."""
    plans = [plan(zero=stage, gpus=4, precision="float32") for stage in (1, 2, 3)]
    found = [role_states(each, SANA, "full", average=False) for each in plans]
    each = [sum(getattr(states, name) for name in SHARED) / SANA_PARAMETERS for states in found]
    assert each == pytest.approx([8 + 16 / 4, 4 + 16 / 4, 20 / 4])
    assert found[2].replica == 4 * SANA_PARAMETERS


def test_stage_three_keeps_a_whole_replica_for_rollouts() -> None:
    assert role_states(plan(zero=3, gpus=8), SANA, "full", average=False).replica == 2 * SANA_PARAMETERS
    assert role_states(plan(zero=2, gpus=8), SANA, "full", average=False).replica == 0


def test_low_rank_roles_are_never_shared_out() -> None:
    alone = role_states(plan(), SANA, "lora", average=True)
    assert role_states(plan(zero=3, gpus=8), SANA, "lora", average=True) == alone
    assert alone.weights + alone.moments + alone.average == SANA.adapter * (4 + 8 + 4)
    assert alone.master == alone.replica == 0


def test_states_of_sana_with_a_full_auxiliary_on_two_gpus() -> None:
    memory = memory_of(plan(zero=2, gpus=2, recompute_blocks=True), SANA)
    assert memory.states / GIB == pytest.approx(17.4, abs=0.1)
    assert (memory.dominating.role, memory.dominating.what) == ("auxiliary", "moments")
    assert memory.total == pytest.approx(
        memory.states + memory.activations + sum(term.bytes for term in memory.terms if term.role == "process")
    )
