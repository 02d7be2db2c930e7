"""Mean Flow Distillation of SANA in a training loop as the released script has it, its two integration loops replaced.

    python examples/sana_existing_loop.py            # one call of mean_velocity_pair
    python examples/sana_existing_loop.py --by-hand  # the loops over the steps, adapters switched, for comparison

Scheduler, adapters of peft and optimisers are the script's own. The transformer is a tiny random one, so it runs
anywhere in seconds; both ways print the same losses. With a real SANA, load the transformer and encode prompts instead.
"""

import argparse
import math

import torch
from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel
from peft import LoraConfig
from torch import Tensor

import mfd_fast
from mfd_fast.models.sana import SanaRoles
from mfd_fast.models.sana_peft import roles_from_peft
from mfd_fast.models.sana_stand_in import tiny_transformer
from mfd_fast.path import interpolate

GUIDANCE, STEP_SIZE = 4.5, 0.02
NULL = {"prompt_embeds": torch.zeros(1, 6, 16), "prompt_mask": torch.tensor([[1, 1, 0, 0, 0, 0]])}
"""The empty prompt; the script encodes "" instead."""


def velocity(transformer: SanaTransformer2DModel, x: Tensor, t: Tensor, prompts: dict[str, Tensor]) -> Tensor:
    """What the transformer predicts with the adapter that is switched on."""
    mask = prompts["prompt_mask"]
    return transformer(x, prompts["prompt_embeds"], t * 1000.0, encoder_attention_mask=mask, return_dict=False)[0]


def generate(transformer: SanaTransformer2DModel, noise: Tensor, prompts: dict[str, Tensor], steps: int = 4) -> Tensor:
    """The student's samples: the scheduler's steps with the adapter "default"."""
    scheduler = DPMSolverMultistepScheduler(
        flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++"
    )
    scheduler.set_timesteps(steps)
    transformer.set_adapter("default")
    x = noise
    for now in scheduler.timesteps:
        x = scheduler.step(velocity(transformer, x, now.expand(len(x)) / 1000.0, prompts), now, x, return_dict=False)[0]
    return x


@torch.no_grad()
def by_hand(
    transformer: SanaTransformer2DModel, x: Tensor, t: Tensor, r: Tensor, prompts: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The two mean velocities, one sample and one step at a time; what `mean_velocity_pair` replaces."""
    results: list[list[Tensor]] = [[], []]
    for row in range(len(x)):
        own = {name: value[row : row + 1] for name, value in prompts.items()}
        steps = max(1, math.ceil(float(t[row] - r[row]) / STEP_SIZE - 1e-6))
        width = (t[row] - r[row]) / steps
        for result, is_teacher in zip(results, (True, False), strict=True):
            if is_teacher:
                transformer.disable_adapters()
            else:
                transformer.enable_adapters()
                transformer.set_adapter("aux")
            y = x[row : row + 1]
            for step in range(steps):
                now = (t[row] - step * width)[None]
                v = velocity(transformer, y, now, own)
                if is_teacher:
                    away = velocity(transformer, y, now, NULL)
                    v = away + GUIDANCE * (v - away)
                y = y - width * v
            result.append((x[row : row + 1] - y) / (t[row] - r[row]))
    transformer.enable_adapters()
    return torch.cat(results[0]), torch.cat(results[1])


def train_auxiliary(transformer: SanaTransformer2DModel, prompts: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    """Leave the gradient of flow matching on the student's samples in the adapter "aux"."""
    with torch.no_grad():
        z = generate(transformer, torch.randn(shape), prompts)
    noise, t = torch.randn(shape), torch.rand(shape[0])
    transformer.set_adapter("aux")
    prediction = velocity(transformer, interpolate(z, noise, t), t, prompts)
    (prediction - (noise - z)).square().mean().backward()


def student_loss(
    transformer: SanaTransformer2DModel, roles: SanaRoles | None, prompts: dict[str, Tensor], shape: tuple[int, ...]
) -> Tensor:
    """The loss of the student; without ``roles`` integrated by hand."""
    z = generate(transformer, torch.randn(shape), prompts)
    ends = torch.rand(2, shape[0])
    t, r = ends.amax(0), ends.amin(0)
    x_t = interpolate(z, torch.randn(shape), t)
    if roles is None:
        u_teacher, u_auxiliary = by_hand(transformer, x_t.detach(), t, r, prompts)
    else:
        u_teacher, u_auxiliary = mfd_fast.mean_velocity_pair(
            roles.teacher,
            roles.auxiliary,
            x_t.detach(),
            t,
            r,
            step_size=STEP_SIZE,
            condition=prompts,
            negative_condition=NULL,
            guidance_scale=GUIDANCE,
        )
    transformer.set_adapter("default")
    return ((u_teacher - u_auxiliary) * x_t).mean()


def main(arguments: list[str] | None = None) -> list[float]:
    """Losses of the student's updates."""
    parser = argparse.ArgumentParser(description="Mean Flow Distillation of a tiny SANA in a loop of one's own.")
    parser.add_argument("--by-hand", action="store_true", help="integrate step by step instead")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=3, help="of two auxiliary updates and one of the student")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    transformer = tiny_transformer().requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v"])
    optimizers = {}
    for adapter in ("default", "aux"):
        transformer.add_adapter(config, adapter_name=adapter)
        weights = [value for name, value in transformer.named_parameters() if f".{adapter}." in name]
        optimizers[adapter] = torch.optim.AdamW(weights, lr=1e-3)
    roles = None if options.by_hand else roles_from_peft(transformer)  # once, after the adapters were added

    shape, losses = (options.batch_size, 4, 8, 8), []
    for cycle in range(options.cycles):
        prompts = {"prompt_embeds": torch.randn(shape[0], 6, 16), "prompt_mask": torch.ones(shape[0], 6)}
        for _ in range(2):
            train_auxiliary(transformer, prompts, shape)
            optimizers["aux"].step()
            optimizers["aux"].zero_grad()
        loss = student_loss(transformer, roles, prompts, shape)
        loss.backward()
        optimizers["default"].step()
        optimizers["default"].zero_grad()
        losses.append(loss.item())
        print(f"cycle {cycle}: loss {losses[-1]:.6f}")
    return losses


if __name__ == "__main__":
    main()
