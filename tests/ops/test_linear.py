"""oneDNN's float32 product against torch's, and the choice between them."""

import pytest
import torch

from mfd_fast.ops import linear


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(1, 3), (7, 5), (2, 4, 6), (64, 256)], ids=str)
def test_equals_the_definition(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(9, shape[-1], generator=generator)
    offset = torch.randn(9, generator=generator) if bias else None
    with torch.no_grad():
        actual, expected = linear.onednn_linear(x, weight, offset), linear.linear_reference(x, weight, offset)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(1, 3), (7, 5), (2, 4, 6), (5,), (64, 256)], ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "x", "weight"])
def test_gradients_equal_those_of_the_definition(shape: tuple[int, ...], bias: bool, wanted: tuple[bool, bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).requires_grad_(wanted[0])
    weight = torch.randn(9, shape[-1], generator=generator).requires_grad_(wanted[1])
    offset = torch.randn(9, generator=generator).requires_grad_() if bias else None
    seed = torch.randn(*shape[:-1], 9, generator=generator)
    inputs = [value for value in (x, weight, offset) if value is not None and value.requires_grad]
    ours, theirs = (
        torch.autograd.grad(product(x, weight, offset), inputs, seed)
        for product in (linear.onednn_linear, linear.linear_reference)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_sum_and_of_no_rows() -> None:
    weight = torch.randn(3, 2, requires_grad=True)
    x = torch.randn(4, 2)
    (gradient,) = torch.autograd.grad(linear.onednn_linear(x, weight, None).sum(), weight)  # seeds of stride 0
    torch.testing.assert_close(gradient, x.sum(0).expand(3, 2))
    (nothing,) = torch.autograd.grad(linear.onednn_linear(x[:0], weight, None).sum(), weight)
    assert torch.equal(nothing, torch.zeros(3, 2))


def test_autocast_casts() -> None:
    layer = linear.OneDNNLinear(torch.nn.Linear(2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(4, 2)).dtype == torch.bfloat16
    assert layer(torch.randn(4, 2)).dtype == torch.float32


def test_the_operator_is_well_formed() -> None:
    values = (torch.randn(4, 2), torch.randn(3, 2), torch.randn(3))
    torch.library.opcheck(linear.onednn_linear, tuple(value.requires_grad_() for value in values))


@pytest.mark.parametrize(
    ("gains", "reason"),
    [([2.0, 1.5], None), ([2.0, 0.7], "oneDNN's float32 matrix product is 0.70 times as fast as torch's own")],
    ids=["faster", "slower"],
)
def test_the_slowest_shape_decides(monkeypatch: pytest.MonkeyPatch, gains: list[float], reason: str | None) -> None:
    answers = iter(gains)
    monkeypatch.setattr(linear, "_gain", lambda *shape: next(answers))
    linear.why_not_onednn.cache_clear()
    assert linear.why_not_onednn() == reason
    linear.why_not_onednn.cache_clear()


def test_a_torch_without_the_operator_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*shape: int) -> float:
        raise AttributeError("no _linear_pointwise")

    monkeypatch.setattr(linear, "_gain", missing)
    linear.why_not_onednn.cache_clear()
    assert linear.why_not_onednn() == "this torch has no such operator (no _linear_pointwise)"
    linear.why_not_onednn.cache_clear()


def test_timing_gives_a_ratio() -> None:
    assert linear._gain(8, 8, 8) > 0
