"""`mfd-fast export`: the student of a run as files that diffusers loads."""

import argparse
from pathlib import Path

from torch import Tensor

from mfd_fast.run_folder import RunFolder
from mfd_fast.training.checkpoint import latest_checkpoint
from mfd_fast.training.roles import TRAINED


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    export = commands.add_parser("export", help="the student as a LoRA file or a transformer that diffusers loads")
    export.add_argument("folder", metavar="RUN", type=Path, help="run folder with a finished low-rank student")
    export.add_argument("out", metavar="OUT", type=Path, help="a .safetensors file, or a folder")
    export.add_argument(
        "--role",
        choices=TRAINED,
        default="student",
        help="auxiliary: the adapter in the newest checkpoint, for another run to go on with (distill.auxiliary_lora)",
    )
    export.add_argument(
        "--merge-into",
        metavar="PATH",
        type=Path,
        help="pipeline or transformer on disk that the run began from: write the whole transformer, not a LoRA",
    )
    export.set_defaults(run_command=run_export)


def run_export(options: argparse.Namespace) -> int:
    """Write a role's LoRA, or the transformer with the student in its weights."""
    from mfd_fast.models.diffusers_lora import save_merged, write_lora

    run = RunFolder(options.folder)
    description = run.read_description("student")
    lora = description["lora"]
    if lora is None:
        raise ValueError(f"the student of {run.path} has full weights, not low-rank ones: there is no LoRA to export")
    if options.role == "auxiliary":
        if options.merge_into is not None:
            raise ValueError("--merge-into writes a transformer to sample with: leave --role auxiliary out")
        state = auxiliary_weights(run)
    else:
        state = run.read_tensors("student")
    if options.merge_into is None:
        print(f"LoRA in {write_lora(options.out, state, lora['alpha'] / lora['rank'])}")
        return 0
    from mfd_fast.models.sana import SanaRoles, load_transformer

    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"{options.out} exists already: choose another folder")
    transformer = load_transformer(options.merge_into)
    roles = SanaRoles(transformer, rank=lora["rank"], lora_alpha=lora["alpha"], targets=lora["targets"])
    roles.load_state_dict("student", state)
    save_merged(options.out, roles)
    print(f"transformer in {options.out}")
    return 0


def auxiliary_weights(run: RunFolder) -> dict[str, Tensor]:
    """The auxiliary's adapter from the newest whole checkpoint of a run.

    Raises:
        ValueError: there is none, or its auxiliary is none of low rank.
    """
    checkpoint, _ = latest_checkpoint(run.distill_checkpoints())
    state = {} if checkpoint is None else checkpoint.tensors.get("auxiliary", {})
    if not state or not all(name.endswith((".lora_A", ".lora_B")) for name in state):
        raise ValueError(f"{run.distill_checkpoints()} holds no whole checkpoint with a low-rank auxiliary")
    return state
