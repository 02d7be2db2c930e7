"""The features in which digits are compared: a small classifier that the package trains on them itself."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.data.dataset import Dataset, all_rows

MIN_ACCURACY = 0.95
UPDATES = 400
BATCH_SIZE = 128
LEARNING_RATE = 4e-3
JITTER = 0.1
LABEL_SMOOTHING = 0.05
NUM_FEATURES = 64


class DigitsClassifier(nn.Module):
    """A convolutional classifier of 8x8 digits whose last hidden layer serves as feature space.

    ``x``: ``[N, 1, 8, 8]`` float32 in [-1, 1]. SiLU rather than ReLU, so that no feature is constantly zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, NUM_FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(NUM_FEATURES, 10))

    def forward(self, x: Tensor) -> Tensor:
        """The logits ``[N, 10]``."""
        logits: Tensor = self.head(self.body(x))
        return logits

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer ``[N, NUM_FEATURES]``."""
        _check_pictures(x)
        features: Tensor = self.body(x)
        return features

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The most probable class ``[N]`` int64, without dropout whatever the mode of the module."""
        logits: Tensor = self.head[1](self.features(x))
        return logits.argmax(1)


def train_digits_classifier(dataset: Dataset, seed: int = 0) -> DigitsClassifier:
    """A classifier trained on the training split of ``dataset`` for `UPDATES` updates, in evaluation mode.

    The same seed gives the same weights (for the same number of threads); the global random state stays as it was.
    Raises ValueError for a dataset without digits, RuntimeError when fewer than `MIN_ACCURACY` of the held-out digits
    are recognised, because its features then measure nothing.
    """
    if dataset.label is None or dataset.num_classes != 10:
        raise ValueError(f"dataset: expected labelled digits of 10 classes, got {dataset.name!r}")
    x = all_rows(dataset.x)
    _check_pictures(x)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        classifier = DigitsClassifier()
        _train(classifier, x, dataset.label)
    classifier.requires_grad_(False).eval()
    accuracy = held_out_accuracy(classifier, dataset)
    if accuracy < MIN_ACCURACY:
        raise RuntimeError(
            f"The digits classifier recognises {accuracy:.3f} of the held-out digits, below {MIN_ACCURACY}: its "
            "features cannot be used for measuring."
        )
    return classifier


def held_out_accuracy(classifier: DigitsClassifier, dataset: Dataset) -> float:
    """The share of the held-out samples of ``dataset`` whose class is predicted."""
    if dataset.held_out_label is None:
        raise ValueError(f"dataset: expected labels, {dataset.name!r} has none")
    return (classifier.predict(all_rows(dataset.held_out_x)) == dataset.held_out_label).double().mean().item()


def _train(classifier: DigitsClassifier, x: Tensor, label: Tensor) -> None:
    """Train with the global random state, which the caller has forked and seeded."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=UPDATES)
    classifier.train()
    for _ in range(UPDATES):
        rows = torch.randint(len(x), (BATCH_SIZE,))
        jittered = x[rows] + JITTER * torch.randn(BATCH_SIZE, *x.shape[1:])
        loss = F.cross_entropy(classifier(jittered), label[rows], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()


def _check_pictures(x: Tensor) -> None:
    if x.dim() != 4 or x.shape[1:] != (1, 8, 8):
        raise ValueError(f"x: expected shape [N, 1, 8, 8], got {tuple(x.shape)}")
