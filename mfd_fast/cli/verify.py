"""`mfd-fast verify-data`: whether encoded prompts and converted latents are as they were written."""

import argparse
from pathlib import Path


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    verify = commands.add_parser("verify-data", help="whether encoded prompts or converted latents are undamaged")
    verify.add_argument(
        "folders", metavar="FOLDER", type=Path, nargs="+", help="what encode-prompts or convert-occfm made"
    )
    verify.set_defaults(run_command=run_verify)


def run_verify(options: argparse.Namespace) -> int:
    """Exit code 1 if a file is damaged."""
    from tqdm import tqdm

    from mfd_fast.data.verify import damaged_files, prepared_folders, recorded_digests

    digests: dict[Path, str] = {}
    for given in options.folders:
        for folder in prepared_folders(given):
            digests |= recorded_digests(folder)
    with tqdm(total=len(digests), desc="files", disable=None) as bar:
        damaged = damaged_files(digests, lambda path: bar.update())
    for path, reason in damaged.items():
        print(f"{path}: {reason}; copy or make it again")
    print(f"{len(digests) - len(damaged)} of {len(digests)} files are as they were written")
    return int(bool(damaged))
