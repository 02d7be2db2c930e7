"""``mfd-fast evaluate`` for a folder of pictures."""

import argparse
import sys
from pathlib import Path

from mfd_fast.storage import write_json

PICTURE_OPTIONS = ("metrics", "prompts", "reference", "models", "download", "out", "batch_size", "device")


def add_picture_options(command: argparse.ArgumentParser) -> None:
    """The options that only a folder of pictures has."""
    group = command.add_argument_group("a folder of pictures (png, jpg, webp) in place of a run")
    group.add_argument(
        "--metrics",
        metavar="NAME[=MODEL],...",
        help="clip, pickscore, hpsv2, imagereward, aesthetic, dinov2, inception; MODEL: another folder or hub id",
    )
    group.add_argument(
        "--prompts", metavar="FILE", type=Path, help="a line a picture, or JSONL (default: FOLDER/prompts.txt, .jsonl)"
    )
    group.add_argument(
        "--reference", metavar="FOLDER", type=Path, help="pictures to compare with, for dinov2, inception"
    )
    group.add_argument("--models", metavar="FOLDER", type=Path, help="weights, in a folder named as its metric")
    group.add_argument("--download", action="store_true", help="fetch weights that are not on this machine")
    group.add_argument("--out", metavar="FILE", type=Path, help="JSON with all scores (default: FOLDER/metrics.json)")
    group.add_argument("--batch-size", metavar="N", type=int, help="pictures at a time (default 16)")
    group.add_argument("--device", help="cpu, cuda, cuda:N or auto (default)")


def is_picture_folder(options: argparse.Namespace) -> bool:
    """Whether ``evaluate`` was given pictures; ValueError for options that do not fit what it was given."""
    from mfd_fast.metrics.image_folder import list_pictures

    given = [name for name in PICTURE_OPTIONS if getattr(options, name)]
    if (options.folder / "settings.toml").is_file():
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is for a folder of pictures, {options.folder} is a run")
        return False
    pictures = bool(given) or (options.folder.is_dir() and bool(list_pictures(options.folder)))
    for name in ("labels", "occfm_repo", "occfm_checkpoint"):
        if pictures and getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} is for a run, {options.folder} is a folder of pictures")
    return pictures


def evaluate_pictures(options: argparse.Namespace) -> int:
    """Measure the pictures of a folder; prints a table and writes all scores as JSON."""
    from mfd_fast.metrics.image_report import image_report, table
    from mfd_fast.metrics.model_sources import HUB, Source, find_source
    from mfd_fast.training.context import choose_device

    if not options.metrics:
        raise ValueError(f"--metrics: name what to measure of {options.folder}: any of {', '.join(HUB)}")
    sources: dict[str, Source] = {}
    for part in options.metrics.split(","):
        name, _, chosen = part.strip().partition("=")
        if name not in HUB:
            raise ValueError(f"--metrics: expected any of {', '.join(HUB)}, got {name!r}")
        if name in sources:
            raise ValueError(f"--metrics: {name} is named twice")
        sources[name] = find_source(name, options.models, chosen or None, download=options.download)
    out = options.out or options.folder / "metrics.json"
    if out.is_dir():
        raise ValueError(f"--out: expected a file, {out} is a folder")
    report = image_report(
        options.folder,
        sources,
        prompts=options.prompts,
        reference=options.reference,
        batch_size=16 if options.batch_size is None else options.batch_size,
        device=choose_device(options.device or "auto", "--device"),
    )
    write_json(out, report)
    for line in table(report):
        print(line)
    left_out = len(report["broken"]) + len(report["broken_reference"])
    if left_out:
        print(f"mfd-fast evaluate: {left_out} broken pictures were left out (named above)", file=sys.stderr)
    print(f"scores of every picture: {out}")
    return 0
