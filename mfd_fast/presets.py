"""Presets: named settings that runs start from; and the settings that come with a method of distillation."""

from typing import Any

# OccFM's configurations differ in the channels of their latents, the visible history and the poses they look at.
# What its files say: guidance 2, shift 3, ten steps, 20 % of the histories dropped, and for the teacher 200 epochs with
# four samples on a card, here on eight; nuScenes' 28130 training frames in 700 scenes are 20430 windows of twelve. What
# MFD's paper says: Adam, warm-up of 100, clipping at 1, float16, eight samples per update, step size 0.02, 30 epochs of
# about 28 thousand, counted here over both roles. The learning rates are not in the paper.
# fmt: off
_OCCFM: dict[str, Any] = {
    "data.name": "occupancy",               "data.root": "data/occfm",      "model.name": "occfm",
    "teacher.updates": 128_000,             "teacher.batch_size": 32,       "teacher.condition_dropout": 0.2,
    "teacher.ema_decay": 0.9999,            "teacher.precision": "float16", "teacher.checkpoint_every": 5000,
    "teacher.optimizer.learning_rate": 6.4e-4,                              "teacher.optimizer.weight_decay": 0.01,
    "teacher.optimizer.warmup_updates": 1000,                               "teacher.optimizer.clip_norm": 5.0,
    "teacher.optimizer.schedule": "cosine", "teacher.optimizer.final_fraction": 0.2,
    "distill.student_updates": 9500,        "distill.batch_size": 8,        "distill.guidance_scale": 2.0,
    "distill.rollout.step_size": 0.02,      "distill.precision": "float16", "distill.ema_decay": 0.999,
    "distill.student_optimizer.name": "adam",                   "distill.auxiliary_optimizer.name": "adam",
    "distill.student_optimizer.learning_rate": 1e-5,            "distill.auxiliary_optimizer.learning_rate": 5e-5,
    "distill.student_optimizer.warmup_updates": 100,            "distill.auxiliary_optimizer.warmup_updates": 100,
    "evaluate.teacher_steps": [1, 2, 5, 10],                    "evaluate.teacher_shift": 3.0,
    "evaluate.teacher_guidance_scale": 2.0, "evaluate.batch_size": 1,
}
# fmt: on


# SANA 1.6B: what the paper says, with the guidance and learning rates of the released script, which it leaves open.
# Its "steps" are counted as updates of the student; the released script's count both roles: 30000 * 20 / 70.
# fmt: off
_SANA: dict[str, Any] = {
    "model.name": "sana",                   "data.name": "prompts",         "data.root": "data/prompts",
    "distill.student_updates": 3000,        "distill.cycle_auxiliary": 10,  "distill.cycle_student": 1,
    "distill.batch_size": 1,                "distill.sample_rows": 8,       "distill.precision": "bfloat16",
    "distill.student_steps": 4,             "distill.student_sampler": "dpm++",         "distill.student_shift": 3.0,
    "distill.guidance_scale": 4.5,          "distill.rollout.step_size": 0.03,          "distill.roles": "lora",
    "distill.lora_rank": 64,                "distill.lora_alpha": 64.0,
    "distill.lora_targets": ["to_q", "to_k", "to_v"],           "distill.recompute_steps": True,
    "distill.sample_every": 250,            "distill.checkpoint_every": 250,            "evaluate.num_samples": 36,
    **{f"distill.{role}_optimizer.{key}": value for role in ("student", "auxiliary") for key, value in {
        "name": "adamw8bit", "learning_rate": 1e-4, "weight_decay": 0.01, "clip_norm": 0.5,
    }.items()},
}
_SANA_RELEASE: dict[str, Any] = _SANA | {
    "distill.student_updates": 8571,        "distill.cycle_auxiliary": 50,  "distill.cycle_student": 20,
    "distill.batch_size": 8,                "distill.rollout.step_size": 0.02,
    "distill.times.law": "uniform",         "distill.auxiliary_times.law": "uniform",   "run.seed": 42,
    **{f"distill.{role}_optimizer.{key}": value for role in ("student", "auxiliary") for key, value in {
        "weight_decay": 1e-4, "clip_norm": 1.0,
    }.items()},
}
# fmt: on


def _occfm(history_last: int, trajectory_length: int, **data: int) -> dict[str, Any]:
    data = {"history": 6, "future": 6, "history_last": history_last, **data}
    return _OCCFM | {"data.options": data, "model.options": {"trajectory_length": trajectory_length}}


# One row a preset: dotted keys that differ from the defaults above.
# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "data.name": "digits",              "model.name": "mlp",            "model.options": {"width": 256, "depth": 3},
        "teacher.updates": 3000,            "teacher.batch_size": 256,      "teacher.optimizer.schedule": "cosine",
        "teacher.optimizer.learning_rate": 4e-3,                            "teacher.optimizer.warmup_updates": 100,
        "distill.student_updates": 1300,    "distill.batch_size": 128,      "distill.rollout.step_size": 0.05,
        "distill.ema_decay": 0.995,         "distill.sample_every": 100,    "distill.checkpoint_every": 200,
        "distill.student_optimizer.learning_rate": 2e-3,          "distill.student_optimizer.schedule": "cosine",
        "distill.student_optimizer.warmup_updates": 20,           "distill.auxiliary_optimizer.schedule": "cosine",
        "distill.auxiliary_optimizer.learning_rate": 3e-3,        "run.threads": 1,
    },
    "digits-dit": {
        "data.name": "digits",              "model.name": "dit",
        "model.options": {"width": 96, "depth": 4, "heads": 4},
        "teacher.updates": 6000,            "teacher.batch_size": 256,      "teacher.optimizer.schedule": "cosine",
        "distill.student_updates": 1500,    "distill.batch_size": 128,      "distill.rollout.step_size": 0.05,
        "distill.student_optimizer.learning_rate": 1e-4,
        "distill.auxiliary_optimizer.learning_rate": 3e-4,
    },
    "mixture-2d": {
        "data.name": "mixture-2d",          "model.name": "mlp",            "model.options": {"width": 128, "depth": 3},
        "teacher.updates": 800,             "teacher.batch_size": 512,      "teacher.optimizer.schedule": "cosine",
        "distill.student_updates": 400,     "distill.batch_size": 256,      "distill.rollout.step_size": 0.05,
        "distill.student_optimizer.learning_rate": 5e-4,
    },
    "cifar10": {
        "data.name": "cifar10",             "model.name": "unet",           "model.options": {},
        "teacher.updates": 400_000,         "teacher.batch_size": 128,      "teacher.ema_decay": 0.9999,
        "teacher.precision": "bfloat16",    "teacher.checkpoint_every": 10_000,
        "teacher.optimizer.learning_rate": 2e-4,                            "teacher.optimizer.warmup_updates": 5000,
        "distill.student_updates": 10_000,  "distill.batch_size": 128,      "distill.rollout.step_size": 0.02,
        "distill.precision": "bfloat16",    "distill.ema_decay": 0.999,     "distill.checkpoint_every": 1000,
        "distill.student_optimizer.learning_rate": 1e-5,
        "distill.student_optimizer.warmup_updates": 100,
        "distill.auxiliary_optimizer.learning_rate": 5e-5,
        "evaluate.num_samples": 50_000,     "evaluate.batch_size": 500,
    },
    "sana-1600m": _SANA,
    "sana-1600m-release": _SANA_RELEASE,
    # Larger batches than the paper's, as far as the memory of one GPU goes by `mfd-fast estimate`.
    "sana-1600m-24gb": _SANA | {"distill.batch_size": 4},
    "sana-1600m-96gb": _SANA | {"distill.batch_size": 8, "distill.sample_rows": 16},
    "occfm": _occfm(history_last=4, trajectory_length=6),
    # As in the paper: eight cards with one sample each, every process with whole networks (docs/zero.md says why).
    "occfm-8x3090": _occfm(history_last=4, trajectory_length=6) | {
        "run.device": "cuda",               "distill.zero_stage": 0,
        "distill.student_optimizer.clip_norm": 1.0,             "distill.auxiliary_optimizer.clip_norm": 1.0,
    },
    "occfm-fut": _occfm(history_last=4, trajectory_length=12),
    # 4, 8 and 64 channels have one configuration, and show the whole history.
    "occfm-4c": _occfm(history_last=6, trajectory_length=6, channels=4),
    "occfm-8c": _occfm(history_last=6, trajectory_length=6, channels=8),
    "occfm-64c": _occfm(history_last=6, trajectory_length=6, channels=64),
    "occfm-toy": {
        "data.name": "occupancy-toy",       "model.name": "occfm",
        "model.options": {
            "model_channels": 16, "init_3d_conv_channels": 8, "channel_multi": [2, 4], "init_kernel_size": 3,
            "attn_dim": 4, "temporal_attn_head": 8, "spatial_attn_head": 1,
        },
        "teacher.updates": 600,             "teacher.batch_size": 8,        "teacher.optimizer.schedule": "cosine",
        "teacher.optimizer.learning_rate": 8e-3,                            "teacher.optimizer.warmup_updates": 30,
        "teacher.ema_decay": 0.98,          "teacher.condition_dropout": 0.0,
        "distill.student_updates": 220,     "distill.cycle_auxiliary": 5,   "distill.batch_size": 8,
        "distill.rollout.step_size": 0.1,   "distill.ema_decay": 0.9,       "distill.checkpoint_every": 30,
        "distill.student_optimizer.learning_rate": 6e-3,          "distill.student_optimizer.schedule": "cosine",
        "distill.student_optimizer.warmup_updates": 10,           "distill.auxiliary_optimizer.schedule": "cosine",
        "distill.auxiliary_optimizer.learning_rate": 8e-3,        "distill.log_every": 3,
        "evaluate.num_samples": 112,        "evaluate.teacher_steps": [1, 2, 5, 10],
        "evaluate.teacher_shift": 3.0,      "evaluate.batch_size": 28,      "run.threads": 2,
    },
}

METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "vsd":       {"distill.times.law": "uniform",   "distill.times.low": 0.02,      "distill.times.high": 0.98},
    "dmd2":      {"distill.times.law": "uniform",   "distill.times.low": 0.02,      "distill.times.high": 0.98,
                  "distill.cycle_auxiliary": 5,     "distill.student_gamma": 1.0},
    "senseflow": {"distill.times.law": "uniform",   "distill.times.low": 0.02,      "distill.times.high": 0.98,
                  "distill.cycle_auxiliary": 5,     "distill.student_gamma": 1.0},
    # The first step starts at t = 1, whose bin a logit-normal time hardly ever falls into.
    "cd":        {"distill.times.law": "uniform",   "distill.student_gamma": 1.0},
    "meanflow":  {"distill.times.law": "uniform",   "distill.times.equal_share": 0.25},
    "reflow":    {"distill.times.law": "uniform"},
}
"""By method the settings, dotted keys, that differ from the defaults; a preset, a file and ``--set`` lie above them."""
# fmt: on
