"""Runs an experiment cell by cell into a folder; writes ``result.json``, ``figure.png`` and ``finding.txt`` there."""

import io
import platform
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mfd_fast.experiments.base import Experiment, Result, Results, Work
from mfd_fast.report.theme import LIGHT, drawing_style
from mfd_fast.run_folder import versions
from mfd_fast.storage import only_writer, read_json, write_file, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = 64
"""Of a figure's file."""


def run_experiment(name: str, experiment: Experiment[Any], folder: Path, *, quick: bool, seeds: int) -> Result:
    """Compute what is not there yet, seed by seed; returns what ``result.json`` holds.

    Raises:
        ValueError: ``seeds`` is below 1, or the folder holds cells of other settings or another version.
        RuntimeError: another process is at work in the folder.
    """
    from tqdm import tqdm

    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")
    settings = experiment.quick if quick else experiment.full
    names = list(experiment.cells(settings))
    identity = {"experiment": name, "settings": _as_json(settings), "versions": _versions()}
    results: dict[str, list[Result]] = {cell: [] for cell in names}
    seconds = 0.0
    with only_writer(folder), tqdm(total=seeds * len(names), unit="cell", dynamic_ncols=True, disable=None) as bar:
        for seed in range(seeds):
            done: dict[str, Result] = {}
            for cell in names:
                words = f"{name} {cell}" + (f", seed {seed}" if seeds > 1 else "")
                bar.set_description(words)
                if bar.disable:  # not on a terminal
                    print(words, flush=True)
                kept = _cell(experiment, settings, cell, Work(seed, folder / f"seed-{seed}", done), identity)
                done[cell] = kept["result"]
                results[cell].append(kept["result"])
                seconds += kept["seconds"]
                bar.update()
        machine = {"processor": platform.machine(), "threads": torch.get_num_threads()}
        result = {
            **identity,
            "quick": quick,
            "seeds": seeds,
            "machine": machine,
            "seconds": round(seconds, 1),
            "finding": finding_of(experiment, results, folder),
            "cells": results,
        }
        write_results(experiment, results, result, folder)
    return result


def finding_of(experiment: Experiment[Any], results: Results, folder: Path) -> str:
    """The text about the results; ValueError if what was kept of them in ``folder`` is not what a cell finds."""
    try:
        return experiment.finding(results)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"the results kept in {folder} are damaged ({error!r:.200}): delete {folder}/seed-* to compute them again"
        ) from error


def write_results(experiment: Experiment[Any], results: Results, result: Result, folder: Path) -> None:
    """The three files of a finished experiment."""
    with drawing_style(LIGHT):
        figure = experiment.figure(results, LIGHT)
        write_file(folder / "figure.png", partial(_write_png, figure))
    write_text(folder / "finding.txt", result["finding"] + "\n")
    write_json(folder / "result.json", result)


def _write_png(figure: "Figure", path: Path) -> None:
    """A PNG of few colours, so that results can be kept under version control."""
    from PIL import Image

    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=110, facecolor="white")
    Image.open(full).convert("RGB").quantize(COLOURS).save(path, format="PNG", optimize=True)


def _cell(experiment: Experiment[Any], settings: Any, cell: str, work: Work, identity: Result) -> Result:
    """The kept result of a cell, or a new one."""
    path = work.folder / f"{cell}.json"
    if path.is_file():
        kept = read_json(path)
        if not isinstance(kept, dict) or kept.get("identity") != identity:
            raise ValueError(f"{path} is of other settings or another version: give another folder with --out")
        if not isinstance(kept.get("result"), dict) or type(kept.get("seconds")) not in (int, float):
            raise ValueError(f"{path} holds no result: delete it to compute it again")
        return kept
    work.folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    result = experiment.run(settings, cell, work)
    new = {"identity": identity, "seconds": round(time.perf_counter() - began, 2), "result": result}
    write_json(path, new)
    return new


def _as_json(settings: Any) -> Result:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}


def _versions() -> dict[str, str]:
    known = versions()
    return {name: known[name] for name in ("mfd_fast", "torch") if name in known}
