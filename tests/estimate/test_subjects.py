"""The network that an estimate is about, before its data are there."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from mfd_fast.estimate import subjects
from mfd_fast.estimate.network import Network, sana_1600m
from mfd_fast.settings_io import load_settings


@pytest.mark.parametrize(
    ("preset", "texts", "shape", "classes"),
    [
        ("occfm", (), (6, 16, 50, 50), None),
        ("occfm-4c", (), (6, 4, 50, 50), None),
        ("occfm-8c", ("data.options.future=3",), (3, 8, 50, 50), None),
        ("occfm-64c", (), (6, 64, 50, 50), None),
        ("cifar10", (), (3, 32, 32), 10),
        ("cifar10", ("data.options.conditional=false",), (3, 32, 32), None),
    ],
)
def test_the_shape_of_data_that_are_not_there_comes_from_their_options(
    preset: str, texts: tuple[str, ...], shape: tuple[int, ...], classes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []

    def traced(name: str, build: Callable[[], nn.Module], *_: object, **__: object) -> Network:
        built.append(build())
        return sana_1600m("bfloat16", 64)

    monkeypatch.setattr(subjects, "traced", traced)
    monkeypatch.setattr(subjects, "build_model", lambda name, *described, **options: described)
    found = subjects.describe_network(load_settings(preset, None, texts), lora=False, precision="float32")
    assert built == [(shape, classes)]
    assert found.note.endswith(f"; the data are not there, samples of {list(shape)} were taken")
