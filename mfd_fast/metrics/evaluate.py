"""All measurements of a set of samples against a dataset, in one dictionary."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfd_fast.data.dataset import Dataset, all_rows
from mfd_fast.metrics.digits_features import DigitsClassifier, train_digits_classifier
from mfd_fast.metrics.frechet import frechet_distance, half_half_distance
from mfd_fast.metrics.nearest_neighbour import median_nearest_neighbour_distance
from mfd_fast.metrics.precision_recall import precision_recall
from mfd_fast.metrics.sliced_wasserstein import sliced_wasserstein

PRECISION_RECALL_ROWS = 10_000
POOLED_SIZE = 8


@dataclass(frozen=True)
class FeatureSpace:
    """The space in which samples are compared: ``space(x [N, *sample_shape]) -> [N, F]``."""

    description: str
    function: Callable[[Tensor], Tensor]
    distance_name: str = "Fréchet distance"
    distance: Callable[[Tensor, Tensor], float] = frechet_distance
    """Of two sets of features ``[N, F]``, ``[M, F]``."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


def feature_space(dataset: Dataset, classifier: DigitsClassifier | None = None) -> FeatureSpace:
    """The feature space for samples of ``dataset``.

    For the digits the features of ``classifier`` (trained here when it is None); for larger pictures their pixels
    averaged to 8x8; for points the points themselves, whose sliced Wasserstein distance sees more than two moments.
    Raises ValueError for a classifier with another dataset than the digits.
    """
    if dataset.name == "digits":
        return FeatureSpace("digits classifier", (classifier or train_digits_classifier(dataset)).features)
    if classifier is not None:
        raise ValueError(f"classifier: expected None, the digits classifier knows no samples of {dataset.name!r}")
    if len(dataset.sample_shape) == 3 and min(dataset.sample_shape[1:]) > POOLED_SIZE:
        return FeatureSpace(f"pixels averaged to {POOLED_SIZE}x{POOLED_SIZE}", _pool)
    if len(dataset.sample_shape) == 1:
        return FeatureSpace("points", _flatten, "sliced Wasserstein distance", sliced_wasserstein)
    return FeatureSpace("samples, flattened", _flatten)


def sample_report(
    dataset: Dataset, classifier: DigitsClassifier | None, samples: Mapping[str, tuple[Tensor, Tensor | None]]
) -> dict[str, Any]:
    """Everything that is measured of named sets of samples ``name -> (x [N, *sample_shape], condition [N] or None)``.

    Made for the digits, and works for every dataset in its `feature_space`. "Real" are the training and held-out
    samples together (all 1797 digits). The result holds, for the data::

        feature_space                the features in which samples were compared
        distance                     the name of the distance, which is Fréchet's but for points
        data_half_half               mean distance of random halves of the real samples (five splits)
        held_out_distance            distance of the training samples and the held-out ones
        held_out_nearest_neighbour   median distance of the held-out samples to the training samples

    and under ``samples``, for every name::

        distance                     to the real samples
        distance_training            to the training samples
        distance_held_out            to the held-out samples
        precision, recall            against the real samples (at most `PRECISION_RECALL_ROWS` of each)
        nearest_neighbour            median distance to the training samples, between the samples themselves
        class_agreement              share that the classifier takes for their condition, or None without both

    Distances of different numbers of samples are not comparable: draw as many as there are real ones.
    Raises ValueError for samples or conditions of the wrong shape.
    """
    if dataset.name == "digits" and classifier is None:
        classifier = train_digits_classifier(dataset)
    space = feature_space(dataset, classifier)
    training_x, held_out_x = all_rows(dataset.x), all_rows(dataset.held_out_x)
    training, held_out = space(training_x), space(held_out_x)
    real = torch.cat([training, held_out])
    measured = {}
    for name, (x, condition) in samples.items():
        _check(name, x, condition, dataset)
        generated = space(x)
        precision, recall = precision_recall(_some_rows(real), _some_rows(generated))
        measured[name] = {
            "distance": space.distance(real, generated),
            "distance_training": space.distance(training, generated),
            "distance_held_out": space.distance(held_out, generated),
            "precision": precision,
            "recall": recall,
            "nearest_neighbour": median_nearest_neighbour_distance(x, training_x),
            "class_agreement": _class_agreement(classifier, x, condition),
        }
    return {
        "feature_space": space.description,
        "distance": space.distance_name,
        "data_half_half": half_half_distance(real, space.distance),
        "held_out_distance": space.distance(training, held_out),
        "held_out_nearest_neighbour": median_nearest_neighbour_distance(held_out_x, training_x),
        "samples": measured,
    }


def _class_agreement(classifier: DigitsClassifier | None, x: Tensor, condition: Tensor | None) -> float | None:
    if classifier is None or condition is None:
        return None
    return (classifier.predict(x) == condition).double().mean().item()


def _check(name: str, x: Tensor, condition: Tensor | None, dataset: Dataset) -> None:
    if x.shape[1:] != dataset.sample_shape:
        raise ValueError(f"samples[{name!r}]: expected x of shape [N, *{dataset.sample_shape}], got {tuple(x.shape)}")
    if condition is not None and condition.shape != (len(x),):
        raise ValueError(f"samples[{name!r}]: expected a condition [{len(x)}], got {tuple(condition.shape)}")


def _some_rows(features: Tensor) -> Tensor:
    """All rows, or `PRECISION_RECALL_ROWS` drawn from a fixed seed."""
    if len(features) <= PRECISION_RECALL_ROWS:
        return features
    rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    return features[rows[:PRECISION_RECALL_ROWS].to(features.device)]


def _pool(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, POOLED_SIZE).flatten(1)


def _flatten(x: Tensor) -> Tensor:
    return x.flatten(1)
