import ast
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import mfd_fast.config
from mfd_fast.config import (
    DataSettings,
    DistillSettings,
    Field,
    ModelSettings,
    OptimizerSettings,
    Option,
    RolloutSettings,
    RunSettings,
    Section,
    Settings,
    TeacherSettings,
    TimeSettings,
)
from mfd_fast.data import DATASETS
from mfd_fast.models import build_model
from mfd_fast.pipelines import PIPELINES
from mfd_fast.presets import PRESETS
from mfd_fast.settings_io import describe_settings, from_toml, load_settings, settings_diff, to_toml
from mfd_fast.solvers import SOLVERS


def refusal(*overrides: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load_settings(overrides=overrides)
    return str(caught.value)


def test_config_imports_nothing_of_the_package() -> None:
    tree = ast.parse(Path(mfd_fast.config.__file__).read_text(encoding="utf-8"))
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert "dataclasses" in imported
    assert [name for name in imported if name.split(".")[0] not in sys.stdlib_module_names] == []


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Settings(), "preset", "other")  # noqa: B010 - a plain assignment would not type-check


def test_defaults_are_not_shared() -> None:
    Settings().model.options["width"] = 1
    Settings().evaluate.teacher_steps.append(7)
    assert Settings().model.options == {}
    assert Settings().evaluate.teacher_steps == [1, 10, 100]


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_loads_and_round_trips(preset: str) -> None:
    settings = load_settings(preset)
    assert settings.preset == preset
    assert from_toml(to_toml(settings)) == settings
    assert {key for key, _, _ in settings_diff(Settings(preset=preset), settings)} <= set(PRESETS[preset])


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_names_things_that_exist(preset: str) -> None:
    settings = load_settings(preset)
    assert settings.data.name in DATASETS
    assert settings.distill.rollout.solver in SOLVERS
    if settings.model.name in PIPELINES:
        return
    shapes = {"digits": (1, 8, 8), "mixture-2d": (2,), "cifar10": (3, 32, 32)}
    shapes |= {"occupancy": (6, 16, 50, 50), "occupancy-toy": (3, 4, 12, 12)}
    shape = shapes[settings.data.name]
    classes = None if settings.model.name == "occfm" else 10
    with torch.device("meta"):
        model = build_model(settings.model.name, shape, classes, **settings.model.options)
    assert model.sample_shape == shape
    if preset == "cifar10":
        assert 38e6 < sum(parameter.numel() for parameter in model.parameters()) < 46e6


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        (OptimizerSettings, {"learning_rate": 0}, "optimizer.learning_rate must be float, above 0; got 0"),
        (OptimizerSettings, {"beta1": 1.0}, "optimizer.beta1 must be float, at least 0 and below 1; got 1.0"),
        (OptimizerSettings, {"eps": float("nan")}, "optimizer.eps must be float, above 0; got nan"),
        (OptimizerSettings, {"clip_norm": -1.0}, "optimizer.clip_norm must be float or none, above 0; got -1.0"),
        (OptimizerSettings, {"warmup_updates": -1}, "optimizer.warmup_updates must be int, at least 0; got -1"),
        (OptimizerSettings, {"final_fraction": 1.1}, "optimizer.final_fraction must be float, from 0 to 1; got 1.1"),
        (TimeSettings, {"std": 0.0}, "time.std must be float, above 0; got 0.0"),
        (TimeSettings, {"shift": float("inf")}, "time.shift must be float, above 0; got inf"),
        (TimeSettings, {"low": 0.5, "high": 0.5}, "time.low must be below high = 0.5; got 0.5"),
        (RolloutSettings, {"steps": 4}, "rollout.steps = 4 needs step_size = none; got step_size = 0.02"),
        (RolloutSettings, {"step_size": None, "steps": 0}, "rollout.steps must be int or none, at least 1; got 0"),
        (RolloutSettings, {"solver": ""}, "rollout.solver must be text, not empty; got ''"),
        (TeacherSettings, {"batch_size": True}, "teacher.batch_size must be int, at least 1; got True"),
        (TeacherSettings, {"batch_size": 2.0}, "teacher.batch_size must be int, at least 1; got 2.0"),
        (TeacherSettings, {"times": 3}, "teacher.times must be a TimeSettings; got 3"),
        (DistillSettings, {"grad_steps": 2}, "distill.grad_steps must be none or at most student_steps = 1; got 2"),
        (DistillSettings, {"lora_targets": ["a", ""]}, "distill.lora_targets must be list of text, not empty"),
        (DistillSettings, {"lora_targets": ["a", 1]}, "distill.lora_targets must be list of text, not empty"),
        (DistillSettings, {"method": None}, "distill.method must be text, not empty; got None"),
        (RunSettings, {"tensorboard": 1}, "run.tensorboard must be bool (true or false); got 1"),
        (ModelSettings, {"options": {"width": {"a": 1}}}, "model.options must be table of numbers"),
        (ModelSettings, {"options": {1: 2}}, "model.options must be table of numbers"),
        (DataSettings, {"options": {"scale": None}}, "data.options must be table of numbers"),
    ],
)
def test_section_refuses(section: type[Section], values: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=r"\.") as caught:
        section(**values)
    assert str(caught.value).startswith(expected)


def test_int_becomes_float_and_none_text_becomes_none() -> None:
    settings = OptimizerSettings(learning_rate=1)
    assert type(settings.learning_rate) is float
    assert DataSettings(root="none").root is None
    assert RolloutSettings(step_size=None, steps=4).steps == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distill.step_sise=3", "unknown setting 'distill.step_sise'; did you mean 'distill.rollout.step_size'?"),
        ("distil.batch_size=3", "unknown setting 'distil.batch_size'; did you mean 'distill.batch_size'?"),
        ("steps=3", "unknown setting 'steps'; did you mean 'distill.rollout.steps'?"),
        ("model.optoins.width=3", "unknown setting 'model.optoins.width'; did you mean 'model.options.width'?"),
        ("zzz=3", "unknown setting 'zzz'; `mfd-fast info --settings` lists all of them"),
        ("distill=3", "'distill' is a section; set a key in it, such as 'distill.method'"),
        ("distill.batch_size", "a setting must be given as key=value; got 'distill.batch_size'"),
        ("=3", "a setting must be given as key=value; got '=3'"),
        ("preset=cifar10", "preset is chosen by its own argument, not as a setting; got 'preset=cifar10'"),
        (
            "distill.precision=bf16",
            "distill.precision must be one of 'float32', 'bfloat16', 'float16'; got 'bf16' (did you mean 'bfloat16'?)",
        ),
        (
            "distill.student_optimizer.name=adamW",
            "distill.student_optimizer.name must be one of 'adam', 'adamw', 'adamw8bit'; got 'adamW' "
            "(did you mean 'adamw'?)",
        ),
        (
            "distill.auxiliary_optimizer.learning_rate=-1",
            "distill.auxiliary_optimizer.learning_rate must be float, above 0; got -1",
        ),
        ("teacher.times.std=0", "teacher.times.std must be float, above 0; got 0"),
        ("distill.times.low=1.0", "distill.times.low must be below high = 1.0; got 1.0"),
        ("run.seed=true", "run.seed must be int, at least 0; got True"),
        ("run.seed=2020-01-01", "run.seed must be int, at least 0; got datetime.date(2020, 1, 1)"),
        ("run.tensorboard=True", "run.tensorboard must be bool (true or false); got 'True'"),
        ("run.seed=none", "run.seed must be int, at least 0; got 'none'"),
        ("evaluate.teacher_steps=[1, true]", "evaluate.teacher_steps must be list of int, at least 1; got [1, True]"),
        ("evaluate.teacher_steps=[1, 0]", "evaluate.teacher_steps must be list of int, at least 1; got [1, 0]"),
        ("model.options=3", "model.options must be table of numbers, bools, texts or lists of them; got 3"),
    ],
    ids=lambda text: text if "=" in text and " " not in text else "",
)
def test_override_refused(override: str, expected: str) -> None:
    assert refusal(override) == expected


def test_step_size_with_steps_names_the_full_keys() -> None:
    assert refusal("distill.rollout.steps=4").startswith("distill.rollout.steps = 4 needs step_size = none")
    rollout = load_settings(overrides=["distill.rollout.steps=4", "distill.rollout.step_size=none"]).distill.rollout
    assert (rollout.steps, rollout.step_size) == (4, None)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("teacher.optimizer.learning_rate=1e-3", 1e-3),
        ("teacher.optimizer.learning_rate = 2", 2.0),
        ("run.threads=none", None),
        ("run.threads=2", 2),
        ("run.tensorboard=false", False),
        ("run.device=cuda:1", "cuda:1"),
        ('run.device="cpu"', "cpu"),
        ("data.root=2024", "2024"),
        ("data.root=/a/b=c # d", "/a/b=c # d"),
        ("distill.lora_targets=['to_q', 'to_k']", ["to_q", "to_k"]),
        ("evaluate.teacher_steps=[]", []),
        ("model.options={width = 8, act = 'silu'}", {"width": 8, "act": "silu"}),
    ],
)
def test_override_value(override: str, value: object) -> None:
    key = override.partition("=")[0].strip()
    node: object = load_settings(overrides=[override])
    for name in key.split("."):
        node = getattr(node, name)
    assert node == value
    assert type(node) is type(value)


def test_override_of_several_lines_is_one_text() -> None:
    assert load_settings(overrides=["run.device='a'\nother = 1"]).run.device == "'a'\nother = 1"


def test_last_override_wins() -> None:
    assert load_settings(overrides=["run.seed=1", "run.seed=2"]).run.seed == 2


def test_options_merge_by_override_and_drop_with_the_name() -> None:
    base = dict(PRESETS["demo"]["model.options"])
    assert load_settings(overrides=["model.options.depth=9"]).model.options == {**base, "depth": 9}
    assert load_settings(overrides=["model.options.depth=9", "model.name=dit"]).model.options == {"depth": 9}
    assert load_settings(overrides=["model.name=mlp"]).model.options == base
    assert PRESETS["demo"]["model.options"] == base


def test_file_is_between_preset_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'preset = "mixture-2d"\n[run]\nseed = 5\nthreads = "none"\n[model.options]\nwidth = 16\n'
        "[distill]\n[distill.rollout]\nstep_size = 1\nsolver = 'ab2'\n",
        encoding="utf-8",
    )
    settings = load_settings(file=file, overrides=["distill.rollout.solver=heun"])
    assert settings.preset == "mixture-2d"
    assert settings.teacher.updates == PRESETS["mixture-2d"]["teacher.updates"]
    assert settings.run == RunSettings(seed=5)
    assert settings.model.options == {"width": 16}
    assert (settings.distill.rollout.step_size, settings.distill.rollout.solver) == (1.0, "heun")
    assert load_settings("mixture-2d", file).run.seed == 5
    with pytest.raises(ValueError, match=r"preset 'demo' was asked for, but .*mine.toml says preset = 'mixture-2d'"):
        load_settings("demo", file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[run]\nseed = \n", r"bad\.toml: Invalid value \(at line 2, column 8\)"),
        ("[distil]\n", r"bad\.toml: unknown setting 'distil'"),
        ("[distill]\nbatchsize = 3\n", r"bad\.toml: unknown setting 'distill\.batchsize'; .* 'distill\.batch_size'"),
        ("distill = 3\n", r"bad\.toml: 'distill' is a section"),
        ("[distill.batch_size]\nx = 1\n", r"bad\.toml: unknown setting 'distill\.batch_size\.x'"),
        ("preset = 'cifar'\n", r"preset must be one of .*; got 'cifar' \(did you mean 'cifar10'\?\)"),
        ("preset = ['demo']\n", r"preset must be one of .*; got \['demo'\]"),
        ("[run]\nseed = -1\n", r"run\.seed must be int, at least 0; got -1"),
    ],
    ids=["syntax", "section", "key", "scalar-section", "deep", "preset", "preset-type", "value"],
)
def test_bad_file_refused(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=expected):
        load_settings(file=file)


def test_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bytes\.toml: not a UTF-8 text"):
        load_settings(file=tmp_path / "bytes.toml")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_settings(file=tmp_path / "missing.toml")


def test_unknown_preset_refused() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of 'demo', .*; got 'dmeo' \(did you mean 'demo'\?\)"):
        load_settings("dmeo")


scalar = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
option = scalar | st.lists(scalar | st.lists(scalar, max_size=3), max_size=3)


@hypothesis_settings(deadline=None)
@given(
    options=st.dictionaries(st.text(), option, max_size=3),
    root=st.none() | st.text(min_size=1),
    steps=st.lists(st.integers(1, 10**9)),
    learning_rate=st.floats(0, exclude_min=True, allow_infinity=False),
)
def test_toml_round_trip(options: dict[str, Option], root: str | None, steps: list[int], learning_rate: float) -> None:
    settings = Settings(
        preset="my own",
        model=ModelSettings(name="own", options=options),
        data=DataSettings(root=root),
        teacher=TeacherSettings(optimizer=OptimizerSettings(learning_rate=learning_rate, clip_norm=None)),
        evaluate=mfd_fast.config.EvaluateSettings(teacher_steps=steps),
    )
    again = from_toml(to_toml(settings))
    assert again == settings
    # Equality cannot see 1 == 1.0 == True inside the options.
    assert repr(again.model.options) == repr(settings.model.options)


def test_from_toml_fills_in_defaults_of_the_dataclasses() -> None:
    assert from_toml("[run]\nseed = 3\n") == Settings(run=RunSettings(seed=3))
    with pytest.raises(ValueError, match=r"settings: .*line 1"):
        from_toml("run = = 3")


def test_settings_diff_names_what_differs() -> None:
    a = load_settings()
    b = load_settings(overrides=["run.seed=3", "model.options.width=8"])
    assert settings_diff(a, a) == []
    assert settings_diff(a, b) == [
        ("model.options", {"width": 256, "depth": 3}, {"width": 8, "depth": 3}),
        ("run.seed", 0, 3),
    ]


def test_every_setting_is_described() -> None:
    lines = {line.key: line for line in describe_settings()}
    assert lines["distill.rollout.step_size"][1:3] == ("float or none, above 0", 0.02)
    assert lines["distill.roles"].type == "one of 'full', 'lora', 'lora-student'"
    assert lines["evaluate.teacher_steps"].default == [1, 10, 100]
    assert len(lines) == len(describe_settings()) > 80
    assert [line.key for line in lines.values() if not line.help or "\n" in line.help or len(line.help) > 90] == []


def test_every_default_passes_its_own_rule() -> None:
    for item in dataclasses.fields(DistillSettings):
        declared = Field.of(item.type)
        assert declared.accept(getattr(DistillSettings(), item.name)) == getattr(DistillSettings(), item.name)


def test_a_method_brings_settings_that_lie_below_everything_else(tmp_path: Path) -> None:
    assert load_settings().distill.cycle_auxiliary == 10
    chosen = load_settings(overrides=["distill.method=dmd2"]).distill
    assert (chosen.cycle_auxiliary, chosen.student_gamma, chosen.times.law) == (5, 1.0, "uniform")
    over = load_settings(overrides=["distill.method=dmd2", "distill.cycle_auxiliary=7"]).distill
    assert (over.cycle_auxiliary, over.student_gamma) == (7, 1.0)
    file = tmp_path / "run.toml"
    file.write_text('[distill]\nmethod = "dmd2"\ncycle_auxiliary = 3\n[distill.method_options]\ngan_weight = 0.5\n')
    assert load_settings(file=file).distill.cycle_auxiliary == 3
    assert load_settings(file=file).distill.method_options == {"gan_weight": 0.5}
    other = load_settings(file=file, overrides=["distill.method=vsd"]).distill
    assert other.method_options == {}, "another method has other options"
    assert other.student_gamma == 0.0


def test_options_of_a_method_survive_toml() -> None:
    overrides = ["distill.method=senseflow", "distill.method_options.guidance_range=[2.0, 8.0]", "run.seed=4"]
    settings = load_settings(overrides=overrides)
    assert settings.distill.method_options == {"guidance_range": [2.0, 8.0]}
    assert from_toml(to_toml(settings)) == settings
