"""The whole report, on samples whose quality is known beforehand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast.data import Dataset, load_dataset
from mfd_fast.metrics import evaluate, frechet_distance, sliced_wasserstein
from mfd_fast.metrics.digits_features import DigitsClassifier, train_digits_classifier
from mfd_fast.metrics.evaluate import feature_space, sample_report


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def classifier(digits: Dataset) -> DigitsClassifier:
    return train_digits_classifier(digits)


@pytest.fixture(scope="module")
def report(digits: Dataset, classifier: DigitsClassifier) -> dict[str, Any]:
    assert digits.label is not None
    assert digits.held_out_label is not None
    x, label = torch.cat([digits.x, digits.held_out_x]), torch.cat([digits.label, digits.held_out_label])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator)
    ones = digits.x[digits.label == 1]
    samples: dict[str, tuple[Tensor, Tensor | None]] = {
        "real": (x, label),
        "grainy": (x + 0.3 * noise, label),
        "noise": (noise, label),
        "ones": (ones, None),
        "mislabelled": (x, (label + 1) % 10),
    }
    return sample_report(digits, classifier, samples)


def test_real_digits_are_perfect(report: dict[str, Any]) -> None:
    real = report["samples"]["real"]
    assert real["distance"] == pytest.approx(0.0, abs=1e-6)
    assert (real["precision"], real["recall"]) == (1.0, 1.0)
    assert real["nearest_neighbour"] == 0.0
    assert real["class_agreement"] > 0.99


def test_data_is_compared_with_itself(report: dict[str, Any], digits: Dataset, classifier: DigitsClassifier) -> None:
    assert report["feature_space"] == "digits classifier"
    between = frechet_distance(classifier.features(digits.x), classifier.features(digits.held_out_x))
    assert report["held_out_distance"] == pytest.approx(between)
    assert 0.2 < report["data_half_half"] < 2.0
    assert report["held_out_nearest_neighbour"] > 1.0


def test_distances_rank_the_sets(report: dict[str, Any]) -> None:
    samples = report["samples"]
    for key in ("distance", "distance_training", "distance_held_out"):
        assert samples["real"][key] < samples["grainy"][key] < samples["noise"][key]
    assert samples["noise"]["distance"] > 10 * report["data_half_half"]
    assert samples["noise"]["nearest_neighbour"] > samples["grainy"]["nearest_neighbour"] > 0


def test_distances_refer_to_the_right_split(digits: Dataset, classifier: DigitsClassifier) -> None:
    samples = {"training": (digits.x, None), "held-out": (digits.held_out_x, None)}
    measured = sample_report(digits, classifier, samples)["samples"]
    assert measured["training"]["distance_training"] == pytest.approx(0.0, abs=1e-6)
    assert measured["held-out"]["distance_held_out"] == pytest.approx(0.0, abs=1e-6)
    assert measured["training"]["distance_held_out"] > 0.1
    assert measured["held-out"]["distance_training"] > 0.1


def test_one_class_alone_has_precision_and_no_recall(report: dict[str, Any]) -> None:
    ones = report["samples"]["ones"]
    assert ones["precision"] == 1.0
    assert ones["recall"] < 0.2
    assert ones["class_agreement"] is None


def test_agreement_follows_the_condition(report: dict[str, Any]) -> None:
    assert report["samples"]["mislabelled"]["class_agreement"] < 0.02
    assert report["samples"]["noise"]["class_agreement"] < 0.3


def test_trains_a_classifier_where_none_is_given(
    digits: Dataset, classifier: DigitsClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "train_digits_classifier", {digits: classifier}.get)
    assert digits.held_out_label is not None
    samples = {"held-out": (digits.held_out_x, digits.held_out_label)}
    assert sample_report(digits, None, samples) == sample_report(digits, classifier, samples)
    assert torch.equal(feature_space(digits)(digits.x), classifier.features(digits.x))


def test_points_are_their_own_features() -> None:
    dataset = load_dataset("mixture-2d", num_samples=400, num_held_out=400)
    report = sample_report(dataset, None, {"held-out": (dataset.held_out_x, None)})
    assert report["feature_space"] == "points"
    assert report["distance"] == "sliced Wasserstein distance"
    held_out = report["samples"]["held-out"]
    assert held_out["distance_training"] == pytest.approx(sliced_wasserstein(dataset.x, dataset.held_out_x))
    assert held_out["nearest_neighbour"] == report["held_out_nearest_neighbour"]
    assert held_out["class_agreement"] is None


def test_large_pictures_are_averaged() -> None:
    x = torch.zeros(20, 3, 32, 32)
    x[:, 0, :4, :4] = torch.arange(16.0).view(4, 4)
    dataset = Dataset("pictures", x, None, x[:5], None)
    space = feature_space(dataset)
    assert space.description == "pixels averaged to 8x8"
    assert space(x).shape == (20, 192)
    assert space(x)[0, 0] == 7.5


def test_precision_of_many_samples_is_estimated_from_some(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset("mixture-2d", num_samples=400, num_held_out=400)
    samples = {"held-out": (dataset.held_out_x + 0.2, None)}
    whole = sample_report(dataset, None, samples)["samples"]["held-out"]
    monkeypatch.setattr(evaluate, "PRECISION_RECALL_ROWS", 300)
    some = sample_report(dataset, None, samples)["samples"]["held-out"]
    assert some["precision"] != whole["precision"]
    assert some["precision"] == pytest.approx(whole["precision"], abs=0.1)
    assert some["distance"] == whole["distance"]


def test_bad_input(digits: Dataset, classifier: DigitsClassifier) -> None:
    points = load_dataset("mixture-2d", num_samples=20, num_held_out=20)
    with pytest.raises(
        ValueError, match="classifier: expected None, the digits classifier knows no samples of 'mixture"
    ):
        sample_report(points, classifier, {})
    with pytest.raises(ValueError, match=r"samples\['student'\]: expected x of shape"):
        sample_report(digits, classifier, {"student": (torch.zeros(9, 64), None)})
    with pytest.raises(ValueError, match=r"samples\['student'\]: expected a condition \[9\], got \(8,\)"):
        sample_report(digits, classifier, {"student": (torch.zeros(9, 1, 8, 8), torch.zeros(8))})
