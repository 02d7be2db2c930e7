"""Options that several commands share."""

import argparse
import math
import shlex
from dataclasses import replace
from pathlib import Path

from mfd_fast.config import Settings
from mfd_fast.presets import PRESETS
from mfd_fast.run_folder import RunFolder
from mfd_fast.settings_io import CHANGEABLE, load_settings, settings_diff
from mfd_fast.storage import delete_folder
from mfd_fast.training.loop import Resume


def add_settings(parser: argparse.ArgumentParser) -> None:
    """``--preset``, ``--settings``, ``--set``, ``--seed``."""
    parser.add_argument("--preset", metavar="NAME", help=f"settings to start from: {', '.join(PRESETS)}")
    parser.add_argument("--settings", metavar="FILE", type=Path, help="a TOML file with settings, over the preset")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="one setting, over the file; may be repeated (all keys: mfd-fast info --settings)",
    )
    parser.add_argument("--seed", type=int, help="the same as --set run.seed=SEED")


def add_run(parser: argparse.ArgumentParser) -> None:
    """``--run``, ``--resume``, ``--fresh``, ``--time-limit``."""
    parser.add_argument("--run", metavar="FOLDER", type=Path, help="folder of the run (default: runs/PRESET)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        nargs="?",
        const="must",
        choices=("must", "auto"),
        help="go on from the newest whole checkpoint; with auto start where there is none",
    )
    again.add_argument("--fresh", action="store_true", help="delete what the run folder holds and start anew")
    parser.add_argument(
        "--time-limit",
        metavar="TIME",
        type=parse_seconds,
        help="seconds or HH:MM:SS after which to save and stop with exit code 75 (the same as run.max_seconds)",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """``--trust-code``, for commands that build the network of a run."""
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="import and run the factory that the run folder names: only for a run of your own, or one that you trust",
    )


def parse_seconds(text: str) -> float:
    """Seconds as a number, or ``[HH:]MM:SS`` as schedulers write it; above 0."""
    parts = text.split(":")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    seconds: float = sum(value * 60**power for power, value in enumerate(reversed(values)))
    if not 1 <= len(values) <= 3 or not math.isfinite(seconds) or seconds <= 0 or any(value < 0 for value in values):
        raise argparse.ArgumentTypeError(f"expected seconds or HH:MM:SS above 0, got {text!r}")
    return seconds


def resume_choice(options: argparse.Namespace) -> Resume:
    """What ``--resume`` asks for."""
    return "auto" if options.resume == "auto" else options.resume is not None


def read_settings(options: argparse.Namespace) -> Settings:
    """The settings that the options describe."""
    if options.settings is not None and not options.settings.is_file():
        raise FileNotFoundError(f"--settings: there is no file {options.settings}")
    settings = load_settings(options.preset, options.settings, options.set)
    if options.seed is not None:
        settings = replace(settings, run=replace(settings.run, seed=options.seed))
    if options.time_limit is not None:
        settings = replace(settings, run=replace(settings.run, max_seconds=options.time_limit))
    check_names(settings)
    return settings


def check_names(settings: Settings) -> None:
    """Raise ValueError for a model, method, option or solver that does not exist, and for settings that do not fit the
    method, before hours go into what comes first.
    """
    from mfd_fast.models import model_class
    from mfd_fast.models.options import check_options
    from mfd_fast.pipelines import PIPELINES
    from mfd_fast.training.distill import method_from
    from mfd_fast.training.requirements import check_settings

    if settings.model.name not in PIPELINES:
        check_options(settings.model.name, model_class(settings.model.name), settings.model.options)
    check_settings(method_from(settings.distill).needs, settings.distill)


def open_run(options: argparse.Namespace, settings: Settings) -> RunFolder:
    """The run folder, emptied for ``--fresh``.

    Raises:
        ValueError: the folder is of a run with other settings, or ``--fresh`` names a folder that is not a run.
    """
    path: Path = options.run or Path("runs") / settings.preset
    run = RunFolder(path)
    if not path.exists() or not any(path.iterdir()):
        return run
    if not (path / "settings.toml").is_file():
        raise ValueError(f"--run: {path} holds files but is no run folder (no settings.toml); choose another")
    if options.fresh:
        delete_folder(path)
        return run
    started = run.distill_checkpoints().exists()
    if not (started or run.teacher_checkpoints().exists() or run.has_network("teacher")):
        return run
    # A teacher does not depend on how it will be distilled, and neither on how they will be measured.
    free = ("evaluate.",) if started else ("evaluate.", "distill.")
    changed = [
        (key, before, now)
        for key, before, now in settings_diff(run.read_settings(), settings)
        if not key.startswith(free) and key.rpartition(".")[2] not in CHANGEABLE
    ]
    if changed:
        shown = "; ".join(f"{key} was {before!r}, is {now!r}" for key, before, now in changed[:5])
        raise ValueError(
            f"{path} was made with other settings ({shown}): pass --fresh to delete it and start anew, "
            f"or --run to use another folder"
        )
    return run


def what_next(run: RunFolder) -> str:
    """The commands that use the finished student of a run and measure it, as they must be typed for this one."""
    description = run.read_description("student")
    place = shlex.quote(str(run.path))
    if "pipeline" in description["network"]:
        export = f"\nfor diffusers: mfd-fast export {place} lora" if description["lora"] else ""
        return f"try: mfd-fast sample {place} --grid samples.png{export}"
    kind = "out samples.npz" if description["value_range"] is None else "grid samples.png"
    trust = " --trust-code" if "factory" in description["network"] else ""
    return f"try: mfd-fast sample {place} --{kind}{trust}\nmeasure it: mfd-fast evaluate {place}{trust}"
