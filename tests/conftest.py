"""Fixtures that several test folders share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_clip, write_dinov2
from torch import Tensor

from mfd_fast.data import load_dataset
from mfd_fast.methods.mfd import flow_matching_loss
from mfd_fast.models import build_model
from mfd_fast.models.base import VelocityNetwork


@pytest.fixture(scope="session")
def digits_teacher() -> VelocityNetwork:
    """A small class-conditional network, trained on the digits for a few seconds; frozen: leave it as it is."""
    digits = load_dataset("digits")
    assert digits.label is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model("mlp", digits.sample_shape, digits.num_classes, width=128, depth=2)
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(300):
            index = torch.randint(len(digits.x), (128,))
            label = digits.label[index].masked_fill(torch.rand(128) < 0.1, 10)
            noise, t = torch.randn(128, *digits.sample_shape), torch.rand(128)
            loss = flow_matching_loss(network, digits.x[index], noise, t, {"label": label})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.requires_grad_(False)


class WatchedField:
    """A field that remembers what it was asked; every row must carry its number in the condition ``row``."""

    def __init__(self, field: Callable[..., Tensor]) -> None:
        self._field = field
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        """(x, t, row) of each call."""

    def __call__(self, x: Tensor, t: Tensor, *, row: Tensor, **condition: Any) -> Tensor:
        self.calls.append((x.detach().clone(), t.detach().clone(), row.clone()))
        return self._field(x, t, **condition)

    def evaluations(self, rows: int) -> list[int]:
        """How often each row was computed."""
        return torch.bincount(torch.cat([row for _, _, row in self.calls]), minlength=rows).tolist()

    def times(self, row: int) -> list[float]:
        """The times at which a row was computed, in order."""
        return [float(time) for _, t, rows in self.calls for time in t[rows == row]]


@pytest.fixture(scope="session")
def watched() -> type[WatchedField]:
    """The class of fields that remember what they were asked."""
    return WatchedField


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models that pictures are measured with, in ``clip`` and ``dinov2``."""
    folder = tmp_path_factory.mktemp("models")
    write_clip(folder / "clip")
    write_dinov2(folder / "dinov2")
    return folder


@pytest.fixture(scope="session")
def make_sana() -> Callable[..., Any]:
    """A maker of tiny random transformers of SANA; options are those of diffusers."""
    diffusers = pytest.importorskip("diffusers")

    def make(seed: int = 0, **options: Any) -> Any:
        sizes = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "num_cross_attention_heads": 2}
        widths = {"cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 16}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            given = {"in_channels": 4, "out_channels": 4, "sample_size": 16, **sizes, **widths, **options}
            return diffusers.SanaTransformer2DModel(**given).eval().requires_grad_(False)

    return make


class SanaBatch:
    """Latents, times and prompts of some rows for a transformer of `make_sana`, always the same."""

    def __init__(self, rows: int, side: int = 8, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.x = torch.randn(rows, 4, side, side, generator=generator, dtype=dtype)
        self.t = 0.3 + 0.6 * torch.rand(rows, generator=generator)
        self.r = self.t * torch.rand(rows, generator=generator)
        lengths = torch.randint(1, 9, (rows,), generator=generator)
        self.condition = {
            "prompt_embeds": torch.randn(rows, 12, 16, generator=generator, dtype=dtype),
            "prompt_mask": (torch.arange(12) < lengths[:, None]).long(),
        }
        self.null = {
            "prompt_embeds": torch.randn(1, 12, 16, generator=generator, dtype=dtype),
            "prompt_mask": (torch.arange(12) < 2)[None].long(),
        }


@pytest.fixture(scope="session")
def sana_batch() -> type[SanaBatch]:
    """The class of rows for a transformer of `make_sana`."""
    return SanaBatch


@pytest.fixture(scope="session")
def randomize() -> Callable[..., None]:
    """Gives the adapters of roles random values, always the same, so that no role is the teacher."""

    def fill(roles: Any, scale: float = 0.2) -> None:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for role in roles.roles:
                for parameter in roles.parameters(role):
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    return fill


@pytest.fixture(scope="session")
def sana_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole tiny random pipeline of SANA; not to be changed."""
    pytest.importorskip("diffusers")
    from tiny_pipeline import make_pipeline

    return make_pipeline(tmp_path_factory.mktemp("pipeline"))
