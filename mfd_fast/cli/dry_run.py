"""``distill --dry-run``: a rehearsal on stand-ins, the plan of the run, and what it will need."""

from collections.abc import Iterator
from typing import Any

from mfd_fast.cli.estimate import whole_run
from mfd_fast.config import DistillSettings, Settings
from mfd_fast.dry_run import Rehearsal, rehearse
from mfd_fast.estimate.duration import GPUS
from mfd_fast.estimate.plan import Plan, plan_from_settings
from mfd_fast.methods import METHODS
from mfd_fast.preset_sources import SOURCES, source_of
from mfd_fast.settings_io import lasting_settings, load_settings

GPU = "rtx-3090"


def run_dry(settings: Settings) -> int:
    """Rehearse and print; nothing is left on the disk."""
    plan = plan_from_settings(settings.distill, 1)
    rehearsal = rehearse(settings)
    print("\n".join([*_rehearsed(settings, rehearsal), "", *_plan(settings.distill, plan), "", *_sources(settings)]))
    print("\n".join(["", *_estimate(settings, plan)]), flush=True)
    return 0


def _rehearsed(settings: Settings, done: Rehearsal) -> Iterator[str]:
    distilling = settings.distill
    yield f"preset {settings.preset}, method {distilling.method}: {METHODS[distilling.method].summary}"
    losses = ", ".join(f"{role} {value:.3g}" for role, value in done.losses.items())
    yield (
        f"rehearsed on the CPU in {done.seconds:.1f} s: {settings.model.name} of {done.parameters:,} parameters, "
        f"samples {list(done.sample_shape)}; updates: {done.teacher_updates} of the teacher, {done.auxiliary_updates} "
        f"of the auxiliary, {done.student_updates} of the student; last losses: {losses}; samples are finite"
    )


def _plan(settings: DistillSettings, plan: Plan) -> Iterator[str]:
    """What the run does, a line a topic."""
    kinds = {"lora": f"LoRA of rank {settings.lora_rank} on the frozen teacher", "full": "a whole copy"}
    auxiliary = f"auxiliary: {kinds[plan.auxiliary]}" if plan.auxiliary else "no auxiliary"
    yield f"roles    student: {kinds[plan.student]}; {auxiliary}; networks in {settings.precision}"
    cycles = settings.student_updates / plan.cycle_student * plan.cycle_auxiliary
    yield (
        f"updates  {settings.student_updates:,} of the student, {round(cycles):,} of the auxiliary "
        f"({plan.cycle_auxiliary} before every {plan.cycle_student})"
    )
    yield f"batch    {settings.batch_size} sample(s) in {settings.accumulation} backward pass(es) of {plan.rows}"
    between = ", fresh noise between them" if settings.student_gamma and settings.student_steps > 1 else ""
    sampler = f"{settings.student_sampler}, shift {settings.student_shift:g}"
    yield f"student  {settings.student_steps} step(s) by {sampler}{between}"
    rollout, counts = settings.rollout, plan.evaluations
    if counts.teacher is None or counts.auxiliary is None:
        yield f"solver   {rollout.solver}, adaptive: it decides how often it evaluates"
        return
    steps = f"{rollout.steps} steps" if rollout.steps else f"step size {rollout.step_size:g}"
    guided = f", each twice for guidance {settings.guidance_scale:g}" if plan.guided else ""
    yield (
        f"solver   {rollout.solver}, {steps}; for the pairs (t, r) of the settings {counts.teacher:.1f} evaluations of "
        f"the teacher{guided} and {counts.auxiliary:.1f} of the auxiliary for a sample of a rollout"
    )


def _sources(settings: Settings) -> list[str]:
    """Every setting of the distillation that is no default, or whose source is known, with that source."""
    now, usual = _flat(settings), _flat(Settings())
    preset = _flat(load_settings(settings.preset, None, [f"distill.method={settings.distill.method}"]))
    known = SOURCES.get(settings.preset, {})
    rows = [
        (key, str(value), source_of(settings.preset, settings.distill.method, key) if value == preset[key] else "given")
        for key, value in now.items()
        if value != usual[key] or key in known
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else [0, 0]
    return [f"{key:<{widths[0]}}  {value:<{widths[1]}}  {source}" for key, value, source in rows]


def _flat(settings: Settings) -> dict[str, Any]:
    return {f"distill.{key}": value for key, value in lasting_settings(settings.distill).items()}


def _estimate(settings: Settings, plan: Plan) -> Iterator[str]:
    from mfd_fast.estimate.report import estimate, format_estimate
    from mfd_fast.estimate.subjects import describe_network

    lora = "lora" in (plan.auxiliary, plan.student)
    found = estimate(plan, describe_network(settings, lora=lora, precision=plan.precision), GPUS[GPU])
    yield f"on one {GPU} (others: mfd-fast estimate --help):"
    yield format_estimate(found)
    yield from whole_run(found, settings.distill.student_updates)
