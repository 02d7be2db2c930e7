"""The command that says what a run will need: estimate."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from mfd_fast.config import PRECISION
from mfd_fast.estimate.duration import GPUS
from mfd_fast.estimate.knobs import SHARED_BITS
from mfd_fast.estimate.plan import Plan
from mfd_fast.estimate.report import Estimate

NO_FIT = 1
CHECKPOINTING = ("none", "steps", "blocks", "both")
SUBJECT_NAMES = ("sana-1600m", "occfm")


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    command = commands.add_parser("estimate", help="memory and time of a distillation before it runs")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--preset", metavar="NAME", help="settings to start from")
    what.add_argument("--model", choices=SUBJECT_NAMES, help="a known network, with the preset of its name")
    command.add_argument("--settings", metavar="FILE", type=Path, help="a TOML file with settings, over the preset")
    command.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="one setting; may be repeated")
    command.add_argument("--gpu", choices=tuple(GPUS), default="rtx-3090", help="for times and memory (rtx-3090)")
    command.add_argument("--gpu-memory", metavar="GIB", type=float, help="memory of one GPU, if not that of --gpu")
    command.add_argument("--gpus", metavar="N", type=int, default=1, help="processes, one for each GPU (default 1)")
    command.add_argument("--zero", metavar="STAGE", type=int, choices=(0, 1, 2, 3), help="stage of ZeRO, 0 for none")
    command.add_argument("--offload", action="store_true", default=None, help="states in the host's memory (ZeRO)")
    command.add_argument(
        "--optimizer-bits", type=int, choices=(8, 32), help="bits of the moments (8 with ZeRO is arithmetic)"
    )
    command.add_argument("--batch-size", metavar="B", type=int, help="samples of one GPU in one backward pass")
    command.add_argument(
        "--checkpointing",
        nargs="?",
        const="both",
        choices=CHECKPOINTING,
        help="what is computed again in the backward pass (alone: both)",
    )
    command.add_argument("--precision", choices=PRECISION.choices, help="precision of the networks")
    command.add_argument("--auxiliary", choices=("full", "lora"), help="how the auxiliary is trained")
    command.add_argument("--student", choices=("full", "lora"), help="how the student is trained")
    command.add_argument("--json", action="store_true", help="machine-readable, sizes in bytes")
    command.set_defaults(run_command=run_estimate)


def run_estimate(options: argparse.Namespace) -> int:
    """Print the estimate; exit code 1 where it does not fit."""
    from mfd_fast.estimate.plan import plan_from_settings
    from mfd_fast.estimate.report import as_json, estimate, format_estimate
    from mfd_fast.estimate.subjects import describe_network
    from mfd_fast.settings_io import load_settings

    for name in ("gpus", "gpu_memory", "batch_size"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if options.settings is not None and not options.settings.is_file():
        raise FileNotFoundError(f"--settings: there is no file {options.settings}")
    settings = load_settings(options.preset or options.model, options.settings, options.set)
    distill = settings.distill
    if options.batch_size is not None:  # in place of the settings' batch, which need not be divisible then
        distill = replace(distill, batch_size=options.batch_size * options.gpus * distill.accumulation)
    plan = plan_from_settings(distill, options.gpus)
    plan = changed_plan(plan, options)
    lora = "lora" in (plan.auxiliary, plan.student)
    network = describe_network(settings, lora=lora, precision=plan.precision)
    found = estimate(plan, network, GPUS[options.gpu], options.gpu_memory)
    if options.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        print(f"on {options.gpus} {GPUS[options.gpu].title} (others: --gpu):")
        print("\n".join([format_estimate(found), *whole_run(found, distill.student_updates)]))
    return 0 if found.fits else NO_FIT


def whole_run(found: Estimate, student_updates: int) -> list[str]:
    """The model's time for all updates as a line of text; none where there is no time."""
    if not found.times:
        return []
    hours = list(found.times.values())[-1] * student_updates / 3600
    return [f"all {student_updates:,} student updates: {hours:.3g} h by that model"]


def changed_plan(plan: Plan, options: argparse.Namespace) -> Plan:
    """The plan with what the command line says.

    Raises:
        ValueError: options that do not fit each other.
    """
    given = {
        "zero": options.zero,
        "offload": options.offload,
        "optimizer_bits": options.optimizer_bits,
        "precision": options.precision,
        "student": options.student,
        "auxiliary": options.auxiliary if plan.auxiliary else None,
    }
    if options.checkpointing is not None:
        given |= {
            "recompute_steps": options.checkpointing in ("steps", "both"),
            "recompute_blocks": options.checkpointing in ("blocks", "both"),
        }
    plan = replace(plan, **{name: value for name, value in given.items() if value is not None})
    if options.auxiliary is not None and plan.auxiliary is None:
        raise ValueError("--auxiliary: this method has none")
    if plan.offload and not plan.zero:
        if options.zero == 0:
            raise ValueError("--offload needs --zero 1, 2 or 3")
        plan = replace(plan, zero=2)
    # Presets with moments of 8 bits mean adapters; a full role is given them only when asked for.
    whole = "full" in (options.auxiliary, options.student)
    if options.optimizer_bits is None and (whole or (plan.zero and plan.full_roles)):
        plan = replace(plan, optimizer_bits=SHARED_BITS)
    return plan
