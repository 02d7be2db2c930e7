import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mfd_fast import fields
from mfd_fast.closed_forms import Gaussian, GaussianMixture
from mfd_fast.field_check import READINGS, FieldReport, check_field

Field = Callable[..., Tensor]
LAW = GaussianMixture([0.7, 0.3], [[2.0, 1.0], [-1.0, 0.5]], [0.3, 0.6])
DATA = LAW.sample(400, torch.Generator().manual_seed(3))


def data_prediction(x: Tensor, t: Tensor) -> Tensor:
    return LAW.data_prediction(x, t)


def noise_prediction(x: Tensor, t: Tensor) -> Tensor:
    return x + (1 - t)[:, None] * LAW(x, t)


SHORT: dict[str, Field] = {
    "negated": lambda x, t: -LAW(x, t),
    "reversed time": lambda x, t: -LAW(x, 1 - t),
    "reversed time, velocity noise - data": lambda x, t: LAW(x, 1 - t),
    "data prediction": data_prediction,
    "noise prediction": noise_prediction,
    "data prediction, reversed time": lambda x, t: data_prediction(x, 1 - t),
    "noise prediction, reversed time": lambda x, t: noise_prediction(x, 1 - t),
}


def told_thousands(field: Field) -> Field:
    return lambda x, t: field(x, t / 1000)


# Times that run the other way are turned before they are scaled: such a network is told 1000 (1 - t).
LONG = {f"{name}, time times 1000": told_thousands(field) for name, field in SHORT.items()}
WRONG: dict[str, Field] = {**SHORT, "time times 1000": told_thousands(LAW), **LONG}


class Network(nn.Module):
    """The exact velocity, with layers in front that do nothing when they behave."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        moved: Tensor = self.layers(x)
        return LAW(moved, t)


def failure(report: FieldReport) -> str:
    assert not report.ok
    (line,) = [line for line in report.lines if line.startswith("FAILED")]
    return line.removeprefix("FAILED").strip()


@pytest.mark.parametrize("seed", [0, 1])
def test_right_convention_passes(seed: int) -> None:
    report = check_field(LAW, DATA, seed=seed)
    assert report.ok
    assert (report.reading, report.suggestion) == ("as it is", None)
    assert report.lines[-1].startswith("ok      convention: time 0 is data")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_convention_is_named_with_its_wrapper(name: str, dtype: torch.dtype) -> None:
    report = check_field(WRONG[name], DATA.to(dtype))
    assert report.reading == name
    assert failure(report).startswith(f"convention: the field fits as {name!r}; use ")
    assert report.suggestion is not None
    repaired = eval(report.suggestion, {"mfd_fast": __import__("mfd_fast"), "fields": fields, "field": WRONG[name]})
    assert check_field(repaired, DATA.to(dtype)).ok


def test_every_reading_is_tried_above() -> None:
    assert [reading.name for reading in READINGS] == ["as it is", *WRONG]


def test_symmetric_data_cannot_tell_reversed_time() -> None:
    law = Gaussian(0.0, 1.0)
    report = check_field(law, law.sample(500, torch.Generator().manual_seed(0), shape=[2]))
    assert failure(report).startswith("convention: cannot tell apart: as it is; reversed time;")
    assert (report.reading, report.suggestion) == (None, None)


@pytest.mark.parametrize(
    "field",
    [
        lambda x, t: torch.sin(10 * x + t[:, None]),
        lambda x, t: torch.ones_like(x) * t[:, None],
        lambda x, t: 2 * LAW(x, t),
    ],
    ids=["unrelated", "function-of-time", "twice"],
)
def test_field_that_explains_nothing_is_inconclusive(field: Field) -> None:
    report = check_field(field, DATA)
    assert failure(report) == "convention: inconclusive: the field explains none of the variance"
    assert (report.reading, report.suggestion) == (None, None)


def test_velocity_of_the_wrong_size_is_noticed() -> None:
    message = failure(check_field(lambda x, t: 1.4 * LAW(x, t), DATA))
    assert re.match(r"convention: the velocity fits better multiplied by 0\.[67]\d at times 0\.05 to 0\.35;", message)
    assert "guided" in message


def test_suggestion_for_a_poor_fit_says_so() -> None:
    message = failure(check_field(lambda x, t: -1.4 * LAW(x, t), DATA))
    assert "the field fits as 'negated'" in message
    assert "(poorly: the velocity fits better multiplied by 0." in message


def test_reading_that_the_field_refuses_is_ruled_out() -> None:
    def strict(x: Tensor, t: Tensor) -> Tensor:
        if bool((t > 1).any()):
            raise ValueError("time above 1")
        return LAW(x, t)

    report = check_field(strict, DATA)
    assert report.ok
    assert "        loss 4.000: time times 1000" in report.lines


def test_condition_travels_with_its_rows() -> None:
    shift = torch.linspace(-5, 5, len(DATA))[:, None]

    def shifted(x: Tensor, t: Tensor, *, shift: Tensor, scale: Tensor, name: str) -> Tensor:
        assert name == "plain"
        return LAW(x - (1 - t)[:, None] * shift, t) - shift * scale

    condition = {"shift": shift, "scale": torch.ones(1, 1), "name": "plain"}
    assert check_field(shifted, DATA + shift, condition=condition).ok
    wrong = {**condition, "shift": shift.flip(0)}
    assert not check_field(shifted, DATA + shift, condition=wrong).ok


def test_few_samples_are_used_again() -> None:
    assert check_field(LAW, DATA[:20], rows=512).reading == "as it is"


def _draws(x: Tensor, t: Tensor) -> Tensor:
    return LAW(x, t) + 0.1 * torch.randn(x.shape)


def _changes(x: Tensor, t: Tensor) -> Tensor:
    return LAW(x.mul_(2), t)


def _changes_time(x: Tensor, t: Tensor) -> Tensor:
    return LAW(x, t.mul_(0.5))


def _one_row_breaks(x: Tensor, t: Tensor) -> Tensor:
    if len(x) == 1:
        raise IndexError("squeezed")
    return LAW(x, t)


def _nan_late(x: Tensor, t: Tensor) -> Tensor:
    return LAW(x, t) / (t[:, None] < 0.9)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (lambda x: x, "call: field(x [64, 2] float32, t [64] float32) raised TypeError"),
        (lambda x, t: x[:, :1], "shape: the result must be a tensor of shape [64, 2] like x, got [64, 1]"),
        (lambda x, t: (x, t), "shape: the result must be a tensor of shape [64, 2] like x, got tuple"),
        (lambda x, t: x.long(), "dtype: the result must be floating point, got torch.int64"),
        (_nan_late, "finite: NaN or infinity in row"),
        (_changes, "input: the field changes x in place"),
        (_changes_time, "input: the field changes t in place"),
        (_draws, "repeatable: two calls with the same input differ"),
        (lambda x, t: LAW(x - x.mean(0), t), "rows: row 0 alone and in a batch of 64 differ"),
        (_one_row_breaks, "call: another call (repeated, a single row or other times) raised IndexError: squeezed"),
        (lambda x, t: LAW(x, torch.full_like(t, 0.5)), "time: the field does not depend on t"),
    ],
    ids=[
        *("signature", "shape", "tuple", "integers", "nan", "changes-x", "changes-t"),
        *("random", "rows", "one-row", "time"),
    ],
)
def test_behaviour_that_breaks_the_contract(field: Field, expected: str) -> None:
    report = check_field(field, DATA)
    assert failure(report).startswith(expected)
    assert report.lines[-1].startswith("FAILED")
    assert report.reading is None


@pytest.mark.parametrize("make", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(2)], ids=["dropout", "batch-norm"])
@pytest.mark.parametrize(
    "wrap", [lambda field: field, lambda field: fields.scaled_time(field, 1)], ids=["bare", "wrapped"]
)
def test_training_mode_is_noticed_before_anything_runs(
    make: Callable[[], nn.Module], wrap: Callable[[Field], Field]
) -> None:
    layer = make()
    network = Network(layer)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = check_field(wrap(network), DATA)
    assert failure(report).startswith(f"mode: the module is in training mode and contains {type(layer).__name__}")
    assert report.suggestion == "field.eval()"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert check_field(wrap(network.eval()), DATA).lines[0].startswith("ok")


def test_hidden_dropout_is_noticed_by_its_effect() -> None:
    class Hidden(Network):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training), t)

    report = check_field(Hidden(), DATA)
    assert "the module is in training mode (dropout?)" in failure(report)
    assert report.suggestion == "field.eval()"
    assert check_field(Hidden().eval(), DATA).ok


def test_training_mode_without_such_layers_is_fine() -> None:
    network = Network(nn.Dropout(0.0), nn.Identity())
    assert network.training
    assert check_field(network, DATA).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_that_depends_on_the_batch_is_allowed_in_low_precision(dtype: torch.dtype) -> None:
    def rounds(x: Tensor, t: Tensor) -> Tensor:
        return (LAW(x, t) * (1.02 if len(x) == 1 else 1.0)).to(dtype)

    assert check_field(rounds, DATA).ok == (dtype == torch.bfloat16)


def test_low_precision_result_is_accepted() -> None:
    report = check_field(lambda x, t: LAW(x, t).bfloat16(), DATA)
    assert report.ok
    assert "ok      dtype: torch.bfloat16 for x in torch.float32" in report.lines


@pytest.mark.parametrize(
    ("data", "error", "expected"),
    [
        ([[1.0]], TypeError, "data must be a floating-point tensor, got list"),
        (torch.zeros(4, 2, dtype=torch.int64), TypeError, "data must be a floating-point tensor, got torch.int64"),
        (torch.zeros(4), ValueError, r"data must have shape \[N, ...\] with N at least 2, got \(4,\)"),
        (torch.zeros(1, 2), ValueError, r"data must have shape \[N, ...\] with N at least 2, got \(1, 2\)"),
        (torch.full((4, 2), torch.nan), ValueError, "data must be finite"),
    ],
    ids=["list", "integers", "one-axis", "one-row", "nan"],
)
def test_unusable_data_refused(data: Tensor, error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected):
        check_field(LAW, data)


def test_unusable_arguments_refused() -> None:
    with pytest.raises(ValueError, match=r"condition\['label'\] must have leading dimension 400"):
        check_field(LAW, DATA, condition={"label": torch.zeros(3)})
    with pytest.raises(ValueError, match="rows must be at least 16, got 3"):
        check_field(LAW, DATA, rows=3)
