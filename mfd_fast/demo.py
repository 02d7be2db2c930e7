"""The whole way on one machine in minutes: train a teacher, distil it, measure both, write the report."""

from pathlib import Path
from typing import Any

from mfd_fast.config import Settings
from mfd_fast.data import load_dataset
from mfd_fast.distillation import distill
from mfd_fast.evaluation import evaluate_run
from mfd_fast.metrics.digits_features import train_digits_classifier
from mfd_fast.phases import Phases
from mfd_fast.run_folder import RunFolder
from mfd_fast.training.context import make_context
from mfd_fast.training.requirements import check_runner
from mfd_fast.training.teacher import train_teacher


def run_demo(settings: Settings, folder: Path, *, resume: bool, phases: Phases) -> dict[str, Any]:
    """Run all phases into ``folder``; returns the metrics, in the main process.

    With ``resume`` finished phases are neither repeated nor timed: their seconds stay those of the run that did them.
    """
    run = RunFolder(folder)
    context = make_context(settings.run)
    check_runner(settings.distill, context.device)  # before minutes go into the teacher
    run.path.mkdir(parents=True, exist_ok=True)
    run.write_settings(settings)
    with phases.phase("data"):
        dataset = load_dataset(settings.data.name, settings.data.root, **settings.data.options)
        classifier = train_digits_classifier(dataset) if dataset.name == "digits" else None
    if resume and run.has_network("teacher"):
        teacher = run.read_teacher()
    else:
        with phases.phase("teacher"):
            teacher = train_teacher(settings, dataset, run, context, resume=resume and "auto")
    if not (resume and run.has_network("student")):
        with phases.phase("distill"):
            distill(teacher, settings, dataset, run.path, resume=resume and "auto", context=context)
    return evaluate_run(run, settings, dataset, classifier=classifier, phases=phases, context=context)
