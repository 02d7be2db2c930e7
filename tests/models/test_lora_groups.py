"""Rows of several low-rank roles in one evaluation: their order, their conditions, and groups that are refused."""

import pytest
import torch
from tiny_roles import groups_of, inputs, roles_on, teacher
from torch import Tensor, nn

from mfd_fast.models import null_condition
from mfd_fast.models.row_groups import RowSpans, merged_groups
from mfd_fast.types import RowGroup, SharedBackbone


def test_neighbours_of_one_role_are_one_group() -> None:
    groups = [(None, 2), (None, 3), ("student", 0), ("auxiliary", 1), ("auxiliary", 1), (None, 1)]
    assert merged_groups(groups) == ((None, "auxiliary", None), (2, 1))
    assert merged_groups([("student", 0), (None, 0)]) == (("student",), ())


def test_spans_follow_each_other() -> None:
    rows = RowSpans()
    rows.assign([(None, 5), ("auxiliary", 2), (None, 1)])
    assert rows.spans == ((None, 0, 5), ("auxiliary", 5, 7), (None, 7, 8))


def test_layers_and_fields_compile_to_one_graph() -> None:
    roles = roles_on(teacher())
    groups = groups_of(roles, [("teacher", 3), ("auxiliary", 2), ("student", 4)])
    expected = roles.teacher.evaluate_groups(groups)
    compiled = torch.compile(roles.teacher.evaluate_groups, backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(groups), expected, strict=True))
    layer = roles.layers["enter"]
    roles.rows.assign([(None, 2), ("student", 3)])
    x = torch.randn(5, 16)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_rows_are_reset_after_an_error() -> None:
    roles = roles_on(teacher())
    x, t, _ = inputs(3)
    with pytest.raises(ValueError, match="x must have shape"):
        roles.student(x[..., 0], t)
    assert roles.rows.spans == ()
    assert torch.equal(roles.network(x, t), roles.teacher(x, t))


class Nested(nn.Module):
    """A field whose condition is nested and holds more than tensors."""

    time_range = (0.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, t: Tensor, text: dict[str, Tensor], size: int = 1, mask: Tensor | None = None
    ) -> Tensor:
        velocity: Tensor = self.linear(x + text["tokens"].mean(1)) * size + t[:, None]
        return velocity if mask is None else velocity * mask


def nested_group(field: SharedBackbone, rows: int, tokens: int = 3, shared: bool = False, **extra: object) -> RowGroup:
    text = torch.randn(1 if shared else rows, tokens, 4)
    return RowGroup(field, torch.randn(rows, 4), torch.rand(rows), {"text": {"tokens": text}, **extra})


@pytest.mark.parametrize(
    ("first", "second", "forwards"),
    [
        ({}, {"shared": True}, 1),
        ({"size": 2.5}, {"size": float("2.5")}, 1),
        ({"mask": None}, {"mask": None}, 1),
        ({"size": 2}, {"size": 3}, 2),
        ({"size": 2}, {}, 2),
        ({"tokens": 3}, {"tokens": 2}, 2),
        ({"mask": None}, {"mask": torch.ones(1, 4)}, 2),
    ],
    ids=["shared row", "equal value", "none", "other value", "other keys", "other length", "tensor and none"],
)
def test_conditions_of_groups(first: dict[str, object], second: dict[str, object], forwards: int) -> None:
    torch.manual_seed(0)
    roles = roles_on(Nested())
    calls: list[int] = []
    roles.network.register_forward_hook(lambda *_: calls.append(1))
    groups = [nested_group(roles.teacher, 2, **first), nested_group(roles.student, 3, **second)]  # type: ignore[arg-type]
    together = roles.teacher.evaluate_groups(groups)
    assert len(calls) == forwards
    for group, velocity in zip(groups, together, strict=True):
        torch.testing.assert_close(velocity, group.field(group.x, group.t, **group.condition), rtol=1e-6, atol=1e-6)


def test_wrong_groups_are_refused() -> None:
    roles = roles_on(Nested())
    good = nested_group(roles.teacher, 2)
    with pytest.raises(ValueError, match=r"text\.tokens must have leading dimension 3 or 1, got shape \(2, 3, 4\)"):
        roles.teacher.evaluate_groups([good, good._replace(x=torch.zeros(3, 4), t=torch.zeros(3))])
    with pytest.raises(ValueError, match="a field of another backbone"):
        roles.teacher.evaluate_groups([good, nested_group(roles_on(Nested()).student, 2)])


def test_fields_show_what_the_module_shows() -> None:
    roles = roles_on(Nested())
    assert roles.student.time_range == (0.0, 1.0)  # type: ignore[attr-defined]
    assert not hasattr(roles.student, "num_classes")
    model = teacher()
    condition = null_condition(roles_on(model).student)
    assert condition is not None
    assert condition["label"].tolist() == [3]
    assert roles.student.device == torch.device("cpu")
    assert roles.teacher.parameters() == []
    assert [id(p) for p in roles.student.parameters()] == [id(p) for p in roles.parameters("student")]
