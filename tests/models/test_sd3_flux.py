"""Stable Diffusion 3 and Flux by the same door as SANA: velocities, roles as groups of rows, LoRA files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mfd_fast import integrate, mean_velocity, mean_velocity_pair
from mfd_fast.models.diffusers_lora import save_lora
from mfd_fast.models.flux import FluxNetwork
from mfd_fast.models.lora import LoRARoles
from mfd_fast.models.sd3 import SD3Network

ROWS = 3


class Model(NamedTuple):
    """A tiny random transformer as a field."""

    network: Any
    outputs: Callable[..., Tensor]
    """Its own forward at a time of its scheduler, as its pipeline calls it."""
    extra: dict[str, Tensor]


def sd3() -> Model:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "pos_embed_max_size": 8}
    heads = {"attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    transformer = diffusers.SD3Transformer2DModel(
        **sizes, **heads, joint_attention_dim=16, pooled_projection_dim=12
    ).requires_grad_(False)

    def outputs(x: Tensor, time: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Tensor:
        return transformer(
            hidden_states=x,
            timestep=time.expand(len(x)),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            return_dict=False,
        )[0]

    return Model(SD3Network(transformer), outputs, {})


def flux(guidance_embeds: bool) -> Model:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (2, 2, 4)}
    heads = {"attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 16}
    transformer = diffusers.FluxTransformer2DModel(
        **sizes, **heads, pooled_projection_dim=12, guidance_embeds=guidance_embeds
    ).requires_grad_(False)
    pipeline = diffusers.FluxPipeline

    def outputs(
        x: Tensor, time: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        rows, channels, height, width = x.shape
        tokens = transformer(
            hidden_states=pipeline._pack_latents(x, rows, channels, height, width),
            timestep=time.expand(rows) / 1000,
            guidance=None if guidance is None else guidance.expand(rows),
            pooled_projections=pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3),
            img_ids=pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, x.device, x.dtype),
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(tokens, 8 * height, 8 * width, 8)

    extra = {"guidance": torch.tensor([3.5])} if guidance_embeds else {}
    return Model(FluxNetwork(transformer), outputs, extra)


MODELS: dict[str, Callable[[], Model]] = {
    "sd3": sd3,
    "flux": lambda: flux(False),
    "flux with guidance": lambda: flux(True),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[request.param]()


def inputs(rows: int = ROWS) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 4, 8, 6, generator=generator)
    prompts = [
        {
            "prompt_embeds": torch.randn(count, 5, 16, generator=generator),
            "pooled_prompt_embeds": torch.randn(count, 12, generator=generator),
        }
        for count in (rows, 1)
    ]
    return x, prompts[0], prompts[1]


def test_an_euler_step_is_a_step_of_the_scheduler(model: Model) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    x, condition, _ = inputs()
    condition |= model.extra
    for now, then, time in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], scheduler.timesteps, strict=True):
        theirs = scheduler.step(model.outputs(x, time, **condition), time, x, return_dict=False)[0]
        ours = integrate(model.network, x, float(now), float(then), steps=1, condition=condition)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        x = theirs


def test_roles_run_as_groups_of_one_forward(model: Model, randomize: Any) -> None:
    roles = LoRARoles(model.network, rank=2, alpha=2.0, targets=("to_q", "to_k", "to_v"))
    randomize(roles)
    forwards: list[int] = []
    roles.network.register_forward_hook(lambda _, given, output: forwards.append(len(given[0])))
    x, condition, null = inputs()
    arguments = {"condition": condition | model.extra, "steps": 3}
    guided = {"negative_condition": null, "guidance_scale": 4.5}
    teacher, auxiliary = mean_velocity_pair(roles.teacher, roles.auxiliary, x, 0.9, 0.2, **arguments, **guided)
    assert forwards == [3 * ROWS] * 3
    expected = mean_velocity(model.network, x, 0.9, 0.2, **arguments, **guided)
    torch.testing.assert_close(teacher, expected, rtol=1e-4, atol=1e-5)
    expected = mean_velocity(roles.merged("auxiliary"), x, 0.9, 0.2, **arguments)
    torch.testing.assert_close(auxiliary, expected, rtol=1e-4, atol=1e-5)
    assert (auxiliary - teacher).norm() > 1e-2 * teacher.norm()


def test_diffusers_loads_the_student(model: Model, randomize: Any, tmp_path: Path) -> None:
    roles = LoRARoles(model.network, rank=2, alpha=4.0, targets=("to_q", "to_k", "to_v"))
    randomize(roles)
    x, condition, _ = inputs()
    condition |= model.extra
    with torch.no_grad():
        expected = roles.student(x, torch.full((ROWS,), 0.7), **condition)
        model.network.transformer.load_lora_adapter(save_lora(tmp_path, roles))
        loaded = model.outputs(x, torch.tensor(700.0), **condition)
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-5)


def test_odd_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="even height and width, got shape"):
        FluxNetwork(nn.Identity())(torch.zeros(1, 4, 3, 4), torch.ones(1), torch.zeros(1, 2, 3), torch.zeros(1, 3))
