"""Commands that make something: demo, train-teacher, distill, sample, evaluate, report."""

import argparse
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mfd_fast.cli.options import add_run, add_settings, add_trust, open_run, read_settings, resume_choice, what_next
from mfd_fast.cli.pictures import add_picture_options, evaluate_pictures, is_picture_folder
from mfd_fast.cli.pipelines import (
    add_pipeline,
    pipeline_teacher,
    refuse_pipeline,
    run_sample_pipeline,
    with_pipeline,
)
from mfd_fast.phases import Phases
from mfd_fast.run_folder import RunFolder
from mfd_fast.storage import write_json

SAMPLES = 100
"""Samples that ``sample`` draws unless said otherwise."""
YARDSTICKS = {"recorded": "recorded latents", "repeated": "last frame again"}
"""What stands beside teacher and student of forecasts, in words."""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the parser."""
    demo = commands.add_parser("demo", help="the whole way on handwritten digits, in minutes on a CPU")
    add_settings(demo)
    add_run(demo)
    demo.set_defaults(run_command=run_demo)

    teacher = commands.add_parser("train-teacher", help="train a flow-matching teacher")
    add_settings(teacher)
    add_run(teacher)
    teacher.set_defaults(run_command=run_train_teacher)

    _add_distill(commands)
    _add_sample(commands)

    evaluate = commands.add_parser("evaluate", help="measure a finished run again, or any folder of pictures")
    evaluate.add_argument("folder", metavar="FOLDER", type=Path, help="run folder, or folder of pictures")
    add_picture_options(evaluate)
    evaluate.add_argument("--labels", metavar="FOLDER", help="recorded occupancy, in place of evaluate.labels")
    evaluate.add_argument("--occfm-repo", metavar="FOLDER", type=Path, help="your checkout of OccFM, to decode")
    evaluate.add_argument("--occfm-checkpoint", metavar="FILE.ckpt", type=Path, help="its compressor's weights")
    add_trust(evaluate)
    evaluate.set_defaults(run_command=run_evaluate)

    report = commands.add_parser("report", help="write report.html of a run, finished or not")
    report.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    report.set_defaults(run_command=run_report)


def _add_distill(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    distill = commands.add_parser("distill", help="distil the run's teacher, or one of yours, into a student")
    add_settings(distill)
    add_run(distill)
    distill.add_argument(
        "--teacher", metavar="MODULE:FACTORY", help="what builds your teacher, for samples as data.name has them"
    )
    distill.add_argument("--teacher-run", metavar="RUN", type=Path, help="take the finished teacher of another run")
    distill.add_argument("--weights", metavar="FILE", type=Path, help="safetensors with the weights of --teacher")
    add_pipeline(distill)
    for role in ("student", "auxiliary"):
        distill.add_argument(
            f"--{role}-lora",
            metavar="PATH",
            help=f"LoRA the {role} begins from, a file or folder (distill.{role}_lora)",
        )
    distill.add_argument(
        "--zero", metavar="STAGE", type=int, choices=(1, 2, 3), help="share out states, gradients, weights (DeepSpeed)"
    )
    distill.add_argument("--zero-offload", action="store_true", help="with --zero: states in the host's memory")
    distill.add_argument(
        "--dry-run", action="store_true", help="rehearse on a tiny stand-in without data; print plan and estimates"
    )
    add_trust(distill)
    distill.set_defaults(run_command=run_distill)


def _add_sample(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    sample = commands.add_parser("sample", help="generate with a finished student")
    sample.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    sample.add_argument("--num", type=int, help="number of samples (default 100; pipelines: one a prompt, or 36)")
    sample.add_argument("--seed", type=int, default=0, help="of noise and labels (default 0)")
    sample.add_argument("--label", type=int, help="one class for all samples (default: drawn like the data's)")
    sample.add_argument("--out", type=Path, help="npz with x float32 [N, ...] and condition int64 [N]")
    sample.add_argument("--grid", type=Path, help="PNG with all samples side by side")
    sample.add_argument("--images", metavar="FOLDER", type=Path, help="a PNG for each picture (pipelines)")
    sample.add_argument("--prompts", metavar="FILE", type=Path, help="a picture for each prompt: .txt, .jsonl or .tsv")
    add_pipeline(sample)
    sample.add_argument("--device", help="auto (default for pipelines), cpu (default for others), cuda or cuda:N")
    add_trust(sample)
    sample.set_defaults(run_command=run_sample)


def run_demo(options: argparse.Namespace) -> int:
    """Teacher, student, evaluation and report; goes on where an earlier demo of the same settings stopped."""
    from mfd_fast.demo import run_demo as demo

    settings = read_settings(options)
    refuse_pipeline(settings)
    run = open_run(options, settings)
    phases = Phases()
    metrics = demo(settings, run.path, resume=run.path.exists(), phases=phases)
    if metrics:
        finish(run, metrics, phases)
    return 0


def is_finished(run: RunFolder, network: str, checkpoints: Path, options: argparse.Namespace) -> bool:
    """Whether the run has this network already, which is said.

    Raises:
        ValueError: there are checkpoints of it, and not ``--resume``.
    """
    if run.has_network(network):
        print(f"{run.path} already has its {network}; --fresh starts anew")
        return True
    if checkpoints.exists() and not options.resume:
        raise ValueError(f"{run.path} holds an unfinished {network}: pass --resume to go on or --fresh to start anew")
    return False


def run_train_teacher(options: argparse.Namespace) -> int:
    """Train the teacher of a run."""
    from mfd_fast.data import load_dataset
    from mfd_fast.training.context import make_context
    from mfd_fast.training.teacher import train_teacher

    settings = read_settings(options)
    refuse_pipeline(settings)
    run = open_run(options, settings)
    if is_finished(run, "teacher", run.teacher_checkpoints(), options):
        return 0
    context = make_context(settings.run)
    dataset = load_dataset(settings.data.name, settings.data.root, **settings.data.options)
    run.write_settings(settings)
    train_teacher(settings, dataset, run, context, resume=resume_choice(options))
    if context.world.is_main:
        place = shlex.quote(str(run.path))
        print(
            f"teacher in {run.path / 'teacher.safetensors'}; next: mfd-fast distill, the same settings, --run {place}"
        )
    return 0


def run_distill(options: argparse.Namespace) -> int:
    """Distil the teacher of the run, or the user's own."""
    from mfd_fast.data import load_dataset
    from mfd_fast.distillation import distill
    from mfd_fast.training.context import make_context
    from mfd_fast.training.starts import check_adapters
    from mfd_fast.user_code import load_teacher

    if options.weights is not None and options.teacher is None:
        raise ValueError("--weights belongs to --teacher; without it the teacher of the run is used")
    if options.teacher is not None and options.teacher_run is not None:
        raise ValueError("--teacher and --teacher-run: give one of them")
    if options.zero is not None:
        options.set.append(f"distill.zero_stage={options.zero}")
    if options.zero_offload:
        options.set.append("distill.zero_offload=true")
    for role in ("student", "auxiliary"):
        if (path := getattr(options, f"{role}_lora")) is not None:
            options.set.append(f"distill.{role}_lora={path}")
    if options.dry_run:
        return dry_run(options)
    settings = with_pipeline(read_settings(options), options.pipeline)
    if settings.model.pipeline is not None and (options.teacher or options.teacher_run):
        raise ValueError("--pipeline is the teacher: leave --teacher and --teacher-run out")
    run = open_run(options, settings)
    if is_finished(run, "student", run.distill_checkpoints(), options):
        return 0
    if not options.resume:
        check_adapters(settings.distill)  # before a large pipeline is loaded
    context = make_context(settings.run)
    dataset = load_dataset(settings.data.name, settings.data.root, **settings.data.options)
    data: Any = dataset
    factory = options.teacher
    if settings.model.pipeline is not None:
        teacher, data = pipeline_teacher(settings, dataset, context.device, download=options.download)
    elif options.teacher is not None:
        teacher = load_teacher(options.teacher, options.weights)
    else:
        source = run if options.teacher_run is None else RunFolder(options.teacher_run)
        if not source.has_network("teacher"):
            raise ValueError(
                f"{source.path} has no teacher yet: train one there (mfd-fast train-teacher), or give --teacher, "
                f"--teacher-run or --pipeline"
            )
        teacher = source.read_teacher(trust_code=options.trust_code)
        factory = source.read_description("teacher").get("factory")
    distill(teacher, settings, data, run.path, resume=resume_choice(options), factory=factory, context=context)
    if context.world.is_main:
        print(f"student in {run.path / 'student.safetensors'}; {what_next(run)}")
    return 0


def dry_run(options: argparse.Namespace) -> int:
    """``distill --dry-run``: nothing of the run folder is read or written."""
    from mfd_fast.cli.dry_run import run_dry
    from mfd_fast.training.interrupts import Interrupted

    if options.teacher is not None:
        raise ValueError("--dry-run rehearses with a stand-in of model.name: leave --teacher out")
    try:
        return run_dry(read_settings(options))
    except Interrupted as stop:  # there is nothing to go on from
        raise KeyboardInterrupt from stop


def run_sample(options: argparse.Namespace) -> int:
    """Samples of a finished student as npz, as a picture, or both."""
    from mfd_fast.evaluation import write_samples
    from mfd_fast.finished import load_student
    from mfd_fast.training.context import choose_device

    if options.out is None and options.grid is None and options.images is None:
        raise ValueError("nothing to write: give --out samples.npz, --grid samples.png, or --images FOLDER")
    if options.num is not None and options.num < 1:
        raise ValueError(f"--num must be at least 1, got {options.num}")
    run = RunFolder(options.folder)
    if "pipeline" in run.read_description("student")["network"]:
        return run_sample_pipeline(options)
    given = [f"--{name}" for name in ("pipeline", "prompts", "images") if getattr(options, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: this student does not come from a pipeline")
    options.num = SAMPLES if options.num is None else options.num
    device = str(choose_device(options.device or "cpu", "--device"))
    student = load_student(run.path, device=device, trust_code=options.trust_code)
    value_range = run.read_description("student")["value_range"]
    if options.grid is not None and value_range is None:
        raise ValueError("--grid: the samples of this student are no pictures; use --out")
    condition = (
        _held_out_conditions(run, student.condition_names, options.num)
        if student.condition_names
        else student.draw_condition(options.num, options.seed)
    )
    if options.label is not None:
        classes = len(student.label_counts or ())
        if not 0 <= options.label < classes:
            raise ValueError(
                f"--label must lie in [0, {classes}), got {options.label}"
                if classes
                else "--label: this student has no classes"
            )
        condition = {"label": torch.full((options.num,), options.label)}
    x = student.sample(options.num, condition, options.seed)
    if options.out is not None:
        write_samples(options.out, x, condition.get("label"))
        print(f"{len(x)} samples in {options.out}")
    if options.grid is not None:
        from mfd_fast.report import save_image_grid

        save_image_grid(options.grid, x, value_range=tuple(value_range))
        print(f"picture in {options.grid}")
    return 0


def _held_out_conditions(run: RunFolder, names: tuple[str, ...], count: int) -> dict[str, torch.Tensor]:
    """``count`` rows of the run's held-out conditions from the first on, beginning again at their end."""
    from mfd_fast.data import load_dataset

    settings = run.read_settings()
    dataset = load_dataset(settings.data.name, settings.data.root, **settings.data.options)
    lacking = [name for name in names if name not in dataset.held_out_conditions]
    if lacking:
        raise ValueError(f"the student needs {', '.join(lacking)}, which the data {settings.data.name!r} do not have")
    return {name: dataset.held_out_conditions[name][torch.arange(count) % len(dataset.held_out_x)] for name in names}


def run_evaluate(options: argparse.Namespace) -> int:
    """Measure teacher and student of a run again, or a folder of pictures."""
    if is_picture_folder(options):
        return evaluate_pictures(options)
    from mfd_fast.data import load_dataset
    from mfd_fast.data.dataset import NoSamples
    from mfd_fast.evaluation import evaluate_run
    from mfd_fast.training.context import make_context

    run = RunFolder(options.folder)
    settings = run.read_settings()
    if (options.occfm_repo is None) != (options.occfm_checkpoint is None):
        raise ValueError("--occfm-repo and --occfm-checkpoint belong together: the decoder's code and its weights")
    if options.labels is not None:
        settings = replace(settings, evaluate=replace(settings.evaluate, labels=options.labels))
    dataset = load_dataset(settings.data.name, settings.data.root, **settings.data.options)
    if isinstance(dataset.x, NoSamples):
        raise ValueError("evaluate compares with samples, and prompts have none: look at pictures, mfd-fast sample")
    context = make_context(settings.run)
    decoder = None
    if options.occfm_repo is not None:
        from mfd_fast.occfm_repo import load_decoder

        decoder = load_decoder(options.occfm_repo, options.occfm_checkpoint, dataset.sample_shape[1], context.device)
    phases = Phases()
    metrics = evaluate_run(
        run,
        settings,
        dataset,
        decoder=decoder,
        phases=phases,
        context=context,
        trust_code=options.trust_code,
    )
    if metrics:
        finish(run, metrics, phases)
    return 0


def run_report(options: argparse.Namespace) -> int:
    """Write the report of what a run folder holds."""
    from mfd_fast.report import write_report

    RunFolder(options.folder).read_settings()
    print(f"report in {write_report(options.folder)}")
    return 0


def finish(run: RunFolder, metrics: Mapping[str, Any], phases: Phases) -> None:
    """Say what came out, write the report, and add its time to the metrics."""
    from mfd_fast.report import write_report

    for line in _result_lines(metrics):
        print(line, flush=True)
    try:
        with phases.phase("report"):
            report = write_report(run.path)
    except ModuleNotFoundError as error:  # the numbers are there, in metrics.json too
        raise ModuleNotFoundError(f"{error}; then: mfd-fast report {shlex.quote(str(run.path))}") from error
    merged = dict(metrics)
    merged["seconds"] = metrics["seconds"] | {"report": phases.seconds["report"]}
    merged["cpu_seconds"] = metrics["cpu_seconds"] | {"report": phases.cpu_seconds["report"]}
    write_json(run.path / "metrics.json", merged)
    print(f"report: {report}")


def _result_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, one line for each role and number of steps."""
    if "occupancy" in metrics:
        for row in metrics["occupancy"]["rows"]:
            steps = f"{row['steps']:>4} step{'s' if row['steps'] != 1 else ' '}" if row["steps"] else ""
            name = f"{YARDSTICKS.get(row['role'], row['role']):8} {steps}"
            if "mean_iou" in row:
                yield f"{name:19}  IoU {row['mean_iou']:5.2f}  mIoU {row['mean_miou']:5.2f}"
            else:
                yield f"{name:19}  distance of latents {row['mean_latent_rms']:.3f}"
        if metrics["occupancy"]["scored"] == "latents":
            yield "latents were compared: IoU needs --labels, and to decode them --occfm-repo with --occfm-checkpoint"
        return
    for role in ("teacher", "student"):
        for steps, distance in sorted(metrics[role].items(), key=lambda item: int(item[0])):
            yield f"{role:8} {steps:>4} step{'s' if steps != '1' else ' '}  {metrics['distance']} {distance:.3f}"
    yield f"real data, half against half: {metrics['data_half_half']:.3f}"
