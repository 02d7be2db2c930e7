"""Where the numbers of a preset come from: a paper, somebody's released code, or a choice made here."""

from mfd_fast.presets import METHOD_DEFAULTS, PRESETS

PAPER = "MFD's paper"
CODE = "MFD's released script"
OCCFM = "OccFM's files"
HERE = "chosen here"
BOTH = ("student_optimizer", "auxiliary_optimizer")


def _of_both(**sources: str) -> dict[str, str]:
    """The same for the optimisers of both roles."""
    return {f"distill.{role}.{key}": source for role in BOTH for key, source in sources.items()}


_SANA = {
    "distill.student_updates": f"{PAPER} (its steps, counted as the student's)",
    "distill.cycle_auxiliary": PAPER,
    "distill.cycle_student": PAPER,
    "distill.batch_size": PAPER,
    "distill.precision": PAPER,
    "distill.student_steps": PAPER,
    "distill.student_sampler": f"{CODE} (SANA's scheduler)",
    "distill.student_shift": "SANA's scheduler",
    "distill.guidance_scale": f"{CODE}; not in the paper",
    "distill.rollout.step_size": PAPER,
    "distill.rollout.solver": CODE,
    "distill.roles": PAPER,
    "distill.lora_rank": PAPER,
    "distill.lora_alpha": CODE,
    "distill.lora_targets": CODE,
    "distill.times.law": f"{PAPER}, without its parameters",
    "distill.auxiliary_times.law": f"{PAPER}, without its parameters",
    **_of_both(
        name=PAPER,
        learning_rate=f"{CODE}; not in the paper",
        weight_decay="AdamW's default, as the paper says",
        clip_norm=PAPER,
    ),
}
_SANA_RELEASE = {key: CODE for key in _SANA} | {
    "distill.student_updates": f"{CODE} (30000 updates of both roles, 20 of 70 the student's)",
    "distill.batch_size": f"{CODE} (one on each of eight GPUs)",
    "distill.student_sampler": f"{CODE} (SANA's scheduler)",
    "distill.student_shift": "SANA's scheduler",
}
_SANA_LARGER = _SANA | {"distill.batch_size": HERE}
_OCCFM = {
    "distill.student_updates": f"{PAPER} (30 epochs of about 28 thousand, over both roles)",
    "distill.cycle_auxiliary": PAPER,
    "distill.cycle_student": PAPER,
    "distill.batch_size": f"{PAPER} (one on each of eight GPUs)",
    "distill.precision": PAPER,
    "distill.student_steps": PAPER,
    "distill.guidance_scale": f"{OCCFM}; not in the paper",
    "distill.rollout.step_size": f"{PAPER}, as the largest step of an adaptive solver",
    "distill.rollout.solver": f"{CODE}; the paper says adaptive",
    "distill.roles": PAPER,
    "distill.times.law": f"{PAPER}, without its parameters",
    "distill.auxiliary_times.law": f"{PAPER}, without its parameters",
    **_of_both(name=PAPER, learning_rate=f"{HERE}; not in the paper", warmup_updates=PAPER, clip_norm=PAPER),
}
_CIFAR10 = {
    "distill.cycle_auxiliary": f"{PAPER}, of its other settings",
    "distill.cycle_student": f"{PAPER}, of its other settings",
    "distill.student_steps": PAPER,
    "distill.rollout.step_size": f"{PAPER}, of occupancy",
    "distill.times.law": f"{PAPER}, of its other settings",
}
SOURCES: dict[str, dict[str, str]] = {
    "cifar10": _CIFAR10,
    "sana-1600m": _SANA,
    "sana-1600m-release": _SANA_RELEASE,
    "sana-1600m-24gb": _SANA_LARGER,
    "sana-1600m-96gb": _SANA_LARGER,
    **{name: _OCCFM for name in ("occfm", "occfm-8x3090", "occfm-fut", "occfm-4c", "occfm-8c", "occfm-64c")},
}
"""By preset and dotted key. A preset's key that is not here was chosen here."""


def source_of(preset: str, method: str, key: str) -> str:
    """The source of a setting ``key`` that has the value of its preset or its method."""
    known = SOURCES.get(preset, {})
    if key in known:
        return known[key]
    if key in PRESETS[preset]:
        return HERE
    return f"{method}'s default here" if key in METHOD_DEFAULTS.get(method, {}) else "default"
