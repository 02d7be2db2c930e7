"""Forward-mode derivatives go through every model and every operation of the package, or say that they cannot."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.methods.derivative import DERIVATIVES, total_derivative
from mfd_fast.models import build_model
from mfd_fast.ops.linear import OneDNNLinear, linear_reference, onednn_linear

MODELS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "mlp": ("mlp", (3,), {"width": 16, "depth": 2}),
    "dit": ("dit", (1, 4, 4), {"width": 16, "depth": 2, "heads": 2}),
    "dit-qk-norm": ("dit", (1, 4, 4), {"width": 16, "depth": 1, "heads": 2, "qk_norm": True}),
    "unet": ("unet", (1, 8, 8), {"width": 8, "multipliers": [1, 2], "blocks_per_level": 1, "time_features": 16}),
}


@pytest.mark.parametrize("second_time", [False, True], ids=["one time", "two times"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_model_has_one(kind: str, second_time: bool) -> None:
    name, shape, options = MODELS[kind]
    torch.manual_seed(0)
    network = build_model(name, shape, 3, **options)
    network = (network.with_second_time() if second_time else network).double().requires_grad_(False)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, v = torch.randn(2, 4, *shape, dtype=torch.float64)
    t, label = torch.linspace(0.3, 0.9, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    r = t / 3 if second_time else None
    (u, exact), (same, difference) = (
        total_derivative(network, x, t, v, {"label": label}, r=r, kind=kind) for kind in DERIVATIVES
    )
    torch.testing.assert_close(u, same)
    assert exact.norm() > 0.1
    assert (exact - difference).norm() < 1e-4 * exact.norm()
    assert not exact.requires_grad


def test_dropout_is_shared_with_the_call_that_follows() -> None:
    torch.manual_seed(0)
    dropout = nn.Dropout(0.5)

    def field(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = dropout(x * t[:, None])
        return out

    x, v = torch.ones(2, 8, 16, dtype=torch.float64)
    t = torch.full((8,), 0.5, dtype=torch.float64)
    torch.manual_seed(7)
    values = [total_derivative(field, x, t, v, {}, kind=kind) for kind in DERIVATIVES]
    following = field(x, t)
    for u, derivative in values:
        assert torch.equal(u, following)
        # d(x t)/dt along (1, 1) is t + x = 1.5, doubled where it is kept
        torch.testing.assert_close(derivative, torch.where(u == 0, 0.0, 3.0).double(), rtol=0, atol=1e-5)
    assert 0 < int((following == 0).sum()) < following.numel()


def test_onednn_keeps_tangents() -> None:
    linear = nn.Linear(5, 4)
    x, v = torch.randn(2, 3, 5)
    t = torch.full((3,), 0.5)
    fast = OneDNNLinear(linear)
    _, ours = total_derivative(lambda x, t: fast(x), x, t, v, {})
    torch.testing.assert_close(ours, linear_reference(v, linear.weight.detach(), None))


def test_an_operation_without_forward_mode_is_an_error_with_the_way_out() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*derivative to finite-difference"):
        total_derivative(lambda x, t: Opaque.apply(x), torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), {})


def test_the_bare_operator_loses_the_tangent_without_a_word() -> None:
    """Why `OneDNNLinear` and the check before a run are needed; when torch raises here, both can go."""
    weight, x = torch.randn(4, 5), torch.ones(2, 5)
    _, derivative = total_derivative(lambda x, t: onednn_linear(x, weight, None), x, torch.ones(2), x, {})
    assert derivative.abs().max() == 0
