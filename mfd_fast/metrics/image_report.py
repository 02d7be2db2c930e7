"""What a folder of pictures is worth: scores of every picture, and distances to a folder of reference pictures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.metrics.frechet import frechet_distance, half_half_distance
from mfd_fast.metrics.image_folder import (
    Pictures,
    check_pictures,
    find_prompts,
    list_pictures,
    read_picture,
    read_prompts,
)
from mfd_fast.metrics.model_sources import Source
from mfd_fast.metrics.precision_recall import precision_recall
from mfd_fast.metrics.text_image import METRICS, Metric, Scorer

NEIGHBOURS = 3
LEAST_PICTURES = NEIGHBOURS + 1
"""Of both folders, for distances: precision and recall look at the third neighbour."""


def image_report(
    folder: Path,
    sources: Mapping[str, Source],
    *,
    prompts: Path | None = None,
    reference: Path | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measure the pictures of ``folder`` with each metric of ``sources``, one model in memory at a time.

    Returns what goes into JSON: ``metrics`` (by metric: mean, standard error and spread of a score, or distance,
    precision and recall), ``pictures`` (by name, every score) and ``broken`` (by name, why a file was left out).

    Raises:
        ValueError: no metric, an unknown one, prompts that do not match, too few pictures.
        FileNotFoundError, NotADirectoryError: prompts, reference or weights are missing.
        ModuleNotFoundError: the ``metrics`` extra is not installed.
    """
    for name in sources:
        if name not in METRICS:
            raise ValueError(f"metrics: expected any of {', '.join(METRICS)}, got {name!r}")
    if not sources:
        raise ValueError(f"metrics: expected at least one of {', '.join(METRICS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    comparing = [name for name in sources if METRICS[name].gives_features]
    if bool(comparing) != (reference is not None):
        needed = ", ".join(name for name, metric in METRICS.items() if metric.gives_features)
        raise ValueError(f"reference pictures and the metrics that compare with them ({needed}) belong together")
    pictures = check_pictures(folder)
    texts = _prompts(folder, sources, prompts)
    references = check_pictures(reference) if reference is not None else None
    if references is not None:
        _enough(folder, pictures)
        _enough(reference, references)
    entries: dict[str, dict[str, Any]] = {path.name: {} for path in pictures.paths}
    for name in entries if texts else ():
        entries[name]["prompt"] = texts[name]
    results = {}
    for name, source in sources.items():
        metric = METRICS[name]
        scorer = metric.load(source, torch.device(device))
        values = _look(name, scorer, pictures.paths, texts, batch_size)
        if metric.gives_features:
            assert references is not None
            real = _look(f"{name}, reference", scorer, references.paths, {}, batch_size)
            results[name] = _compare(real, values)
        else:
            results[name] = _summary(values)
            for entry, value in zip(entries.values(), values.tolist(), strict=True):
                entry[name] = value
        results[name] |= {"title": metric.title, "model": _describe(source)}
    broken = {"broken": pictures.broken, "broken_reference": references.broken if references else {}}
    return {"folder": str(folder), "count": len(entries), **broken, "metrics": results, "pictures": entries}


def _prompts(folder: Path, sources: Mapping[str, Source], file: Path | None) -> dict[str, str]:
    needing = [name for name in sources if METRICS[name].needs_prompts]
    if not needing:
        return {}
    file = file or find_prompts(folder)
    if file is None:
        raise ValueError(f"{', '.join(needing)}: need a prompt for every picture, in {folder}/prompts.txt or --prompts")
    return read_prompts(file, [path.name for path in list_pictures(folder)])


def _enough(folder: Path | None, pictures: Pictures) -> None:
    if len(pictures.paths) < LEAST_PICTURES:
        raise ValueError(
            f"{folder}: expected at least {LEAST_PICTURES} readable pictures to compare, got {len(pictures.paths)}"
        )


@torch.inference_mode()
def _look(title: str, scorer: Scorer, paths: Sequence[Path], prompts: Mapping[str, str], batch_size: int) -> Tensor:
    """What ``scorer`` says of all pictures, float64 on the CPU; FloatingPointError for anything not finite."""
    from tqdm import tqdm

    parts = []
    with tqdm(total=len(paths), desc=title, unit="picture", dynamic_ncols=True, disable=None) as bar:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            texts = [prompts[path.name] for path in batch] if prompts else []
            values = scorer([read_picture(path) for path in batch], texts).double().cpu()
            if not bool(values.isfinite().all()):
                raise FloatingPointError(f"{title}: NaN or infinity between {batch[0].name} and {batch[-1].name}")
            parts.append(values)
            bar.update(len(batch))
    return torch.cat(parts)


def _summary(scores: Tensor) -> dict[str, Any]:
    """Mean, spread and error of the mean; the last two are None for one picture."""
    spread = float(scores.std()) if len(scores) > 1 else None
    error = None if spread is None else spread / math.sqrt(len(scores))
    return {"mean": float(scores.mean()), "standard_error": error, "spread": spread}


def _compare(real: Tensor, generated: Tensor) -> dict[str, Any]:
    precision, recall = precision_recall(real, generated, NEIGHBOURS)
    return {
        "distance": frechet_distance(real, generated),
        "reference_half_half": half_half_distance(real),
        "precision": precision,
        "recall": recall,
        "reference_count": len(real),
    }


def _describe(source: Source) -> str:
    return source.model if source.extra is None else f"{source.model} + {'/'.join(source.extra)}"


def table(report: Mapping[str, Any]) -> list[str]:
    """The report's metrics as lines of text, a metric a line; then the files that were left out."""
    width = max(len(METRICS[name].title) for name in report["metrics"])
    lines = [f"{report['count']} pictures of {report['folder']}"]
    for name, result in report["metrics"].items():
        lines.append(f"  {METRICS[name].title:{width}}  {_line(METRICS[name], result)}")
    for key, words in (("broken", "left out"), ("broken_reference", "left out of the reference")):
        lines += [f"  {words}: {name}: {reason}" for name, reason in report[key].items()]
    return lines


def _line(metric: Metric, result: Mapping[str, Any]) -> str:
    if not metric.gives_features:
        error = "" if result["standard_error"] is None else f" ± {result['standard_error']:.4f}"
        return f"{result['mean']:10.4f}{error}"
    return (
        f"{result['distance']:10.4f}  (reference, half against half: {result['reference_half_half']:.4f})  "
        f"precision {result['precision']:.3f}  recall {result['recall']:.3f}"
    )
