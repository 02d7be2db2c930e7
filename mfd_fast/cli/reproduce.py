"""``reproduce``: one experiment of `mfd_fast.experiments`."""

import argparse
from pathlib import Path

from mfd_fast.experiments import EXPERIMENTS


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    reproduce = commands.add_parser("reproduce", help="an experiment: JSON, figure, and a text of what was found")
    reproduce.add_argument("name", metavar="NAME", help=", ".join(EXPERIMENTS))
    reproduce.add_argument("--quick", action="store_true", help="small budgets: a minute or so (table: 15 minutes)")
    reproduce.add_argument(
        "--out", metavar="FOLDER", type=Path, help="default: experiments/NAME, with --quick experiments/NAME-quick"
    )
    reproduce.add_argument("--seeds", metavar="N", type=int, help="how often, with other random numbers")
    reproduce.set_defaults(run_command=run_reproduce)


def run_reproduce(options: argparse.Namespace) -> int:
    """Run the cells that are not finished and print what was found."""
    from mfd_fast.experiments import load_experiment
    from mfd_fast.experiments.running import run_experiment

    experiment = load_experiment(options.name)
    folder: Path = options.out or Path("experiments") / (options.name + ("-quick" if options.quick else ""))
    seeds = experiment.seeds if options.seeds is None else options.seeds
    result = run_experiment(options.name, experiment, folder, quick=options.quick, seeds=seeds)
    print(f"{experiment.summary}\n{result['finding']}\n{folder / 'result.json'}, figure.png, finding.txt")
    return 0
