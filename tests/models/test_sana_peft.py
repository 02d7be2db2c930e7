"""Roles on the adapters of a training script: the script's own loops, and the released script's arithmetic."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import add_adapters
from torch import Tensor, nn

from mfd_fast import mean_velocity_pair
from mfd_fast.models.sana_peft import roles_from_peft
from mfd_fast.released import released_arithmetic

Make = Callable[..., Any]


def with_adapters(make_sana: Make, **options: Any) -> Any:
    given = {"r": 4, "lora_alpha": 8, **options}
    return add_adapters(make_sana(num_layers=1), ["default", "aux"], **given)


def switched(transformer: Any, adapter: str | None) -> Callable[..., Tensor]:
    """The transformer's own forward with one adapter, or none, switched on for the call."""

    def velocity(x: Tensor, t: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
        if adapter is None:
            transformer.disable_adapters()
        else:
            transformer.enable_adapters()
            transformer.set_adapter(adapter)
        low = x.dtype != torch.float32 or prompt_embeds.dtype != torch.float32
        # As accelerate runs it: under autocast, whatever the type of the state.
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            outputs: tuple[Tensor, ...] = transformer(
                x, prompt_embeds, t * 1000.0, encoder_attention_mask=prompt_mask, return_dict=False
            )
        return outputs[0]

    return velocity


def test_roles_are_the_transformer_with_its_adapters_switched(make_sana: Make, sana_batch: Any) -> None:
    transformer, batch = with_adapters(make_sana), sana_batch(3)
    roles = roles_from_peft(transformer)
    for role, adapter in ((roles.teacher, None), (roles.auxiliary, "aux"), (roles.student, "default")):
        expected = switched(transformer, adapter)(batch.x, batch.t, **batch.condition)
        velocity = role(batch.x, batch.t, **batch.condition)
        torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_scripts_optimiser_trains_the_roles(make_sana: Make, sana_batch: Any) -> None:
    transformer, batch = with_adapters(make_sana), sana_batch(2)
    roles = roles_from_peft(transformer)
    transformer.set_adapter("default")
    mine = [value for name, value in transformer.named_parameters() if ".default." in name]
    assert {id(value) for value in mine} == {id(value) for value in roles.parameters("student")}
    before = roles.student(batch.x, batch.t, **batch.condition)
    before.square().mean().backward()
    assert all(value.grad is not None for value in mine)
    torch.optim.SGD(mine, lr=0.1).step()
    after = roles.student(batch.x, batch.t, **batch.condition)
    assert (after - before).norm() > 1e-3 * before.norm()
    expected = switched(transformer, "default")(batch.x, batch.t, **batch.condition)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_dropout": 0.1}, "without dropout or DoRA"),
        ({"use_dora": True}, "without dropout or DoRA"),
        ({"rank_pattern": {"to_q": 2}}, "must have one rank and one scale, got rank 2 scale 4, rank 4 scale 2"),
    ],
)
def test_other_adapters_are_refused(make_sana: Make, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        roles_from_peft(with_adapters(make_sana, **options))


def test_missing_adapters_are_named(make_sana: Make) -> None:
    with pytest.raises(ValueError, match="has no adapters of peft"):
        roles_from_peft(make_sana())
    with pytest.raises(ValueError, match="has no adapter called 'auxx'; did you mean 'aux'"):
        roles_from_peft(with_adapters(make_sana), auxiliary="auxx")
    transformer = with_adapters(make_sana)
    transformer.fuse_lora(adapter_names=["aux"])
    with pytest.raises(ValueError, match="unmerge them first"):
        roles_from_peft(transformer)


def released_loop(
    transformer: Any, x: Tensor, t: Tensor, r: Tensor, batch: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The released script's two loops for one sample, in the types it runs in."""
    t, r = ((time.to(dtype) * 1000.0).round() / 1000.0 for time in (t, r))
    x = x.to(dtype)
    teacher, auxiliary = switched(transformer, None), switched(transformer, "aux")
    results = []
    for is_teacher in (True, False):
        grid = (torch.linspace(t.item(), r.item(), -int(-(t.item() - r.item()) // 0.02) + 1) * 1000.0).round() / 1000.0
        y = x
        for now, then in pairwise(grid):
            now, then = torch.tensor([now], dtype=dtype), torch.tensor([then], dtype=dtype)
            if is_teacher:
                both = {name: torch.cat([batch.null[name], batch.condition[name]]) for name in batch.null}
                away, own = teacher(torch.cat([y] * 2), torch.cat([now] * 2), **both).float().chunk(2)
                velocity = away + 4.5 * (own - away)
            else:
                velocity = auxiliary(y, now, **batch.condition).float()
            y = y - (now - then) * velocity
        results.append((x - y) / (t - r))
    return results[0], results[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_arithmetic_to_the_bit(make_sana: Make, sana_batch: Any, dtype: torch.dtype) -> None:
    transformer, batch = low_precision(with_adapters(make_sana), dtype), sana_batch(1, side=4)
    for part in (batch.condition, batch.null):
        part |= {name: value.to(dtype) for name, value in part.items()}
    ours = released_arithmetic(
        switched(transformer, None),
        switched(transformer, "aux"),
        *(batch.x, batch.t, batch.r),
        condition=batch.condition,
        negative_condition=batch.null,
        dtype=dtype,
    )
    theirs = released_loop(transformer, batch.x, batch.t, batch.r, batch, dtype)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def low_precision(transformer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """All weights in ``dtype``; diffusers would say that some models keep a few in float32."""
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    return transformer


def test_rounded_times_are_what_separates_the_released_arithmetic(make_sana: Make, sana_batch: Any) -> None:
    """From times in thousandths on a grid in thousandths both are the same; otherwise they differ a little."""
    transformer, batch = with_adapters(make_sana), sana_batch(3, side=4)
    roles = roles_from_peft(transformer)
    arguments = {"condition": batch.condition, "negative_condition": batch.null, "guidance_scale": 4.5}
    fields = (roles.teacher, roles.auxiliary)

    def both(t: Tensor, r: Tensor) -> list[float]:
        ours = mean_velocity_pair(*fields, batch.x, t, r, step_size=0.02, **arguments)
        with torch.no_grad():
            released = released_arithmetic(*fields, batch.x, t, r, dtype=torch.float32, **arguments)
        return [float((one - other).norm() / other.norm()) for one, other in zip(ours, released, strict=True)]

    t, r = torch.tensor([0.9, 0.62, 0.4]), torch.tensor([0.5, 0.6, 0.4])
    assert max(both(t, r)) < 1e-5
    assert 1e-5 < max(both(t + 0.0004, r + 0.0001)) < 0.1


def test_bfloat16_times_cost_accuracy(make_sana: Make, sana_batch: Any) -> None:
    """What the released types cost on a float32 network, and float32 times do not."""
    transformer, batch = with_adapters(make_sana), sana_batch(2, side=4)
    roles = roles_from_peft(transformer)
    arguments = {"condition": batch.condition, "negative_condition": batch.null, "guidance_scale": 4.5}
    fields = (roles.teacher, roles.auxiliary)
    exact = mean_velocity_pair(*fields, batch.x.double().float(), batch.t, batch.r, **arguments)

    def coarse(x: Tensor, t: Tensor, field: Any, **condition: Tensor) -> Tensor:
        return field(x.float(), t, **condition)

    with torch.no_grad():
        rounded = released_arithmetic(
            *(lambda x, t, field=field, **rows: coarse(x, t, field, **rows) for field in fields),
            *(batch.x, batch.t, batch.r),
            **arguments,
        )
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(rounded, exact, strict=True)]
    assert min(errors) > 1e-3
