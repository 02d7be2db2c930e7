"""``mfd-fast checkpoint list|inspect|verify|prune``: what a run can go on from."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from mfd_fast.run_folder import RunFolder

TRAININGS = ("teacher", "distill")


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    checkpoint = commands.add_parser("checkpoint", help="list, inspect, verify or prune the checkpoints of a run")
    actions = checkpoint.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, function, help_text in (
        ("list", run_list, "name, updates and size of each"),
        ("inspect", run_inspect, "what the newest one, or --name, holds"),
        ("verify", run_verify, "compare every file with its hash; exit code 1 if one is damaged"),
        ("prune", run_prune, "delete all but the newest whole ones"),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("folder", metavar="RUN", type=Path, help="run folder")
        action.set_defaults(run_command=function)
        if name == "inspect":
            action.add_argument("--name", metavar="teacher|distill/update-NNNNNN", help="one checkpoint")
        if name == "prune":
            action.add_argument("--keep", type=int, default=1, help="whole ones to keep in each training (default 1)")


def run_list(options: argparse.Namespace) -> int:
    """One line a checkpoint; says nothing about whether it is whole."""
    found = list(_all(options.folder))
    for training, path in found:
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        print(f"{training}/{path.name}  {size / 2**20:.1f} MiB")
    if not found:
        print(f"{options.folder} has no checkpoints")
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    """The groups of tensors and the numbers of one checkpoint, after verifying it."""
    from mfd_fast.training.checkpoint import load_checkpoint

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
    from mfd_fast.training.checkpoint import verify_checkpoint

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


def run_prune(options: argparse.Namespace) -> int:
    """Delete all but the newest whole checkpoints of each training; the last whole one always stays."""
    from mfd_fast.storage import only_writer
    from mfd_fast.training.checkpoint import prune_checkpoints

    run = _run(options.folder)
    with only_writer(run.path):
        for training, folder in _folders(run):
            gone = prune_checkpoints(folder, options.keep)
            print(f"{training}: deleted {', '.join(path.name for path in gone) or 'nothing'}")
    return 0


def _run(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.read_settings()
    return run


def _folders(run: RunFolder) -> Iterator[tuple[str, Path]]:
    yield from zip(TRAININGS, (run.teacher_checkpoints(), run.distill_checkpoints()), strict=True)


def _all(folder: Path) -> Iterator[tuple[str, Path]]:
    from mfd_fast.training.checkpoint import list_checkpoints

    for training, checkpoints in _folders(_run(folder)):
        for path in list_checkpoints(checkpoints):
            yield training, path
