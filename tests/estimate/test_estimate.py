"""Whole estimates: rows, times, knobs and verdicts."""

from dataclasses import replace

import pytest
import torch

from mfd_fast.config import DistillSettings, OptimizerSettings, RolloutSettings, TimeSettings
from mfd_fast.estimate.duration import GPUS, seconds, work_of
from mfd_fast.estimate.knobs import KNOBS, cheapest
from mfd_fast.estimate.memory import GIB, memory_of, rollout_rows, sampled_rows
from mfd_fast.estimate.network import sana_1600m
from mfd_fast.estimate.out_of_memory import named_knobs
from mfd_fast.estimate.plan import Evaluations, Plan, mean_evaluations, plan_from_settings
from mfd_fast.estimate.report import estimate, format_estimate

SANA = sana_1600m("bfloat16", 64)
LORA = Plan(
    auxiliary="lora",
    student="lora",
    rows=1,
    precision="bfloat16",
    student_steps=4,
    grad_steps=4,
    guided=True,
    sample_rows=8,
    evaluations=Evaluations(10.0, 10.0),
)
FULL = replace(LORA, auxiliary="full")
GPU = GPUS["rtx-3090"]


def test_sana_with_adapters_in_twelve_gigabytes() -> None:
    for saving in ({"recompute_steps": True}, {"recompute_blocks": True}):
        found = estimate(replace(LORA, **saving), SANA, GPU, 12)
        assert found.fits
        assert found.memory.total < 12e9
    assert not estimate(LORA, SANA, GPU, 12).fits  # four steps kept for the backward pass: the released loop's 20 GB


def test_sana_with_adapters_and_four_rows_on_24() -> None:
    assert estimate(replace(LORA, rows=4, recompute_blocks=True), SANA, GPU).fits
    assert estimate(replace(LORA, rows=4, recompute_steps=True), SANA, GPU).fits


def test_sana_with_a_full_auxiliary_is_refused_on_one_gpu_and_accepted_on_two() -> None:
    one = estimate(replace(FULL, recompute_blocks=True), SANA, GPU)
    assert not one.fits
    assert "auxiliary" in format_estimate(one)
    assert one.memory.dominating.what == "moments"
    assert estimate(replace(FULL, recompute_blocks=True, zero=2, offload=True), SANA, GPU).fits
    two = estimate(replace(FULL, recompute_blocks=True, zero=2, gpus=2), SANA, GPU)
    assert two.fits
    assert "most is moments of auxiliary" in format_estimate(two)


def test_knobs_are_the_cheapest_that_help() -> None:
    found = estimate(FULL, SANA, GPU)
    assert [knob.words for knob in found.advice] == [
        "distill.recompute_blocks = true",
        "moments of 8 bits (adamw8bit)",
        "states offloaded to the host's memory",
    ]
    assert all(knob.total <= 0.95 * found.memory.total for knob in found.advice)
    assert found.advice[-1].together < found.limit
    text = format_estimate(found)
    assert "does not fit in 24 GiB" in text
    assert "all of these fit" in text
    assert estimate(LORA, SANA, GPU).advice == []


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.words)
def test_no_knob_costs_memory_and_none_can_be_turned_for_ever(knob: object) -> None:
    plan = replace(FULL, rows=4, precision="float32", gpus=2)
    for _ in range(4):
        changed = knob.change(plan)  # type: ignore[attr-defined]
        if changed is None:
            return
        network = sana_1600m(changed.precision, 64)
        assert memory_of(changed, network).total <= memory_of(plan, sana_1600m(plan.precision, 64)).total
        plan = changed
    assert "twice" in knob.words  # type: ignore[attr-defined]


def test_a_teacher_of_8_bits_is_a_copy() -> None:
    """Beside the weights that the adapters need; its rows do not share a batch with the auxiliary's."""
    plain, low = (memory_of(replace(LORA, recompute_steps=True, low_teacher=low), SANA) for low in (False, True))
    assert low.states - plain.states == SANA.low_bytes
    assert low.total - plain.total == SANA.low_bytes
    assert ("teacher", "copy in 8 bits", SANA.low_bytes) in low.terms
    assert rollout_rows(replace(LORA, rows=4, low_teacher=True)) == 8
    assert "distill.teacher_weights = float" in [knob.words for knob in cheapest(replace(LORA, low_teacher=True))]
    assert plan_from_settings(DistillSettings(teacher_weights="int8"), 1).low_teacher


def test_the_phases() -> None:
    memory = memory_of(replace(LORA, rows=2), SANA)
    footprint = SANA.lora
    states = 4 * 2 * SANA.sample_bytes
    gradients = 4 * SANA.adapter
    backward = 3 * footprint.saved.of(2) + footprint.peak.of(2) + states
    assert memory.phases["student backward"] == pytest.approx(backward + gradients)
    assert memory.phases["rollout"] == pytest.approx(4 * footprint.saved.of(2) + states + SANA.forward.of(6))
    assert memory.phases["auxiliary update"] == pytest.approx(footprint.peak.of(2) + gradients)
    assert memory.phases["sampling"] == pytest.approx(SANA.forward.of(8))
    assert memory.total == pytest.approx(memory.states + memory.activations + GIB / 2)


def test_rows_at_once() -> None:
    assert rollout_rows(replace(LORA, rows=4)) == 12
    assert rollout_rows(replace(FULL, rows=4)) == 8
    assert rollout_rows(replace(LORA, rows=4, guided=False, max_rows=6)) == 6
    assert sampled_rows(replace(LORA, rows=3, sample_rows=8)) == 6
    assert sampled_rows(replace(LORA, rows=3, sample_rows=1000)) == 30


def test_work_and_time() -> None:
    work = work_of(replace(LORA, rows=2, recompute_steps=True))
    assert work is not None
    assert work.rollout_rows == 2 * 10 * 3  # conditional, unconditional, auxiliary
    assert work.student == 2 * 4 * 3  # forward, forward again, backward
    assert work.auxiliary == 2 * (4 + 2)  # four steps, forward and backward
    assert work.cycle == work.rollout_rows + work.student + 10 * work.auxiliary
    # Three rows of SANA on an RTX 3090 at 70 % of its peak; reading the weights is less.
    assert seconds(LORA, SANA, GPU, 3) == pytest.approx(3 * 2967e9 / (0.7 * 71e12))
    assert work_of(replace(LORA, evaluations=Evaluations(None, None))) is None


def test_mean_evaluations() -> None:
    uniform = TimeSettings(law="uniform")
    found = mean_evaluations(DistillSettings(times=uniform, rollout=RolloutSettings(step_size=0.02)))
    assert found.teacher == pytest.approx(1 / 0.06 + 0.5, rel=0.03)  # mean of |t - r| is 1/3; half a step is rounded up
    twice = RolloutSettings(solver="heun", step_size=None, steps=5, auxiliary_solver="euler")
    assert mean_evaluations(DistillSettings(rollout=twice)) == Evaluations(10.0, 5.0)


def test_plan_from_settings() -> None:
    adam = OptimizerSettings(name="adam")
    settings = DistillSettings(batch_size=32, accumulation=2, guidance_scale=4.5, student_optimizer=adam)
    plan = plan_from_settings(settings, 4)
    assert (plan.rows, plan.accumulation, plan.guided, plan.auxiliary) == (4, 2, True, "full")
    assert plan_from_settings(DistillSettings(method="cd"), 1).auxiliary is None
    mixed = plan_from_settings(DistillSettings(roles="lora-student", zero_stage=2), 2)
    assert (mixed.auxiliary, mixed.student, mixed.zero) == ("full", "lora", 2)
    both = plan_from_settings(DistillSettings(roles="lora"), 1)
    assert (both.auxiliary, both.student) == ("lora", "lora")


def test_an_out_of_memory_error_names_the_cheapest_knobs() -> None:
    settings = DistillSettings(batch_size=8, sample_rows=64, guidance_scale=4.5)
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB."
    expected = pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2.00 GiB\. Cheapest")
    with expected as caught, named_knobs(settings, 1):
        raise torch.OutOfMemoryError(message)
    for knob in cheapest(plan_from_settings(settings, 1)):
        assert knob.words in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert str(caught.value).count("(costs") == 3
