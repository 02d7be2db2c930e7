"""Commands for OccFM: make-occupancy-toy, convert-occfm, import-occfm."""

import argparse
from pathlib import Path

from mfd_fast.cli.options import add_run, add_settings, open_run, read_settings


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the parser."""
    toy = commands.add_parser("make-occupancy-toy", help="moving boxes on a small grid, in the files OccFM releases")
    toy.add_argument("out", metavar="FOLDER", type=Path, help="folder to make")
    toy.add_argument("--seed", type=int, default=0, help="of the scenes (default 0)")
    toy.set_defaults(run_command=run_make_toy)

    convert = commands.add_parser("convert-occfm", help="OccFM's cached latents, once, into files that run nothing")
    convert.add_argument("latents", metavar="LATENTS.pkl", type=Path, help="nus_sem_occ_training.pkl, or the like")
    convert.add_argument("--infos", metavar="INFOS.pkl", type=Path, required=True, help="the infos of the same split")
    convert.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="such as data/occfm/training")
    convert.set_defaults(run_command=run_convert)

    teacher = commands.add_parser("import-occfm", help="a released OccFM checkpoint as the teacher of a run")
    teacher.add_argument("checkpoint", metavar="FILE.ckpt", type=Path, help="checkpoint of OccFM")
    teacher.add_argument(
        "--section", choices=("ema_model", "state_dict"), help="weights to take (default: averaged ones if there are)"
    )
    add_settings(teacher)
    add_run(teacher)
    teacher.set_defaults(run_command=run_import)


def run_make_toy(options: argparse.Namespace) -> int:
    """Write the toy set."""
    from mfd_fast.data.occupancy.toy import write_release

    write_release(options.out, options.seed)
    print(f"toy set in {options.out}; next: mfd-fast convert-occfm, for each split")
    return 0


def run_convert(options: argparse.Namespace) -> int:
    """Convert one split."""
    from mfd_fast.data.occupancy.convert import convert

    done = convert(options.latents, options.infos, options.out)
    print(f"{done.frames} frames of {done.scenes} scenes in {options.out} ({done.files} file(s))")
    if done.repeated:
        print(f"{done.repeated} entries repeated a frame; the first entry of each was taken")
    if done.unlisted:
        print(f"{done.unlisted} frames were left out: {options.infos} does not list them")
    if done.lacking:
        print(f"{done.lacking} frames of {options.infos} have no latents; as in OccFM, windows pass over such gaps")
    return 0


def run_import(options: argparse.Namespace) -> int:
    """Write the teacher of a run from a checkpoint, of the size that the run's data have."""
    from mfd_fast.data import load_dataset
    from mfd_fast.models import describe_model
    from mfd_fast.models.occfm import OccupancyVelocity, load_transition_weights
    from mfd_fast.run_folder import build_from_settings

    settings = read_settings(options)
    run = open_run(options, settings)
    if run.has_network("teacher"):
        raise ValueError(f"{run.path} already has its teacher; --fresh starts anew, --run takes another folder")
    dataset = load_dataset(settings.data.name, settings.data.root, **settings.data.options)
    network = build_from_settings(settings, dataset.sample_shape, dataset.num_classes)
    if not isinstance(network, OccupancyVelocity):
        raise ValueError(f"model.name must be 'occfm' for a checkpoint of OccFM, got {settings.model.name!r}")
    report = load_transition_weights(network.network, options.checkpoint, options.section)
    run.write_settings(settings)
    run.write_network("teacher", dict(network.state_dict()), describe_model(network))
    where = f" ({report.section})" if report.section else ""
    print(f"teacher in {run.path / 'teacher.safetensors'}, from {options.checkpoint}{where}")
    if report.left_over:
        parts = sorted({name.partition(".")[0] for name in report.left_over})
        print(f"left over: {len(report.left_over)} tensors of other parts ({', '.join(parts)})")
    return 0
