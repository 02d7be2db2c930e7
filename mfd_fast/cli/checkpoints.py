"""``mfd-fast checkpoint list|inspect|verify|evaluate|extract|prune``: what a run can go on from."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mfd_fast.cli.options import add_trust, what_next
from mfd_fast.run_folder import RunFolder
from mfd_fast.storage import only_writer
from mfd_fast.training.checkpoint import list_checkpoints, load_checkpoint, prune_checkpoints, verify_checkpoint

if TYPE_CHECKING:
    from mfd_fast.config import Settings
    from mfd_fast.data.dataset import Dataset

DISTILL = "distill"
TRAININGS = ("teacher", DISTILL)


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    checkpoint = commands.add_parser(
        "checkpoint", help="list, verify, measure, take out or prune the checkpoints of a run"
    )
    actions = checkpoint.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, function: Callable[[argparse.Namespace], int], words: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=words)
        action.add_argument("folder", metavar="RUN", type=Path, help="run folder")
        action.set_defaults(run_command=function)
        return action

    add("list", run_list, "name, size and distance of each")
    inspect = add("inspect", run_inspect, "what the newest one, or --name, holds")
    inspect.add_argument("--name", metavar="teacher|distill/update-NNNNNN", help="one checkpoint")
    add("verify", run_verify, "compare every file with its hash; exit code 1 if one is damaged")
    evaluate = add("evaluate", run_evaluate, "measure the students of all checkpoints that have no distance yet")
    extract = add("extract", run_extract, "write the student of one checkpoint as a run of its own")
    extract.add_argument(
        "out", metavar="OUT", type=Path, help="run folder to make; sample, evaluate and export read it"
    )
    extract.add_argument("--name", metavar="distill/update-NNNNNN", help="checkpoint (default: the best one measured)")
    for action in (evaluate, extract):
        add_trust(action)
    prune = add("prune", run_prune, "delete all but the newest whole ones")
    prune.add_argument("--keep", type=int, default=1, help="whole ones to keep in each training (default 1)")
    prune.add_argument(
        "--keep-best", metavar="N", type=int, default=1, help="keep also the N best measured (default 1)"
    )


def run_list(options: argparse.Namespace) -> int:
    """One line a checkpoint; says nothing about whether it is whole."""
    from mfd_fast.training.scores import read_scores

    scores = read_scores(_run(options.folder).distill_checkpoints())
    found = list(_all(options.folder))
    for training, path in found:
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        score = scores.get(path.name) if training == DISTILL else None
        print(f"{training}/{path.name}  {size / 2**20:.1f} MiB" + (f"  {score.distance:.4f}" if score else ""))
    for how in sorted({score.how for score in scores.values()}):
        print(f"the last column: {how}")
    if not found:
        print(f"{options.folder} has no checkpoints")
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    """The groups of tensors and the numbers of one checkpoint, after verifying it."""
    found = {f"{training}/{path.name}": path for training, path in _all(options.folder)}
    if not found:
        raise ValueError(f"{options.folder} has no checkpoints")
    name = options.name or list(found)[-1]
    if name not in found:
        raise ValueError(f"--name must be one of {', '.join(found)}, got {name!r}")
    checkpoint = load_checkpoint(found[name])
    print(name)
    for group, tensors in checkpoint.tensors.items():
        types = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
        elements = sum(value.numel() for value in tensors.values())
        print(f"  {group}: {len(tensors)} tensors, {elements} elements, {', '.join(types) or 'empty'}")
    print(json.dumps(checkpoint.state, indent=2))
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Exit code 1 if any checkpoint is damaged, or if there is none."""
    checked = damaged = 0
    for training, path in _all(options.folder):
        checked += 1
        try:
            verify_checkpoint(path)
            print(f"{training}/{path.name}: whole")
        except (ValueError, OSError) as error:
            damaged += 1
            print(f"{training}/{path.name}: {error}")
    if not checked:
        print(f"{options.folder} has no checkpoints")
    return int(damaged > 0 or not checked)


def run_evaluate(options: argparse.Namespace) -> int:
    """Measure every whole checkpoint of the distillation that has no distance yet; exit code 1 if none is whole."""
    from mfd_fast.checkpoint_students import make_judge, restore_student
    from mfd_fast.training.scores import read_scores, write_score

    run, settings, dataset = _with_data(options.folder)
    folder, judge, measured = run.distill_checkpoints(), make_judge(settings, dataset), 0
    for path in list_checkpoints(folder):
        score = read_scores(folder).get(path.name)
        if score is None:
            try:
                verify_checkpoint(path)
            except (ValueError, OSError) as error:
                print(f"{DISTILL}/{path.name}: {error}")
                continue
            restored = restore_student(run, path, settings, dataset, trust_code=options.trust_code)
            score = judge(restored.student)
            write_score(path, score)
        measured += 1
        print(f"{DISTILL}/{path.name}: {score.distance:.4f} ({score.how})", flush=True)
    if not measured:
        print(f"{options.folder} has no checkpoint of a distillation to measure")
    return int(not measured)


def run_extract(options: argparse.Namespace) -> int:
    """Write the student of a checkpoint as a run of its own."""
    from mfd_fast.checkpoint_students import restore_student, write_run
    from mfd_fast.training.scores import best_names

    run, settings, dataset = _with_data(options.folder)
    folder = run.distill_checkpoints()
    names = [f"{DISTILL}/{path.name}" for path in list_checkpoints(folder)]
    if options.name is None and not (best := best_names(folder)):
        raise ValueError(f"--name must be one of {', '.join(names) or 'none'}: no checkpoint has been measured")
    name = options.name or f"{DISTILL}/{best[0]}"
    if name not in names:
        raise ValueError(f"--name must be one of {', '.join(names) or 'none'}, got {name!r}")
    restored = restore_student(run, folder / Path(name).name, settings, dataset, trust_code=options.trust_code)
    write_run(run, restored, options.out)
    print(f"student of {name} in {options.out}; {what_next(RunFolder(options.out))}")
    return 0


def run_prune(options: argparse.Namespace) -> int:
    """Delete all but the newest whole checkpoints of each training; the last whole and the best one always stay."""
    from mfd_fast.training.scores import best_names

    if options.keep_best < 1:
        raise ValueError(f"keep_best must be at least 1, got {options.keep_best}")
    run = _run(options.folder)
    with only_writer(run.path):
        for training, folder in _folders(run):
            spared = best_names(folder)[: options.keep_best]
            gone = prune_checkpoints(folder, options.keep, spared=spared)
            print(f"{training}: deleted {', '.join(path.name for path in gone) or 'nothing'}")
    return 0


def _with_data(folder: Path) -> "tuple[RunFolder, Settings, Dataset]":
    from mfd_fast.data import load_dataset

    run = _run(folder)
    settings = run.read_settings()
    return run, settings, load_dataset(settings.data.name, settings.data.root, **settings.data.options)


def _run(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.read_settings()
    return run


def _folders(run: RunFolder) -> Iterator[tuple[str, Path]]:
    yield from zip(TRAININGS, (run.teacher_checkpoints(), run.distill_checkpoints()), strict=True)


def _all(folder: Path) -> Iterator[tuple[str, Path]]:
    for training, checkpoints in _folders(_run(folder)):
        for path in list_checkpoints(checkpoints):
            yield training, path
