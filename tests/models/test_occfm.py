"""The transition model of OccFM against a second statement of it, and the field around it."""

import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transition import SMALL, fill_by_name, inputs, small
from torch import Tensor, nn

from mfd_fast.guidance import FixedGuidance
from mfd_fast.intervals import shift_times
from mfd_fast.models import build_model, describe_model, model_from_description, null_condition
from mfd_fast.models.lora import LoRARoles
from mfd_fast.models.occfm import OccupancyVelocity, TransitionModel
from mfd_fast.presets import PRESETS
from mfd_fast.settings_io import load_settings
from mfd_fast.student import Student
from mfd_fast.types import RowGroup

sys.path.insert(0, str(Path(__file__).parent))
import occfm_reference
from occfm_reference import Sizes


@pytest.mark.parametrize(
    ("changes", "length"),
    [({}, 6), ({"trajectory_length": 3}, 3), ({"channel_multi": [2]}, 6), ({"init_kernel_size": 3}, 6)],
    ids=["whole", "history-only", "one-level", "small-kernel"],
)
def test_equals_the_second_statement(changes: dict[str, Any], length: int) -> None:
    model = small(**changes)
    x, t, trajectory = inputs()
    for poses in (trajectory, None):
        with torch.no_grad():
            expected = occfm_reference.velocity(model.state_dict(), Sizes(2, 4, length), x, t, poses)
            got = model(x, t, poses)
        assert expected.std() > 0.05
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_twelve_frames_on_a_side_of_their_own() -> None:
    model = small(frames=12, trajectory_length=12, input_size=(4, 4))
    x, t, trajectory = inputs(frames=12, side=4)
    with torch.no_grad():
        expected = occfm_reference.velocity(model.state_dict(), Sizes(2, 4, 12), x, t, trajectory)
        torch.testing.assert_close(model(x, t, trajectory).double(), expected, rtol=1e-4, atol=1e-4)


def test_heads_are_merged_without_transposing_back() -> None:
    # With the usual merge the released weights would compute something else; the difference is not small.
    model = small()
    block = model.downs[0][2].attn
    tokens = torch.randn(1, 1, 5, 16, generator=torch.Generator().manual_seed(3))
    q, k, v = block.qkv(tokens[0, 0]).unflatten(1, (3, 4, 4)).permute(1, 2, 0, 3)
    by_head = (q @ k.transpose(1, 2) / 2).softmax(-1) @ v  # [heads, tokens, 4]
    released = block.proj(by_head.reshape(5, 16))
    usual = block.proj(by_head.transpose(0, 1).reshape(5, 16))
    torch.testing.assert_close(block(tokens)[0, 0], released, rtol=1e-5, atol=1e-6)
    assert (released - usual).norm() > 0.3 * usual.norm()


@pytest.mark.parametrize(
    ("channels", "length", "millions"),
    [(16, 6, 11.830), (16, 12, 11.855), (4, 6, 11.792), (8, 6, 11.805), (64, 6, 11.984)],
)
def test_sizes_of_the_released_configurations(channels: int, length: int, millions: float) -> None:
    with torch.device("meta"):
        model = TransitionModel(channels, trajectory_length=length)
        shape = model(torch.empty(1, 12, channels, 50, 50), torch.empty(1), torch.empty(1, 12, 2)).shape
    assert shape == (1, 12, channels, 50, 50)
    assert round(sum(value.numel() for value in model.state_dict().values()) / 1e6, 3) == millions
    fixed = sum(value.numel() for value in model.buffers() if value.is_floating_point())
    assert fixed == 2500 * 128 + 12 * 128


@pytest.mark.parametrize(
    ("preset", "channels", "poses", "shown"),
    [
        ("occfm", 16, 6, 4),
        ("occfm-8x3090", 16, 6, 4),
        ("occfm-fut", 16, 12, 4),
        ("occfm-4c", 4, 6, 6),
        ("occfm-8c", 8, 6, 6),
        ("occfm-64c", 64, 6, 6),
    ],
)
def test_presets_are_the_released_configurations(preset: str, channels: int, poses: int, shown: int) -> None:
    """IN_CHANNELS, TRAJECTORY_LENGTH, HIST_LAST, LOSS and OPTIMIZATION of ``tools/cfgs``, with eight cards."""
    settings = load_settings(preset)
    data = settings.data.options
    assert data.get("channels", 16) == channels
    assert (data["history"], data["future"], data["history_last"]) == (6, 6, shown)
    assert settings.model.options == {"trajectory_length": poses}
    teacher, cards = settings.teacher, 8
    assert teacher.batch_size == 4 * cards
    windows = 28130 - 700 * 11
    assert teacher.updates == pytest.approx(200 * windows / teacher.batch_size, rel=0.01)
    assert teacher.condition_dropout == 0.2
    assert (teacher.times.law, teacher.times.mean, teacher.times.std) == ("logit-normal", 0.0, 1.0)
    assert teacher.ema_decay == 0.9999
    optimizer = teacher.optimizer
    assert optimizer.learning_rate == pytest.approx(2e-5 * 4 * cards)
    assert (optimizer.name, optimizer.weight_decay, optimizer.warmup_updates) == ("adamw", 0.01, 1000)
    assert (optimizer.schedule, optimizer.final_fraction, optimizer.clip_norm) == ("cosine", 0.2, 5.0)
    assert (settings.distill.guidance_scale, settings.evaluate.teacher_guidance_scale) == (2.0, 2.0)
    assert (max(settings.evaluate.teacher_steps), settings.evaluate.teacher_shift) == (10, 3.0)


def test_names_and_shapes_of_the_released_weights() -> None:
    with torch.device("meta"):
        state = TransitionModel(16, trajectory_length=6).state_dict()
    assert len(state) == 204
    some = {
        "pos_embed": (1, 2500, 128),
        "temp_embed": (1, 12, 128),
        "t_embedder.2.bias": (128,),
        "time_rel_pos_bias.relative_attention_bias.weight": (32, 8),
        "init_conv.weight": (64, 16, 1, 7, 7),
        "init_temporal_attn.fn.fn.fn.to_qkv.weight": (768, 64),
        "init_temporal_attn.fn.norm.gamma": (1, 64, 1, 1, 1),
        "downs.0.0.mlp.1.weight": (256, 128),
        "downs.0.0.block1.norm.gamma": (128, 1, 1, 1),
        "downs.1.0.res_conv.weight": (256, 128, 1, 1, 1),
        "downs.0.2.attn.qkv.weight": (384, 128),
        "downs.1.3.adaLN_modulation.1.weight": (1536, 128),
        "downs.0.5.weight": (128, 128, 1, 4, 4),
        "mid_spatial_attn.fn.fn.fn.to_out.weight": (256, 256),
        "mid_block2.block2.proj.weight": (256, 256, 1, 3, 3),
        "ups.0.0.block1.proj.weight": (128, 512, 1, 3, 3),
        "ups.0.4.weight": (128, 128, 1, 4, 4),
        "ups.1.3.mlp.fc1.weight": (256, 64),
        "final_conv.0.block1.proj.bias": (64,),
        "final_conv.1.weight": (16, 64, 1, 1, 1),
        "traj_encoder.0.weight": (128, 192),
    }
    assert {name: tuple(state[name].shape) for name in some} == some


def test_the_grid_of_places_is_one_cell_wider_than_the_frame() -> None:
    places = small().pos_embed[0]
    assert places.shape == (64, 16)
    # Cell 9 begins the second row of a grid of nine columns: row 1, column 0.
    expected = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    torch.testing.assert_close(places[9, :8], torch.tensor(expected))
    assert places[9, 8].item() == pytest.approx(math.sin(1))
    assert places[8, 0].item() == pytest.approx(math.sin(8))


def test_one_graph_and_equal_results() -> None:
    model = small()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for given in (inputs(), inputs()[:2]):
        torch.testing.assert_close(compiled(*given), model(*given), rtol=0, atol=0)


def test_gradients_reach_every_weight() -> None:
    model = small()
    model(*inputs()).square().sum().backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unreached == []


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)], ids=["float64", "bfloat16"]
)
def test_other_dtypes_follow_float32(dtype: torch.dtype, tolerance: float) -> None:
    x, t, trajectory = inputs()
    expected = small()(x, t, trajectory)
    got = small().to(dtype)(x.to(dtype), t, trajectory)
    assert got.dtype == dtype
    assert (got.float() - expected).norm() < tolerance * expected.norm()


def test_autocast_computes_in_low_precision() -> None:
    model, given = small(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(*given)
    expected = model(*given)
    assert 1e-4 * expected.norm() < (low.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (7, 8)}, "input_size must be divisible by 2 for 2 levels"),
        ({"model_channels": 32}, r"model_channels must be .* equal init_3d_conv_channels \* channel_multi\[0\] = 16"),
        ({"init_kernel_size": 4}, "init_kernel_size must be odd, got 4"),
        ({"spatial_attn_head": 3}, "divisible by spatial_attn_head = 3"),
        ({"channel_multi": []}, "channel_multi one or more positive numbers"),
        ({"trajectory_length": 0}, "trajectory_length must be an integer of at least 1"),
        ({"attention": "flesh"}, "unknown attention backend 'flesh'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_wrong_inputs_are_named() -> None:
    model = small()
    x, t, trajectory = inputs()
    with pytest.raises(ValueError, match=r"x must have shape \[B, 6, 4, 8, 8\], got \[2, 5, 4, 8, 8\]"):
        model(x[:, 1:], t, trajectory)
    with pytest.raises(ValueError, match=r"t must have shape \[2\]"):
        model(x, t[:1], trajectory)
    with pytest.raises(ValueError, match=r"trajectory must have shape \[2, L, 2\], got \[1, 6, 2\]"):
        model(x, t, trajectory[:1])
    with pytest.raises(ValueError, match=r"at least 6 poses \(trajectory_length\), got 5"):
        model(x, t, trajectory[:, 1:])


# The field around it.


def field(**changes: Any) -> OccupancyVelocity:
    model = build_model("occfm", (3, 4, 8, 8), None, **SMALL, **changes)
    filled: OccupancyVelocity = fill_by_name(model)
    return filled


def rows(count: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    sequence, t, trajectory = inputs(count, seed=1)
    return sequence[:, 3:], t / 1000, {"history": sequence[:, :3], "trajectory": trajectory}


def test_field_is_minus_the_model_at_the_mirrored_time() -> None:
    model = field()
    x, t, condition = rows()
    sequence = torch.cat([condition["history"], x], 1)
    expected = -model.network(sequence, 1000 * (1 - t), condition["trajectory"])[:, 3:]
    torch.testing.assert_close(model(x, t, **condition), expected, rtol=0, atol=0)
    nothing = -model.network(torch.cat([torch.zeros_like(x), x], 1), 1000 * (1 - t))[:, 3:]
    torch.testing.assert_close(model(x, t), nothing, rtol=0, atol=0)


def sampled_as_occfm_does(
    model: OccupancyVelocity, noise: Tensor, condition: dict[str, Tensor], scale: float
) -> Tensor:
    """OccFM's sampler in its own convention: ten steps up in time on a grid shifted by 3, the history fixed."""
    history, x = condition["history"].double(), noise.double()
    grid = [1 - 3 * tau / (1 + 2 * tau) for tau in torch.linspace(0, 1, 11, dtype=torch.float64).tolist()][::-1]
    assert grid[0] == 0.0
    assert grid[-1] == 1.0
    for now, then in pairwise(grid):
        times = torch.full((len(x),), 1000 * now, dtype=torch.float64)
        with_past = model.network(torch.cat([history, x], 1), times, condition["trajectory"].double())
        without = model.network(torch.cat([0 * history, x], 1), times, condition["trajectory"].double())
        x = x + (then - now) * (without + scale * (with_past - without))[:, 3:]
    return x


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sampling_is_that_of_occfm(scale: float) -> None:
    model = field().double()
    noise, _, condition = rows()
    negative = null_condition(model)
    assert negative is not None
    teacher = model if scale == 1.0 else FixedGuidance(model, negative, scale)
    sampler = Student(teacher, (3, 4, 8, 8), steps=10, shift=PRESETS["occfm"]["evaluate.teacher_shift"])
    with torch.no_grad():
        expected = sampled_as_occfm_does(model, noise, condition, scale)
        wide = {name: value.double() for name, value in condition.items()}
        got = sampler.generate(noise.double(), wide)
    # The student's times are float32.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert sampler.time_grid() == shift_times(torch.linspace(1, 0, 11, dtype=torch.float64), 3.0).tolist()


def test_null_condition_has_no_history_and_keeps_the_motion() -> None:
    model = field()
    negative = null_condition(model)
    assert negative is not None
    assert negative.keys() == {"history"}
    assert negative["history"].shape == (1, 3, 4, 8, 8)
    assert not negative["history"].any()


def test_shorter_history_and_poses() -> None:
    model = field(history_frames=2, trajectory_length=2)
    assert model.network.shape == (5, 4, 8, 8)
    assert model.network.traj_length == 2
    x, t, condition = rows()
    assert model(x, t, condition["history"][:, 1:], condition["trajectory"][:, 1:]).shape == x.shape
    with pytest.raises(ValueError, match=r"history must have shape \[2, 2, 4, 8, 8\], got \[2, 3, 4, 8, 8\]"):
        model(x, t, **condition)
    again = model_from_description(describe_model(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x, t), model(x, t))


def test_samples_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"occfm needs samples \(frames, channels, height, width\) and no classes"):
        build_model("occfm", (4, 8, 8), None)
    with pytest.raises(ValueError, match="and no classes"):
        build_model("occfm", (3, 4, 8, 8), 10)
    with pytest.raises(ValueError, match="history_frames and trajectory_length must be at least 0, got -1 and 0"):
        build_model("occfm", (3, 4, 8, 8), None, history_frames=-1)


def test_low_rank_roles_run_as_one_batch() -> None:
    model = field()
    roles = LoRARoles(model, rank=2, alpha=2.0, targets=["qkv", "fc1", "adaLN_modulation.1"])
    for parameter in roles.parameters("auxiliary"):
        nn.init.normal_(parameter, std=0.2)
    x, t, condition = rows()
    groups = [RowGroup(role, x, t, condition) for role in (roles.teacher, roles.auxiliary)]
    together = roles.teacher.evaluate_groups(groups)
    torch.testing.assert_close(together[0], model(x, t, **condition), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], roles.auxiliary(x, t, **condition), rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01
