"""The public names: a change here is a change for everybody who uses the package."""

import inspect

import mfd_fast

NAMES = [
    "PairStats",
    "Recommendation",
    "RolloutStats",
    "SharedBackbone",
    "Status",
    "Student",
    "Task",
    "VelocityField",
    "WarmupReport",
    "distill",
    "integrate",
    "load_settings",
    "load_student",
    "mean_velocity",
    "mean_velocity_pair",
    "recommend",
    "warmup",
]
INTEGRATION = [
    "step_size",
    "steps",
    "solver",
    "rtol",
    "atol",
    "max_evaluations",
    "max_rows",
    "condition",
    "negative_condition",
    "guidance_scale",
    "guidance_interval",
    "negative_every",
    "field_dtype",
    "runner",
    "differentiable",
    "return_stats",
    "check_finite",
]


def test_names() -> None:
    public = [
        name for name, value in vars(mfd_fast).items() if not name.startswith("_") and not inspect.ismodule(value)
    ]
    assert sorted(public) == NAMES


def test_every_name_is_documented() -> None:
    for name in NAMES:
        if name != "VelocityField":  # an alias of a callable
            assert inspect.getdoc(getattr(mfd_fast, name)), name


def test_arguments_of_the_integrations() -> None:
    for function, first, last in (
        (mfd_fast.mean_velocity, ["field"], []),
        (mfd_fast.integrate, ["field"], []),
        (mfd_fast.mean_velocity_pair, ["teacher", "auxiliary"], ["auxiliary_solver", "auxiliary_step_size"]),
    ):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == [*first, "x", "t", "r", *INTEGRATION, *last]
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in [*INTEGRATION, *last])
        defaults = {name: parameters[name].default for name in INTEGRATION if parameters[name].default is not None}
        assert defaults == {
            "solver": "euler",
            "guidance_scale": 1.0,
            "negative_every": 1,
            "runner": "auto",
            "differentiable": False,
            "return_stats": False,
            "check_finite": True,
        }


def test_arguments_are_documented() -> None:
    text = inspect.getdoc(mfd_fast.mean_velocity) or ""
    assert [name for name in ["field", "x", "t", "r", *INTEGRATION] if f"\n    {name}: " not in text] == []


def test_version() -> None:
    major, minor, patch = mfd_fast.__version__.split(".")
    assert (major + minor + patch).isdigit()
