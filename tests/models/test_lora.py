"""Several low-rank roles on one frozen backbone."""

import copy
import threading

import pytest
import torch
from tiny_roles import groups_of, inputs, roles_on, teacher
from torch import Tensor, nn
from torch.autograd import backward

from mfd_fast.models.lora import LoRALinear, LoRARoles, LowRank
from mfd_fast.models.row_groups import RowSpans
from mfd_fast.types import SharedBackbone

BLOCKS = ("block_in.0", "block_in.1", "block_out.0", "block_out.1")


@pytest.mark.parametrize("name", ["mlp", "dit"])
@pytest.mark.parametrize(
    "rows",
    [
        [("teacher", 3), ("auxiliary", 2), ("student", 4)],
        [("student", 2), ("teacher", 3), ("student", 1)],
        [("teacher", 3), ("teacher", 3), ("auxiliary", 3)],
        [("auxiliary", 16), ("teacher", 16)],
        [("auxiliary", 4), ("student", 12)],
        [("auxiliary", 0), ("student", 2), ("teacher", 1)],
        [("student", 3), ("student", 2)],
    ],
    ids=lambda rows: "-".join(f"{role[0]}{count}" for role, count in rows),
)
def test_grouped_rows_equal_separate_evaluation(name: str, rows: list[tuple[str, int]]) -> None:
    roles = roles_on(teacher(name).double())
    forwards: list[int] = []
    roles.network.register_forward_hook(lambda *_: forwards.append(1))
    groups = [group._replace(x=group.x.double()) for group in groups_of(roles, rows)]
    together = roles.teacher.evaluate_groups(groups)
    assert len(forwards) == 1
    for group, velocity in zip(groups, together, strict=True):
        alone = group.field(group.x, group.t, **group.condition)
        torch.testing.assert_close(velocity, alone, rtol=1e-6, atol=1e-6)
        assert velocity.shape == group.x.shape


def test_fields_are_a_shared_backbone() -> None:
    roles = roles_on(teacher())
    assert isinstance(roles.student, SharedBackbone)
    assert roles.student.backbone is roles.teacher.backbone
    assert roles.student.backbone is not roles_on(teacher()).student.backbone


@pytest.mark.parametrize("name", ["mlp", "dit"])
def test_untrained_roles_equal_the_user_module_bit_for_bit(name: str) -> None:
    module = teacher(name)
    roles = roles_on(module, trained=False)
    x, t, label = inputs(5)
    expected = module(x, t, label)
    for field in (roles.teacher, roles.auxiliary, roles.student):
        assert torch.equal(field(x, t, label=label), expected)


def test_the_teacher_stays_the_user_module_when_roles_are_trained() -> None:
    module = teacher()
    roles = roles_on(module)
    x, t, label = inputs(5)
    assert torch.equal(roles.teacher(x, t, label=label), module(x, t, label))
    velocities = [field(x, t, label=label) for field in (roles.teacher, roles.auxiliary, roles.student)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (velocities[one] - velocities[other]).abs().max() > 1e-2


def test_gradients_reach_the_rows_of_their_role_only() -> None:
    roles = roles_on(teacher())
    groups = groups_of(roles, [("teacher", 3), ("auxiliary", 2), ("student", 4)])
    _, auxiliary, student = roles.teacher.evaluate_groups(groups)
    backward(student.square().sum(), retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in roles.parameters("auxiliary"))
    assert all(p.grad is not None and p.grad.any() for p in roles.parameters("student"))
    grouped = [p.grad.clone() for p in roles.parameters("student") if p.grad is not None]
    roles.network.zero_grad()
    backward(groups[2].field(groups[2].x, groups[2].t, **groups[2].condition).square().sum())
    for parameter, expected in zip(roles.parameters("student"), grouped, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    roles.network.zero_grad()
    backward(auxiliary.sum())
    assert all(p.grad is None or not p.grad.any() for p in roles.parameters("student"))
    trained = {id(p) for role in roles.roles for p in roles.parameters(role)}
    assert all(p.grad is None and not p.requires_grad for p in roles.network.parameters() if id(p) not in trained)


def test_gradients_reach_x() -> None:
    roles = roles_on(teacher())
    groups = groups_of(roles, [("teacher", 3), ("student", 2)])
    x = groups[0].x.requires_grad_()
    backward(roles.teacher.evaluate_groups(groups)[0].sum())
    assert x.grad is not None
    assert x.grad.flatten(1).norm(dim=1).min() > 0


def test_the_user_module_is_unchanged() -> None:
    module = teacher().train()
    module.get_submodule("enter").requires_grad_(False)
    before = copy.deepcopy(module)
    roles = roles_on(module)
    roles.network.eval()
    velocities = roles.student.evaluate_groups(groups_of(roles, [("teacher", 3), ("student", 4)]))
    backward(velocities[1].sum())
    assert str(module) == str(before)
    assert module.training
    for (name, mine), (_, theirs) in zip(module.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        assert mine.requires_grad == theirs.requires_grad
        assert mine.grad is None
    assert module.state_dict().keys() == before.state_dict().keys()
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not part._backward_hooks


def test_weights_are_the_same_memory() -> None:
    module = teacher()
    roles = roles_on(module)
    x, t, label = inputs(3)
    before = roles.student(x, t, label=label)
    with torch.no_grad():
        module.get_parameter("leave.bias").add_(1.0)
    torch.testing.assert_close(roles.student(x, t, label=label), before + 1.0)
    theirs = {p.data_ptr() for p in module.parameters()} | {b.data_ptr() for b in module.buffers()}
    trained = {p.data_ptr() for role in roles.roles for p in roles.parameters(role)}
    mine = {p.data_ptr() for p in roles.network.parameters()} | {b.data_ptr() for b in roles.network.buffers()}
    assert mine - trained == theirs


@pytest.mark.parametrize("name", ["mlp", "dit"])
def test_merged_equals_live(name: str) -> None:
    module = teacher(name)
    roles = roles_on(module)
    merged = roles.merged("student")
    x, t, label = inputs(5)
    live = roles.student(x, t, label=label)
    torch.testing.assert_close(merged(x, t, label), live, rtol=1e-5, atol=1e-5)
    assert merged.state_dict().keys() == module.state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())
    assert not {p.data_ptr() for p in merged.parameters()} & {p.data_ptr() for p in module.parameters()}


def test_a_bfloat16_backbone_keeps_float32_roles() -> None:
    roles = roles_on(teacher().to(torch.bfloat16))
    exact = roles_on(teacher())
    for role in roles.roles:
        exact.load_state_dict(role, roles.state_dict(role))
    x, t, label = inputs(5)
    velocity = roles.student(x.bfloat16(), t, label=label)
    reference = exact.student(x, t, label=label)
    assert velocity.dtype == torch.bfloat16
    assert (velocity.float() - reference).norm() < 0.05 * reference.norm()
    backward(velocity.float().sum())
    assert all(p.dtype == torch.float32 and p.grad is not None for p in roles.parameters("student"))
    assert all(p.dtype == torch.bfloat16 for p in roles.merged("student").parameters())
    torch.testing.assert_close(roles.merged("student")(x.bfloat16(), t, label), velocity, rtol=0.1, atol=0.1)


def test_autocast_reaches_grouped_rows() -> None:
    roles = roles_on(teacher())
    groups = groups_of(roles, [("teacher", 3), ("student", 2)])
    exact = roles.teacher.evaluate_groups(groups)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = roles.teacher.evaluate_groups(groups)
    for one, other in zip(rough, exact, strict=True):
        assert (one.float() - other).norm() < 0.05 * other.norm()


def test_lora_linear_is_the_formula() -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 6)
    rows = RowSpans()
    part = LowRank(base, 2, 1.5, torch.Generator().manual_seed(0))
    nn.init.normal_(part.lora_B)
    layer = LoRALinear(base, {"student": part}, rows)
    x = torch.randn(7, 3, 5)
    expected = base(x)
    assert torch.equal(layer(x), expected)
    rows.assign([(None, 2), ("student", 4), (None, 1)])
    expected[2:6] += 1.5 * x[2:6] @ part.lora_A.T @ part.lora_B.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(part.delta(), 1.5 * part.lora_B @ part.lora_A)
    with pytest.raises(ValueError, match="an adapted Linear got 3 rows in a batch of 7"):
        layer(x[:3])
    assert not hasattr(layer, "weight")


def test_state_of_a_role_round_trips() -> None:
    roles, other = roles_on(teacher()), roles_on(teacher(), trained=False)
    state = roles.state_dict("student")
    assert {name.rpartition(".")[2] for name in state} == {"lora_A", "lora_B"}
    other.load_state_dict("student", state)
    x, t, label = inputs(3)
    assert torch.equal(other.student(x, t, label=label), roles.student(x, t, label=label))
    assert torch.equal(other.auxiliary(x, t, label=label), other.teacher(x, t, label=label))


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    roles = roles_on(teacher())
    before = {name: tensor.clone() for name, tensor in roles.state_dict("student").items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del state["enter.lora_A"]
    state["entry.lora_A"] = torch.zeros(1)
    state["leave.lora_B"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="does not fit role 'student'") as caught:
        roles.load_state_dict("student", state)
    for part in ("missing enter.lora_A", "unexpected entry.lora_A", "leave.lora_B has shape (2, 2), expected (16, 4)"):
        assert part in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in roles.state_dict("student").items())


def test_seeds_and_roles_begin_differently() -> None:
    one, same, other = (LoRARoles(teacher(), rank=2, alpha=2.0, seed=seed) for seed in (0, 0, 1))
    first = one.state_dict("student")["enter.lora_A"]
    assert torch.equal(first, same.state_dict("student")["enter.lora_A"])
    assert not torch.equal(first, other.state_dict("student")["enter.lora_A"])
    assert not torch.equal(first, one.state_dict("auxiliary")["enter.lora_A"])
    assert first.abs().max() <= 1 / 4


def test_making_roles_draws_no_global_random_numbers() -> None:
    module = teacher()
    before = torch.get_rng_state()
    LoRARoles(module, rank=2, alpha=2.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (None, {"condition.time_in", "condition.out", "modulation", "enter", "leave", "skip", *BLOCKS}),
        (["out"], {"condition.out"}),
        (["block_in.1", "enter"], {"block_in.1", "enter"}),
    ],
    ids=["all", "last part", "two"],
)
def test_targets_choose_layers(targets: list[str] | None, layers: set[str]) -> None:
    assert roles_on(teacher(), targets=targets).layers.keys() == layers


def test_a_layer_used_under_two_names_stays_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.second(self.first(x))
            return out

    roles = roles_on(Twice())
    assert roles.network.first is roles.network.second
    x, t = torch.randn(3, 4), torch.rand(3)
    torch.testing.assert_close(roles.merged("student")(x, t), roles.student(x, t))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, r"alpha must be a positive number, got 0\.0"),
        ({"alpha": float("inf")}, "alpha must be a positive number, got inf"),
        ({"roles": []}, "roles must be one or more different identifiers"),
        ({"roles": ["student", "student"]}, "roles must be one or more different identifiers"),
        ({"roles": ["a.b"]}, "roles must be one or more different identifiers"),
        ({"targets": ["entr"]}, "no Linear is called 'entr'; did you mean 'enter'"),
        ({"targets": []}, "there is no Linear to adapt"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRARoles(teacher(), **{"rank": 4, "alpha": 4.0, **options})  # type: ignore[arg-type]


def test_an_unknown_role_is_refused() -> None:
    roles = LoRARoles(teacher(), rank=2, alpha=2.0, roles=("student",))
    for call in (lambda: roles.auxiliary, lambda: roles.parameters("studnet"), lambda: roles.merged("auxiliary")):
        with pytest.raises(ValueError, match=r"unknown role '.*Valid: student"):
            call()


def test_modules_that_cannot_be_copied_are_refused() -> None:
    module = teacher()
    module.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"module \(MLP\) cannot be copied.*lock"):
        LoRARoles(module, rank=2, alpha=2.0)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_modules_without_shapes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"a parameter without a shape yet \(0\.weight\): run it once before"):
        LoRARoles(nn.Sequential(nn.LazyLinear(3)), rank=2, alpha=2.0)
