"""Commands that look at something: info, recommend, doctor."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.cli.options import add_trust
from mfd_fast.npz import as_float32
from mfd_fast.run_folder import RunFolder


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the parser."""
    info = commands.add_parser("info", help="what a run holds, or what can be set")
    info.add_argument("folder", metavar="RUN", type=Path, nargs="?", help="run folder")
    info.add_argument("--settings", action="store_true", help="every setting with type, default and meaning")
    info.add_argument("--presets", action="store_true", help="every preset with what it changes")
    info.add_argument("--methods", action="store_true", help="every method with its options and defaults")
    info.set_defaults(run_command=run_info)

    recommend = commands.add_parser("recommend", help="the solver and step size that suit a run's teacher, by trial")
    recommend.add_argument("folder", metavar="RUN", type=Path, help="run folder with a finished teacher")
    recommend.add_argument("--rows", type=int, default=64, help="rows to try on (default 64)")
    limit = recommend.add_mutually_exclusive_group()
    limit.add_argument("--max-error", type=float, help="cheapest with at most this relative error")
    limit.add_argument("--max-evaluations", type=float, help="most accurate with at most so many evaluations a row")
    add_trust(recommend)
    recommend.set_defaults(run_command=run_recommend)

    doctor = commands.add_parser("doctor", help="what is active on this machine and why not; checks a field of yours")
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    doctor.add_argument("--device", default="cpu", help="where the numeric self-test runs (default cpu)")
    doctor.add_argument("--field", metavar="MODULE:FACTORY", help="check this field's sign and time convention")
    doctor.add_argument("--weights", metavar="FILE", type=Path, help="safetensors with the weights of --field")
    doctor.add_argument(
        "--data",
        default="digits",
        metavar="NAME|FILE",
        help="what the field was trained on: a data set (default digits), or npz with x and an array for each of the "
        "field's conditions, by their names",
    )
    doctor.set_defaults(run_command=run_doctor)


def run_info(options: argparse.Namespace) -> int:
    """Print versions, names and, where asked, settings, presets, methods or the state of a run."""
    from mfd_fast.presets import PRESETS
    from mfd_fast.settings_io import describe_settings

    if options.settings:
        for line in describe_settings():
            print(f"{line.key} = {line.default!r}\n    {line.help} ({line.type})")
    if options.presets:
        for name, values in PRESETS.items():
            print(f"{name}: " + ", ".join(f"{key}={value}" for key, value in values.items()))
    if options.folder is not None:
        _print_run(RunFolder(options.folder))
    if options.methods:
        _print_methods()
    if not (options.settings or options.presets or options.methods or options.folder):
        _print_names()
    return 0


def _print_methods() -> None:
    from mfd_fast.methods import METHODS
    from mfd_fast.methods.base import OWN_OPTIONS
    from mfd_fast.presets import METHOD_DEFAULTS

    for name, method in METHODS.items():
        print(f"{name}: {method.summary}")
        for key, value in METHOD_DEFAULTS.get(name, {}).items():
            print(f"    comes with {key} = {value!r}")
        for line in method.Own.words():
            print(f"    {OWN_OPTIONS}.{line}")


def _print_names() -> None:
    from mfd_fast.data import DATASETS
    from mfd_fast.methods import METHODS
    from mfd_fast.models import MODELS
    from mfd_fast.presets import PRESETS
    from mfd_fast.run_folder import versions
    from mfd_fast.solvers import SOLVERS

    for title, names in (
        ("presets", PRESETS),
        ("methods", METHODS),
        ("solvers", SOLVERS),
        ("models", MODELS),
        ("data", DATASETS),
    ):
        print(f"{title:8} {', '.join(names)}")
    for name, method in METHODS.items():
        print(f"method   {name:9} {method.summary}")
    print("versions " + ", ".join(f"{name} {version}" for name, version in versions().items()))


def _print_run(run: RunFolder) -> None:
    from mfd_fast.storage import read_json
    from mfd_fast.training.checkpoint import list_checkpoints

    settings = run.read_settings()
    print(
        f"{run.path}: preset {settings.preset}, {settings.model.name} on {settings.data.name}, seed {settings.run.seed}"
    )
    for role in ("teacher", "student"):
        begun = f"the pipeline {settings.model.pipeline}" if role == "teacher" and settings.model.pipeline else None
        print(f"{role:8} {begun or ('finished' if run.has_network(role) else 'not finished')}")
    for title, folder in (("teacher", run.teacher_checkpoints()), ("distill", run.distill_checkpoints())):
        names = [path.name for path in list_checkpoints(folder)]
        print(f"checkpoints of {title}: {', '.join(names) or 'none'}")
    if (run.path / "metrics.json").is_file():
        print(json.dumps(read_json(run.path / "metrics.json"), indent=2))


def run_recommend(options: argparse.Namespace) -> int:
    """Try solvers on the run's teacher, with its guidance and its law of intervals."""
    from mfd_fast.data import load_dataset
    from mfd_fast.intervals import sample_pairs
    from mfd_fast.path import interpolate
    from mfd_fast.recommend import option_texts, recommend
    from mfd_fast.streams import make_generator, standard_normal
    from mfd_fast.task import Task
    from mfd_fast.training.teacher import law_from

    if options.rows < 1:
        raise ValueError(f"--rows must be at least 1, got {options.rows}")
    run = RunFolder(options.folder)
    settings = run.read_settings()
    teacher = run.read_teacher(trust_code=options.trust_code)
    dataset = load_dataset(settings.data.name, settings.data.root, **settings.data.options)
    task = Task.from_dataset(dataset, teacher)
    generator = make_generator(settings.run.seed, "recommend")
    index = torch.randint(len(dataset.x), (options.rows,), generator=generator)
    t, r = sample_pairs(law_from(settings.distill.times), options.rows, generator=generator)
    found = recommend(
        teacher,
        interpolate(dataset.x[index], standard_normal((options.rows, *task.sample_shape), generator), t),
        t,
        r,
        max_error=options.max_error,
        max_evaluations=options.max_evaluations,
        condition={name: rows[index] for name, rows in task.conditions.items()},
        negative_condition=task.negative_condition,
        guidance_scale=settings.distill.guidance_scale,
    )
    print(found.table())
    print(f"error of the reference: {found.reference_error:.0e}")
    if found.best is None:
        print("nothing that was tried stays within the limit")
        return 1
    keys = [f"distill.rollout.solver={found.best.solver}"]
    keys += [shlex.quote(f"distill.rollout.{text}") for text in option_texts(found.best.options)]
    keys += ["distill.rollout.step_size=none"] if "rtol" in found.best.options else []
    print("to use it: " + " ".join(f"--set {key}" for key in keys))
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    """Examine the machine, or a field; exit code 1 when something is wrong."""
    from mfd_fast.doctor import as_json, examine, format_checks, self_test
    from mfd_fast.training.context import choose_device

    if options.field is not None:
        return _check_field(options)
    checks = examine() + self_test(choose_device(options.device, "--device"))
    print(as_json(checks) if options.json else format_checks(checks))
    return int(any(check.failed for check in checks))


def _check_field(options: argparse.Namespace) -> int:
    from mfd_fast.field_check import check_field
    from mfd_fast.user_code import load_field

    data, condition = field_data(options.data)
    report = check_field(load_field(options.field, options.weights), data, condition=condition)
    if options.json:
        print(json.dumps({"ok": report.ok, "lines": report.lines, "suggestion": report.suggestion}, indent=2))
    else:
        print("\n".join(report.lines))
    return 0 if report.ok else 1


def field_data(source: str) -> tuple[Tensor, dict[str, Any] | None]:
    """Samples and the field's condition, None where there is none: of a data set by name, or of an npz file.

    In a file, every array beside ``x`` is a keyword argument of the field; ``condition`` goes to it as ``label``, as
    `mfd-fast sample` writes it.
    """
    if not source.endswith(".npz"):
        from mfd_fast.data import load_dataset
        from mfd_fast.data.dataset import all_rows

        dataset = load_dataset(source)
        rows = {name: all_rows(values) for name, values in dataset.conditions.items()}
        condition = rows if dataset.label is None else rows | {"label": dataset.label}
        return all_rows(dataset.x), condition or None
    from mfd_fast.npz import read_arrays

    if not Path(source).is_file():
        raise FileNotFoundError(f"--data: there is no file {source}")
    arrays = read_arrays(Path(source))
    if "x" not in arrays:
        raise ValueError(f"--data: {source} must hold x [N, ...], it holds {', '.join(arrays) or 'nothing'}")
    x = torch.from_numpy(as_float32(arrays.pop("x")))
    condition = {
        name if name != "condition" else "label": _rows_of(source, name, array, len(x))
        for name, array in arrays.items()
    }
    return x, condition or None


def _rows_of(source: str, name: str, array: Any, rows: int) -> Tensor:
    """An array as the field gets it: whole numbers as int64, others as float32; ``condition`` holds labels."""
    whole = array.dtype.kind in "iu"
    if array.shape[:1] != (rows,) or (name == "condition" and (not whole or array.ndim != 1)):
        wanted = f"whole numbers [{rows}]" if name == "condition" else f"[{rows}, ...], a row for each of x"
        raise ValueError(f"--data: {name} in {source} must be {wanted}, got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype("int64") if whole else array if array.dtype == bool else as_float32(array))
