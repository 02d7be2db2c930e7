"""What the students of checkpoints were found to be worth: ``scores.json`` beside the checkpoints.

A score belongs to what a checkpoint holds, not to its name: it counts while the manifest is the one that was there.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from mfd_fast.storage import read_json, sha256, write_json
from mfd_fast.training.checkpoint import MANIFEST, list_checkpoints

SCORES = "scores.json"


class Score(NamedTuple):
    """How far a student is from the data."""

    distance: float
    """Smaller is better."""
    how: str
    """What was measured and on what: only scores of the same words are compared."""


def read_scores(folder: Path) -> dict[str, Score]:
    """The scores of the checkpoints in ``folder`` by name, without those of checkpoints that are no longer there.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / SCORES
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {type(content).__name__}")
    manifests = {place.name: place / MANIFEST for place in list_checkpoints(folder)}
    present = {name: manifest for name, manifest in manifests.items() if manifest.is_file()}
    scores = {}
    for name, entry in content.items():
        score, digest = _score(path, entry)
        if name in present and sha256(present[name]) == digest:
            scores[name] = score
    return scores


def _score(path: Path, entry: Any) -> tuple[Score, str]:
    try:
        distance, how, digest = entry["distance"], entry["how"], entry["manifest"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: an entry must have distance, how and manifest") from error
    if type(distance) not in (int, float) or not math.isfinite(distance) or not isinstance(how, str):
        raise ValueError(f"{path} is damaged: a distance must be a finite number and its how a text")
    return Score(float(distance), how), str(digest)


def write_score(checkpoint: Path, score: Score) -> None:
    """Keep the score of a checkpoint; those of checkpoints that are gone are dropped.

    Raises:
        ValueError: the distance is not finite, or the scores that are there are damaged.
    """
    if not math.isfinite(score.distance):
        raise ValueError(f"{checkpoint.name}: its distance is {score.distance}, which is no score")
    folder = checkpoint.parent
    kept = {**read_scores(folder), checkpoint.name: score}
    digests = {name: sha256(folder / name / MANIFEST) for name in kept}
    write_json(
        folder / SCORES, {name: {**value._asdict(), "manifest": digests[name]} for name, value in sorted(kept.items())}
    )


def best_names(folder: Path) -> list[str]:
    """Names of the checkpoints with a score, the best first.

    Raises:
        ValueError: the scores are damaged, or were not all measured in one way.
    """
    scores = read_scores(folder)
    ways = sorted({score.how for score in scores.values()})
    if len(ways) > 1:
        raise ValueError(f"{folder / SCORES}: scores of different kinds are not comparable: {'; '.join(ways)}")
    return sorted(scores, key=lambda name: (scores[name].distance, name))


def best_kept(folder: Path) -> list[str]:
    """The name of the best checkpoint, which a training does not delete; nothing where there is no way to tell."""
    try:
        return best_names(folder)[:1]
    except (ValueError, OSError):
        return []
