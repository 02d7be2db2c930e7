"""The closed forms against each other, against plain loops, and against the law they claim to describe."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mfd_fast.closed_forms import Gaussian, GaussianMixture
from mfd_fast.path import interpolate, noise_prediction

LAW = Gaussian([1.3, -0.4, 0.0], [0.6, 1.7, 1.0])
MIXTURE = GaussianMixture([1.0, 2.0, 0.5], [[-2.0, 0.0], [1.0, 1.0], [0.5, -3.0]], [0.3, 1.0, 0.6])


def _points(n: int, d: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _times(n: int, low: float = 0.0, high: float = 1.0, seed: int = 1) -> Tensor:
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return low + (high - low) * uniform


def _assert_exact(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _mixture_score(law: GaussianMixture, x: Tensor, t: Tensor) -> Tensor:
    """The gradient of log p_t by automatic differentiation of torch's own mixture density."""
    x = x.clone().requires_grad_()
    std = ((1 - t)[:, None].square() * law.stds.square() + t[:, None].square()).sqrt()
    means = (1 - t)[:, None, None] * law.means
    normal = torch.distributions.Independent(torch.distributions.Normal(means, std[:, :, None].expand_as(means)), 1)
    chosen = torch.distributions.Categorical(law.weights.expand(len(t), -1))
    density: Tensor = torch.distributions.MixtureSameFamily(chosen, normal).log_prob(x)  # type: ignore[no-untyped-call]
    return torch.autograd.grad(density.sum(), x)[0]


@pytest.mark.parametrize("law", [LAW, MIXTURE], ids=["gaussian", "mixture"])
def test_velocity_at_both_ends(law: Gaussian | GaussianMixture) -> None:
    x = _points(9, law.sample_shape[0])
    mean = LAW.mean if law is LAW else (MIXTURE.weights[:, None] * MIXTURE.means).sum(0)
    _assert_exact(law(x, torch.ones(9)), x - mean)
    _assert_exact(law(x, torch.zeros(9)), -x)


def test_mixture_of_one_is_the_gaussian() -> None:
    x, t = _points(20, 2), _times(20)
    single = GaussianMixture([3.0], [[0.7, -1.1]], 0.4)
    gaussian = Gaussian([0.7, -1.1], 0.4)
    _assert_exact(single(x, t), gaussian(x, t))
    _assert_exact(single.data_prediction(x, t), gaussian.data_prediction(x, t))


def test_mixture_velocity_is_the_score_in_disguise() -> None:
    x, t = _points(50, 2), _times(50, 0.05, 0.95)
    score = _mixture_score(MIXTURE, x, t)
    torch.testing.assert_close(-noise_prediction(x, t, MIXTURE(x, t)) / t[:, None], score, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("law", [LAW, MIXTURE], ids=["gaussian", "mixture"])
def test_velocity_is_the_mean_of_noise_minus_data(law: Gaussian | GaussianMixture) -> None:
    """The regression of ``noise - data`` on functions of x_t has the same coefficients as the velocity's."""
    generator = torch.Generator().manual_seed(3)
    data = law.sample(400_000, generator, dtype=torch.float64)
    noise = torch.randn(data.shape, generator=generator, dtype=torch.float64)
    t = torch.full((len(data),), 0.6, dtype=torch.float64)
    x = interpolate(data, noise, t)
    residual = noise - data - law(x, t)
    tests = torch.stack([torch.ones_like(x), x, x.square(), torch.sin(2 * x)])
    moments = (tests * residual).mean(1)
    errors = (tests * residual).std(1) / len(data) ** 0.5
    assert bool((moments.abs() < 4.5 * errors).all())


def test_sample_has_the_moments_of_the_law() -> None:
    x = LAW.sample(100_000, torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(x.mean(0), LAW.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(x.std(0), LAW.std, rtol=0.02, atol=0)
    points = MIXTURE.sample(100_000, torch.Generator().manual_seed(0), dtype=torch.float64)
    weights, means, stds = MIXTURE.weights[:, None], MIXTURE.means, MIXTURE.stds[:, None]
    mean = (weights * means).sum(0)
    variance = (weights * (means.square() + stds.square())).sum(0) - mean.square()
    torch.testing.assert_close(points.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(points.std(0), variance.sqrt(), rtol=0.02, atol=0)


def test_samples_repeat_and_take_shapes() -> None:
    def draw(seed: int) -> Tensor:
        return Gaussian(0.0, 1.0).sample(4, torch.Generator().manual_seed(seed), shape=(1, 2, 3))

    assert draw(5).shape == (4, 1, 2, 3)
    assert draw(5).dtype == torch.float32
    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    assert Gaussian(0.0, 1.0).sample(3).shape == (3, 1)
    assert MIXTURE.sample(3).shape == (3, 2)


@pytest.mark.parametrize("steps", [1, 5, 28])
def test_euler_mean_velocity_is_that_of_a_plain_loop(steps: int) -> None:
    x, t = _points(16, 3), _times(16, 0.5, 1.0)
    r = t * _times(16, 0.0, 0.9, seed=2)
    y = x
    product = torch.ones_like(x)
    for index in range(steps):
        time = t + (r - t) * index / steps
        width = ((t - r) / steps)[:, None]
        y = y - width * LAW(y, time)
        sigma_squared = (1 - time)[:, None].square() * LAW.std.square() + time[:, None].square()
        product = product * (1 - width * (time[:, None] - (1 - time)[:, None] * LAW.std.square()) / sigma_squared)
    found = LAW.euler_mean_velocity(x, t, r, steps)
    _assert_exact(found, (x - y) / (t - r)[:, None])
    formula = -LAW.mean + (1 - product) / (t - r)[:, None] * (x - (1 - t)[:, None] * LAW.mean)
    _assert_exact(found, formula)


def test_euler_mean_velocity_converges_at_first_order() -> None:
    law = Gaussian(1.3, 0.6)
    x, t, r = _points(8, 1), torch.full((8,), 0.8).double(), torch.full((8,), 0.25).double()
    exact = law.mean_velocity(x, t, r)
    errors = [float((law.euler_mean_velocity(x, t, r, steps) - exact).abs().max()) for steps in (100, 200)]
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.02)


def test_flow_map_composes_and_ends_at_the_data() -> None:
    x, t = _points(16, 3), _times(16, 0.5, 1.0)
    middle, end = 0.6 * t, 0.1 * t
    direct = LAW.flow_map(x, t, end)
    _assert_exact(LAW.flow_map(LAW.flow_map(x, t, middle), middle, end), direct)
    _assert_exact(LAW.flow_map(direct, end, t), x)
    ones, zeros = torch.ones(16), torch.zeros(16)
    _assert_exact(LAW.flow_map(x, ones, zeros), LAW.mean + LAW.std * x)


def test_flow_map_follows_the_velocity() -> None:
    x, t, r = _points(16, 3), _times(16, 0.5, 1.0), _times(16, 0.1, 0.4, seed=2).requires_grad_()
    y = LAW.flow_map(x, t, r)
    for dimension in range(3):
        slope = torch.autograd.grad(y[:, dimension].sum(), r, retain_graph=True)[0]
        torch.testing.assert_close(slope, LAW(y, r)[:, dimension].detach(), rtol=1e-10, atol=1e-10)


def test_mean_velocity_is_the_slope_of_the_chord() -> None:
    x, t = _points(16, 3), _times(16, 0.5, 1.0)
    r = 0.3 * t
    chord = (x - LAW.flow_map(x, t, r)) / (t - r)[:, None]
    _assert_exact(LAW.mean_velocity(x, t, r), chord)


def test_mean_velocity_of_no_interval_is_the_velocity() -> None:
    x, t = _points(16, 3), _times(16)
    velocity = LAW(x, t)
    _assert_exact(LAW.mean_velocity(x, t, t), velocity)
    torch.testing.assert_close(LAW.mean_velocity(x, t, t - 1e-9), velocity, rtol=1e-7, atol=1e-7)
    _assert_exact(LAW.euler_mean_velocity(x, t, t, 7), velocity)


def test_mean_velocity_keeps_its_precision_in_float32() -> None:
    x, t = _points(16, 3).float(), _times(16, 0.2, 0.9).float()
    r = t - 1e-6
    exact = LAW.mean_velocity(x.double(), t.double(), r.double())
    torch.testing.assert_close(LAW.mean_velocity(x, t, r).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("law", [LAW, MIXTURE], ids=["gaussian", "mixture"])
def test_data_prediction_belongs_to_the_velocity(law: Gaussian | GaussianMixture) -> None:
    x, t = _points(16, law.sample_shape[0]), _times(16)
    _assert_exact(law.data_prediction(x, t), x - t[:, None] * law(x, t))


def test_scalar_gaussian_takes_pictures_and_keeps_their_dtype() -> None:
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    velocity = Gaussian(0.2, 0.5)(x, torch.full((4,), 0.5), label=torch.zeros(4))
    assert velocity.shape == x.shape
    assert velocity.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(0.0, 0.0), "std: expected positive"),
        (lambda: Gaussian(float("nan"), 1.0), "mean: expected finite"),
        (lambda: Gaussian([0.0, 1.0], [1.0, 1.0, 1.0]), "std: expected a shape that broadcasts"),
        (lambda: GaussianMixture([1.0], [[0.0, 0.0], [1.0, 1.0]], 1.0), r"weights: expected shape \[2\]"),
        (lambda: GaussianMixture([1.0, -1.0], [[0.0], [1.0]], 1.0), "weights: expected positive"),
        (lambda: GaussianMixture([1.0, 1.0], torch.zeros(2), 1.0), r"means: expected shape \[K, d\]"),
        (lambda: GaussianMixture([1.0, 1.0], [[0.0], [1.0]], [1.0, 1.0, 1.0]), "stds: expected one number"),
        (lambda: MIXTURE(torch.zeros(3, 5), torch.zeros(3)), r"x: expected shape \[B, 2\]"),
        (lambda: LAW.euler_mean_velocity(torch.zeros(1, 3), torch.ones(1), torch.zeros(1), 0), "steps: expected"),
    ],
    ids=["std", "nan", "shapes", "weights", "negative", "means", "stds", "x", "steps"],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
