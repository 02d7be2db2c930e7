"""Rehearsals: every preset passes, and settings that do not fit are found."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mfd_fast.dry_run import UPDATES, rehearse, small_settings, stand_in_data
from mfd_fast.methods import METHODS
from mfd_fast.preset_sources import CODE, HERE, OCCFM, PAPER, SOURCES, source_of
from mfd_fast.presets import PRESETS
from mfd_fast.settings_io import lasting_settings, load_settings


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes(preset: str) -> None:
    if preset.startswith("sana"):
        pytest.importorskip("diffusers")
    settings = load_settings(preset)
    done = rehearse(settings)
    assert (done.student_updates, done.auxiliary_updates) == (UPDATES, UPDATES**2)
    assert done.teacher_updates == (0 if preset.startswith("sana") else UPDATES)
    assert done.parameters < 1_000_000
    assert all(0 < loss < 100 for role, loss in done.losses.items() if role != "student")
    # What makes the structure is the run's own.
    small = small_settings(settings)
    for name in ("method", "roles", "precision", "student_steps", "student_sampler", "guidance_scale", "accumulation"):
        assert getattr(small.distill, name) == getattr(settings.distill, name)
    assert small.distill.student_optimizer == settings.distill.student_optimizer
    assert small.distill.rollout.solver == settings.distill.rollout.solver


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes(method: str) -> None:
    done = rehearse(load_settings("mixture-2d", None, [f"distill.method={method}"]))
    assert done.student_updates == UPDATES
    assert done.auxiliary_updates in (0, UPDATES**2)


def test_settings_that_do_not_fit_are_found() -> None:
    with pytest.raises(ValueError, match="negative condition"):
        rehearse(load_settings("mixture-2d", None, ["distill.guidance_scale=3"]))
    with pytest.raises(ValueError, match="roles to full"):
        rehearse(load_settings("mixture-2d", None, ["distill.method=meanflow", "distill.roles=lora"]))


def test_unknown_data_are_refused() -> None:
    settings = load_settings("mixture-2d")
    with pytest.raises(ValueError, match=r"data\.name: a dry run has stand-ins for digits.*got 'other'"):
        stand_in_data(replace(settings, data=replace(settings.data, name="other")))


def test_stand_ins_have_the_conditions_of_the_data() -> None:
    occupancy = stand_in_data(load_settings("occfm"))
    assert {name: tuple(rows.shape[1:]) for name, rows in occupancy.conditions.items()} == {
        "history": (6, 4, 8, 8),
        "trajectory": (12, 2),
    }
    assert stand_in_data(load_settings("cifar10")).num_classes == 10
    assert stand_in_data(load_settings("cifar10", None, ["data.options.conditional=false"])).num_classes is None


# What the paper (section 5 and appendix) and the released script say, written down a second time.
SAID = {
    ("sana-1600m", PAPER): {
        "student_updates": 3000, "cycle_auxiliary": 10, "cycle_student": 1, "batch_size": 1, "precision": "bfloat16",
        "student_steps": 4, "rollout.step_size": 0.03, "lora_rank": 64, "roles": "lora", "times.law": "logit-normal",
        "student_optimizer.name": "adamw8bit", "student_optimizer.clip_norm": 0.5,
    },
    ("sana-1600m", CODE): {"guidance_scale": 4.5, "student_optimizer.learning_rate": 1e-4, "lora_alpha": 64.0},
    ("sana-1600m-release", CODE): {
        "cycle_auxiliary": 50, "cycle_student": 20, "rollout.step_size": 0.02, "times.law": "uniform",
        "student_optimizer.weight_decay": 1e-4, "student_optimizer.clip_norm": 1.0, "guidance_scale": 4.5,
    },
    ("occfm", PAPER): {
        "cycle_auxiliary": 10, "precision": "float16", "rollout.step_size": 0.02, "student_steps": 1, "batch_size": 8,
        "student_optimizer.name": "adam", "student_optimizer.warmup_updates": 100, "student_optimizer.clip_norm": 1.0,
    },
    ("occfm", OCCFM): {"guidance_scale": 2.0},
    ("occfm", HERE): {"student_optimizer.learning_rate": 1e-5, "ema_decay": 0.999},
}  # fmt: skip


@pytest.mark.parametrize(("preset", "source"), SAID, ids=[f"{preset}: {source}" for preset, source in SAID])
def test_sources_of_the_numbers(preset: str, source: str) -> None:
    values = lasting_settings(load_settings(preset).distill)
    for key, value in SAID[preset, source].items():
        assert values[key] == value, key
        assert source_of(preset, "mfd", f"distill.{key}").startswith(source), key


def test_every_source_is_about_a_setting() -> None:
    known = {f"distill.{key}" for key in lasting_settings(load_settings("demo").distill)}
    for preset, sources in SOURCES.items():
        assert preset in PRESETS
        assert sources.keys() <= known
    assert source_of("demo", "vsd", "distill.times.law") == "vsd's default here"
    assert source_of("demo", "mfd", "distill.ema_decay") == HERE
    assert source_of("demo", "mfd", "distill.lora_rank") == "default"
