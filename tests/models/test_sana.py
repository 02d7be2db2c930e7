"""SANA as velocity fields: the transformer's own numbers, by rows, roles and rollouts."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast import integrate, mean_velocity, mean_velocity_pair
from mfd_fast.fields import autocast, reversed_time
from mfd_fast.models.sana import SanaNetwork, SanaRoles
from mfd_fast.models.sana_text import cut_padding
from mfd_fast.types import RowGroup, SharedBackbone

Make = Callable[..., Any]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": "rms_norm_across_heads"},
        {"patch_size": 2, "interpolation_scale": 2.0},
        {"timestep_scale": 0.001},
        {"attention_bias": True},
    ],
    ids=["plain", "normed queries and keys", "patches with positions", "scaled times", "with bias"],
)
def test_equals_the_transformers_own_forward(make_sana: Make, sana_batch: Any, options: dict[str, Any]) -> None:
    network, batch = SanaNetwork(make_sana(**options)), sana_batch(3)
    batch.x = batch.x[..., :6]  # not square
    expected = network.reference(batch.x, batch.t, **batch.condition)
    velocity = network(batch.x, batch.t, **batch.condition)
    assert velocity.shape == batch.x.shape
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    (prepared,) = network.prepare_conditions([(network, batch.condition)])
    assert prepared["text"]["keys"].shape[3] == int(batch.condition["prompt_mask"].sum(1).max())
    again = network(batch.x, batch.t, **prepared)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_without_a_mask_all_tokens_count(make_sana: Make, sana_batch: Any) -> None:
    network, batch = SanaNetwork(make_sana()), sana_batch(3)
    embeds = batch.condition["prompt_embeds"]
    expected = network.reference(batch.x, batch.t, embeds)
    torch.testing.assert_close(network(batch.x, batch.t, embeds), expected)
    (prepared,) = network.prepare_conditions([(network, {"prompt_embeds": embeds})])
    torch.testing.assert_close(network(batch.x, batch.t, **prepared), expected)
    shared = network(batch.x, batch.t, embeds[:1])
    torch.testing.assert_close(shared, network.reference(batch.x, batch.t, embeds[:1].expand(3, -1, -1)))


def test_an_euler_step_is_a_step_of_the_scheduler(make_sana: Make, sana_batch: Any) -> None:
    """Sign and scale of velocity and time: noise is at 1, and the network is told thousandths."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    network, batch = SanaNetwork(make_sana()), sana_batch(2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x = batch.x
    for now, then, time in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], scheduler.timesteps, strict=True):
        with torch.no_grad():
            output = network.transformer(
                x,
                encoder_hidden_states=batch.condition["prompt_embeds"],
                encoder_attention_mask=batch.condition["prompt_mask"],
                timestep=time.expand(2),
                return_dict=False,
            )[0]
        theirs = scheduler.step(output, time, x, return_dict=False)[0]
        ours = integrate(network, x, float(now), float(then), steps=1, condition=batch.condition)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        x = theirs
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_counts_of_the_real_transformer() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        roles = SanaRoles(diffusers.SanaTransformer2DModel())
    assert sum(parameter.numel() for parameter in roles.module.parameters()) == 1_604_462_752
    assert len(roles.layers) == 20 * 2 * 3
    for role in ("student", "auxiliary"):
        assert sum(parameter.numel() for parameter in roles.parameters(role)) == 34_406_400
        assert all(parameter.dtype == torch.float32 for parameter in roles.parameters(role))
    assert roles.alpha / roles.rank == 1


def plain_pair(
    network: SanaNetwork, auxiliary: SanaNetwork, batch: Any, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """The definition: one row and one Euler step at a time on the transformers' own forwards."""
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row in range(len(batch.x)):
        own = {name: value[row : row + 1] for name, value in batch.condition.items()}
        steps = max(1, math.ceil(float(batch.t[row] - batch.r[row]) / 0.05 - 1e-6))
        width = (batch.t[row] - batch.r[row]) / steps
        for result, field, scale in zip(results, (network, auxiliary), (guidance_scale, 1.0), strict=True):
            y = batch.x[row : row + 1]
            for step in range(steps):
                now = (batch.t[row] - step * width)[None]
                v = field.reference(y, now, **own)
                if scale != 1.0:
                    away = field.reference(y, now, **batch.null)
                    v = away + scale * (v - away)
                y = y - width * v
            result.append((batch.x[row : row + 1] - y) / (batch.t[row] - batch.r[row]))
    return torch.cat(results[0]), torch.cat(results[1])


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# 4 and 8 rows: as many as the latents have channels, and as wide as they are.
@pytest.mark.parametrize("rows", [1, 3, 4, 8])
@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
def test_pair_equals_a_plain_loop(
    make_sana: Make, sana_batch: Any, randomize: Any, rows: int, guidance_scale: float
) -> None:
    roles, batch = SanaRoles(make_sana(), rank=4, lora_alpha=8), sana_batch(rows)
    randomize(roles)
    options: dict[str, Any] = {}
    if guidance_scale != 1.0:
        options = {"negative_condition": batch.null, "guidance_scale": guidance_scale}
    options |= {"condition": batch.condition, "step_size": 0.05}
    ours = mean_velocity_pair(roles.teacher, roles.auxiliary, batch.x, batch.t, batch.r, **options)
    theirs = plain_pair(roles.module, roles.merged("auxiliary"), batch, guidance_scale)
    assert relative(ours[0], theirs[0]) < 1e-5
    assert relative(ours[1], theirs[1]) < 1e-5
    assert relative(ours[0], ours[1]) > 0.1


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_untrained_roles_have_one_mean_velocity(make_sana: Make, sana_batch: Any, rows: int) -> None:
    roles, batch = SanaRoles(make_sana(), rank=4), sana_batch(rows)
    teacher, auxiliary = mean_velocity_pair(
        roles.teacher, roles.auxiliary, batch.x, batch.t, batch.r, condition=batch.condition
    )
    assert relative(auxiliary, teacher) < 1e-6
    if rows % 2 == 0:  # even batches: both halves of every product are computed alike on one thread
        assert torch.equal(teacher, auxiliary)


def counted(module: nn.Module) -> list[int]:
    """Rows of the first input in every call of ``module``."""
    calls: list[int] = []
    module.register_forward_hook(lambda _, inputs, output: calls.append(len(inputs[0])))
    return calls


def test_one_forward_a_step_and_one_text_a_rollout(make_sana: Make, sana_batch: Any, randomize: Any) -> None:
    """Three groups run as one batch; the null prompt is one row of the text, however large the batch."""
    roles, batch = SanaRoles(make_sana(), rank=4), sana_batch(3)
    randomize(roles)
    forwards = counted(roles.network.transformer.patch_embed)
    texts = counted(roles.network.transformer.caption_projection)
    arguments = {"condition": batch.condition, "negative_condition": batch.null, "guidance_scale": 4.5, "steps": 6}
    mean_velocity_pair(roles.teacher, roles.auxiliary, batch.x, 0.9, 0.1, **arguments)
    assert forwards == [9] * 6
    assert texts == [3 + 1 + 3]
    mean_velocity(roles.teacher, batch.x, 0.9, 0.1, **arguments)
    assert forwards[6:] == [6] * 6
    assert texts[1:] == [3 + 1]
    mean_velocity(roles.student, batch.x, 0.9, 0.1, steps=2, condition=batch.condition)
    assert texts[2:] == [3]


def test_the_text_is_never_stale(make_sana: Make, sana_batch: Any, randomize: Any) -> None:
    """Weights or prompts that change between two rollouts are seen, also by conditions that are the same object."""
    roles, batch = SanaRoles(make_sana(), rank=4), sana_batch(2)
    randomize(roles)

    def rollout() -> Tensor:
        return mean_velocity(roles.auxiliary, batch.x, batch.t, batch.r, steps=2, condition=batch.condition)

    before = rollout()
    with torch.no_grad():
        for name, parameter in zip(roles.state_dict("auxiliary"), roles.parameters("auxiliary"), strict=True):
            if "attn2.to_k" in name or "attn2.to_v" in name:
                parameter.mul_(1.5)
    changed = rollout()
    assert relative(changed, before) > 1e-3
    merged = roles.merged("auxiliary")
    expected = mean_velocity(merged.reference, batch.x, batch.t, batch.r, steps=2, condition=batch.condition)
    assert relative(changed, expected) < 1e-5
    batch.condition["prompt_embeds"].mul_(0.5)
    assert relative(rollout(), changed) > 1e-3


def test_gradients_through_a_rollout_reach_the_text(make_sana: Make, sana_batch: Any, randomize: Any) -> None:
    roles, batch = SanaRoles(make_sana(), rank=4), sana_batch(2)
    randomize(roles)
    u = mean_velocity(roles.student, batch.x, 0.9, 0.5, steps=2, condition=batch.condition, differentiable=True)
    ours = torch.autograd.grad(u.square().sum(), roles.parameters("student"))
    x = batch.x
    for now in (0.9, 0.7):
        x = x - 0.2 * roles.student(x, torch.full((2,), now), **batch.condition)
    theirs = torch.autograd.grad(((batch.x - x) / 0.4).square().sum(), roles.parameters("student"))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_checkpointed_blocks_have_the_same_gradients(make_sana: Make, sana_batch: Any, randomize: Any) -> None:
    """Blocks are computed again after another role has run, and still with their own."""
    batch = sana_batch(3)
    gradients, saved = [], []
    for checkpoint_blocks in (False, True):
        roles = SanaRoles(make_sana(), rank=4, checkpoint_blocks=checkpoint_blocks)
        randomize(roles)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = roles.student(batch.x, batch.t, **batch.condition).square().sum()
        saved.append(sum(sizes))
        roles.auxiliary(batch.x, batch.t, **batch.condition)
        gradients.append(torch.autograd.grad(loss, roles.parameters("student")))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert saved[1] < 0.5 * saved[0]


def test_fields_run_as_groups_of_one_backbone(make_sana: Make, sana_batch: Any, randomize: Any) -> None:
    roles, batch = SanaRoles(make_sana(), rank=4), sana_batch(3)
    randomize(roles)
    fields = [roles.teacher, roles.teacher, roles.auxiliary, roles.student]
    conditions = [batch.condition, batch.null, batch.condition, batch.condition]
    assert all(isinstance(field, SharedBackbone) and field.backbone is roles for field in fields)
    texts = roles.prepare(list(zip(fields, conditions, strict=True)))
    forwards = counted(roles.network.transformer.patch_embed)
    groups = [RowGroup(field, batch.x, batch.t, text) for field, text in zip(fields, texts, strict=True)]
    together = roles.teacher.evaluate_groups(groups)
    assert forwards == [12]
    for field, condition, velocity in zip(fields, conditions, together, strict=True):
        torch.testing.assert_close(velocity, field(batch.x, batch.t, **condition), rtol=1e-4, atol=1e-5)
    assert torch.equal(roles.teacher.evaluate_groups(groups[:1])[0], groups[0].field(batch.x, batch.t, **texts[0]))


def test_groups_prepared_apart_still_run(make_sana: Make, sana_batch: Any, randomize: Any) -> None:
    """Texts of different lengths cannot share a batch: one forward each, the same numbers."""
    roles, batch = SanaRoles(make_sana(), rank=4), sana_batch(3)
    (long,) = roles.prepare([(roles.teacher, batch.condition)])
    (short,) = roles.prepare([(roles.auxiliary, batch.null)])
    groups = [RowGroup(roles.teacher, batch.x, batch.t, long), RowGroup(roles.auxiliary, batch.x, batch.t, short)]
    first, second = roles.teacher.evaluate_groups(groups)
    torch.testing.assert_close(first, roles.module.reference(batch.x, batch.t, **batch.condition))
    null = {name: value.expand(3, *value.shape[1:]) for name, value in batch.null.items()}
    torch.testing.assert_close(second, roles.module.reference(batch.x, batch.t, **null))


@pytest.mark.slow
def test_rows_of_any_batch_size_are_one_graph(
    make_sana: Make, sana_batch: Any, randomize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher with both prompts and auxiliary, adapters on their rows only: no graph break, and two graphs (one for a
    single live row) for every number of rows, however many are still under way.
    """
    roles, graphs, compile_ = SanaRoles(make_sana(num_layers=1), rank=4), list[int](), torch.compile
    randomize(roles)

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(compile_, backend=count, fullgraph=True))
    # On the CPU torch's convolution takes another way, and so the compiler another graph, from 16 network rows on.
    for rows in (5, 3, 1, 4):
        batch = sana_batch(rows)
        arguments = {"condition": batch.condition, "negative_condition": batch.null, "guidance_scale": 4.5}
        ours, theirs = (
            mean_velocity_pair(
                roles.teacher,
                roles.auxiliary,
                *(batch.x, batch.t, batch.r),
                step_size=0.1,
                runner=runner,
                **arguments,
            )
            for runner in ("compiled", "eager")
        )
        assert all(relative(one, other) < 1e-5 for one, other in zip(ours, theirs, strict=True))
    assert len(graphs) == 2


def test_a_bfloat16_backbone_gets_float32_times(make_sana: Make, sana_batch: Any, randomize: Any) -> None:
    exact, rough = (SanaRoles(make_sana().to(dtype), rank=4) for dtype in (torch.float32, torch.bfloat16))
    randomize(exact)
    randomize(rough)
    times: list[Tensor] = []
    rough.network.transformer.time_embed.register_forward_pre_hook(lambda _, inputs: times.append(inputs[0]))
    batch = sana_batch(3)
    arguments = {"condition": batch.condition, "negative_condition": batch.null, "guidance_scale": 4.5}
    with pytest.raises(TypeError, match=r"pass field_dtype=torch\.bfloat16"):
        mean_velocity_pair(rough.teacher, rough.auxiliary, batch.x, batch.t, batch.r, **arguments)
    ours = mean_velocity_pair(
        rough.teacher, rough.auxiliary, batch.x, batch.t, batch.r, field_dtype=torch.bfloat16, **arguments
    )
    theirs = mean_velocity_pair(exact.teacher, exact.auxiliary, batch.x, batch.t, batch.r, **arguments)
    assert {time.dtype for time in times} == {torch.float32}
    assert all(
        one.dtype == torch.float32 and relative(one, other) < 0.05 for one, other in zip(ours, theirs, strict=True)
    )


def test_wrappers_pass_the_preparation_on(make_sana: Make, sana_batch: Any, randomize: Any) -> None:
    roles, batch = SanaRoles(make_sana(), rank=4), sana_batch(2)
    randomize(roles)
    texts = counted(roles.network.transformer.caption_projection)
    fields = [autocast(field, torch.bfloat16) for field in (roles.teacher, roles.auxiliary)]
    arguments = {"condition": batch.condition, "negative_condition": batch.null, "guidance_scale": 4.5, "steps": 3}
    ours = mean_velocity_pair(*fields, batch.x, 0.9, 0.1, **arguments)
    assert texts == [5]
    theirs = mean_velocity_pair(roles.teacher, roles.auxiliary, batch.x, 0.9, 0.1, **arguments)
    assert all(relative(one, other) < 0.05 for one, other in zip(ours, theirs, strict=True))
    texts.clear()
    network = SanaNetwork(make_sana())
    own = counted(network.transformer.caption_projection)
    u = mean_velocity(reversed_time(network), batch.x, 0.1, 0.9, steps=3, condition=batch.condition)
    assert own == [2]
    assert relative(-u, mean_velocity(network, batch.x, 0.9, 0.1, steps=3, condition=batch.condition)) < 1e-6


def test_the_transformer_stays_as_it_is(make_sana: Make, sana_batch: Any, randomize: Any) -> None:
    transformer, batch = make_sana(), sana_batch(2)
    names, before = str(transformer), SanaNetwork(make_sana()).reference(batch.x, batch.t, **batch.condition)
    roles = SanaRoles(transformer, rank=4)
    randomize(roles)
    roles.auxiliary(batch.x, batch.t, **batch.condition)
    assert str(transformer) == names
    assert torch.equal(SanaNetwork(transformer).reference(batch.x, batch.t, **batch.condition), before)


def test_padding_is_cut_to_what_is_used() -> None:
    embeds, mask = torch.randn(2, 6, 3), torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0]])
    cut = cut_padding({"prompt_embeds": embeds, "prompt_mask": mask})
    assert torch.equal(cut["prompt_embeds"], embeds[:, :4])
    assert torch.equal(cut["prompt_mask"], mask[:, :4])
    assert cut_padding({"prompt_embeds": embeds})["prompt_embeds"] is embeds
    with pytest.raises(ValueError, match="at least one token of every prompt, got none in row 1"):
        cut_padding({"prompt_embeds": embeds, "prompt_mask": mask * torch.tensor([[1], [0]])})


def test_bad_input_is_named(make_sana: Make, sana_batch: Any) -> None:
    with pytest.raises(TypeError, match="must be a diffusers SanaTransformer2DModel, got Linear"):
        SanaRoles(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="takes guidance as an input"):
        SanaNetwork(make_sana(guidance_embeds=True))
    with pytest.raises(ValueError, match="got 4 in and 8 out"):
        SanaNetwork(make_sana(out_channels=8))
    roles, batch = SanaRoles(make_sana(), rank=4), sana_batch(2)
    with pytest.raises(ValueError, match="needs prompt_embeds"):
        roles.teacher(batch.x, batch.t)
    with pytest.raises(ValueError, match=r"may have prompt_mask .* got prompt"):
        mean_velocity(roles.teacher, batch.x, 0.9, 0.1, condition={"prompt": batch.x})
    with pytest.raises(ValueError, match=r"the shape \[2, 12\] of prompt_embeds, got \[2, 3\]"):
        roles.teacher(batch.x, batch.t, prompt_embeds=batch.condition["prompt_embeds"], prompt_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="prompt_embeds must have 2 rows"):
        roles.teacher(batch.x, batch.t, prompt_embeds=torch.randn(3, 12, 16))
    with pytest.raises(ValueError, match=r"prompt_embeds must have shape \[B, L, C\]"):
        roles.teacher(batch.x, batch.t, prompt_embeds=torch.randn(2, 16))
    with pytest.raises(ValueError, match="field of another backbone"):
        roles.prepare([(SanaRoles(make_sana(), rank=4).teacher, batch.condition)])
    with pytest.raises(ValueError, match="no Linear is called 'to_x'"):
        SanaRoles(make_sana(), rank=4, targets=("to_x",))
    with pytest.raises(ValueError, match=r"time_range \[0, 1\]"):
        mean_velocity(roles.teacher, batch.x, 900.0, 100.0, condition=batch.condition)
