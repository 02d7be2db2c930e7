"""The classifier of the digits: good enough to measure with, repeatable, and without side effects."""

import dataclasses

import pytest
import torch

from mfd_fast.data import Dataset, load_dataset
from mfd_fast.metrics import digits_features
from mfd_fast.metrics.digits_features import DigitsClassifier, held_out_accuracy, train_digits_classifier


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def classifier(dataset: Dataset) -> DigitsClassifier:
    return train_digits_classifier(dataset, seed=0)


def test_accuracy_on_digits_never_seen(dataset: Dataset, classifier: DigitsClassifier) -> None:
    assert dataset.held_out_label is not None
    predicted = classifier.predict(dataset.held_out_x)
    accuracy = (predicted == dataset.held_out_label).double().mean().item()
    assert accuracy >= 0.97
    assert held_out_accuracy(classifier, dataset) == accuracy


def test_features_all_vary(dataset: Dataset, classifier: DigitsClassifier) -> None:
    features = classifier.features(dataset.x)
    assert features.shape == (1438, 64)
    assert not features.requires_grad
    assert float(features.std(0).min()) > 0.05


def test_same_seed_gives_the_same_classifier_and_leaves_the_random_state(
    dataset: Dataset, classifier: DigitsClassifier
) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = train_digits_classifier(dataset, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.features(dataset.held_out_x), classifier.features(dataset.held_out_x))


def test_predicts_without_dropout_in_training_mode(classifier: DigitsClassifier) -> None:
    unclear = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = classifier(unclear).argmax(1)
    classifier.train()
    try:
        assert torch.equal(classifier.predict(unclear), expected)
    finally:
        classifier.eval()


def test_a_classifier_that_learned_nothing_is_an_error(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dataset.label is not None
    monkeypatch.setattr(digits_features, "UPDATES", 3)
    with pytest.raises(RuntimeError, match=r"recognises 0\.\d+ of the held-out digits, below 0\.95"):
        train_digits_classifier(dataset)


def test_data_without_digits(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="dataset: expected labelled digits of 10 classes, got 'mixture-2d'"):
        train_digits_classifier(load_dataset("mixture-2d"))
    unlabelled = dataclasses.replace(dataset, label=None, held_out_label=None, num_classes=None)
    with pytest.raises(ValueError, match="dataset: expected labels, 'digits' has none"):
        held_out_accuracy(DigitsClassifier(), unlabelled)
    with pytest.raises(ValueError, match=r"x: expected shape \[N, 1, 8, 8\], got \(2, 3, 32, 32\)"):
        DigitsClassifier().features(torch.zeros(2, 3, 32, 32))
