"""Presets: named settings that runs start from."""

from typing import Any

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
}
# fmt: on
