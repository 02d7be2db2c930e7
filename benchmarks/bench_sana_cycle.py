"""One cycle, ten auxiliary updates and one of a four-step student, on a tiny SANA: the released loop's way, and ours.

    make bench

"released": the arithmetic of the released script written out with diffusers and peft: one sample at a time, adapters
switched for every part of an update, teacher and auxiliary integrated one after the other over times rounded to
thousandths. Its text encoder, its decoded pictures and its printing are left out, which favours it. A batch of eight
samples is eight backward passes. "ours": the same batch, every network as PyTorch runs it. CPU time of one thread,
float32.
"""

import math
import time
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel
from peft import LoraConfig
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from mfd_fast.distillation import make_student
from mfd_fast.models.sana import SanaNetwork
from mfd_fast.settings_io import load_settings
from mfd_fast.task import Task
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.distributed import World
from mfd_fast.training.making_roles import make_roles

ROWS, LENGTH, TOKENS, WIDTH, RANK = 8, 11, 12, 32, 8
SHAPE = (4, 8, 8)
GUIDANCE, STEP_SIZE = 4.5, 0.02
RELEASED: list[float] = []
"""Seconds of a cycle of the released loop, in this run."""


def transformer() -> SanaTransformer2DModel:
    """A tiny SANA, always the same."""
    torch.manual_seed(0)
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=4, num_attention_heads=4, attention_head_dim=16,
        num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64, caption_channels=WIDTH,
        sample_size=8,
    ).eval().requires_grad_(False)  # fmt: skip


def prompts(rows: int) -> dict[str, Tensor]:
    """Embeddings of prompts that use all their tokens."""
    generator = torch.Generator().manual_seed(rows)
    embeds = torch.randn(rows, TOKENS, WIDTH, generator=generator)
    return {"prompt_embeds": embeds, "prompt_mask": torch.ones(rows, TOKENS, dtype=torch.bool)}


class Released:
    """The released loop."""

    def __init__(self) -> None:
        self.net = transformer()
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v"]
        )
        for name in ("default", "aux"):
            self.net.add_adapter(config, adapter_name=name)
        self.net.set_adapters(["default", "aux"])
        self.weights = {
            name: [value for key, value in self.net.named_parameters() if f".{name}." in key]
            for name in ("default", "aux")
        }
        self.optimizers = {name: torch.optim.AdamW(values, lr=1e-4) for name, values in self.weights.items()}
        self.scheduler = DPMSolverMultistepScheduler(
            flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True
        )
        self.prompts, self.null = prompts(ROWS), prompts(1)

    def velocity(self, x: Tensor, t: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        return self.net(x, embeds, t * 1000.0, encoder_attention_mask=mask, return_dict=False)[0]

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        return self.prompts["prompt_embeds"][row : row + 1], self.prompts["prompt_mask"][row : row + 1]

    def generate(self, row: int) -> Tensor:
        self.net.set_adapter("default")
        self.scheduler.set_timesteps(4)
        x = torch.randn(1, *SHAPE)
        for now in self.scheduler.timesteps:
            x = self.scheduler.step(
                self.velocity(x, now.reshape(1) / 1000.0, *self.row(row)), now, x, return_dict=False
            )[0]
        return x

    def mean_velocity(self, x: Tensor, t: float, r: float, row: int, guided: bool) -> Tensor:
        grid = (torch.linspace(t, r, math.ceil((t - r) / STEP_SIZE) + 1) * 1000.0).round() / 1000.0
        embeds, mask = self.row(row)
        if guided:
            embeds = torch.cat([self.null["prompt_embeds"], embeds])
            mask = torch.cat([self.null["prompt_mask"], mask])
        y = x
        for now, then in pairwise(grid):
            copies = len(embeds)
            velocity = self.velocity(torch.cat([y] * copies), now.expand(copies), embeds, mask)
            if guided:
                away, towards = velocity.chunk(2)
                velocity = away + GUIDANCE * (towards - away)
            y = y - (now - then) * velocity
        return (x - y) / (t - r)

    def auxiliary_update(self) -> None:
        for row in range(ROWS):
            with torch.no_grad():
                sample = self.generate(row)
            t, noise = (torch.rand(1) * 1000).round() / 1000, torch.randn(1, *SHAPE)
            self.net.set_adapter("aux")
            predicted = self.velocity((1 - t) * sample + t * noise, t, *self.row(row))
            ((predicted - (noise - sample)).square().mean() / ROWS).backward()
        self.step("aux")

    def student_update(self) -> None:
        for row in range(ROWS):
            sample = self.generate(row)
            t, r = (torch.sort(torch.rand(2), descending=True).values * 1000).round().div(1000).tolist()
            r = min(r, t - 0.001)
            x = (1 - t) * sample + t * torch.randn(1, *SHAPE)
            with torch.no_grad():
                self.net.set_adapter("aux")
                auxiliary = self.mean_velocity(x, t, r, row, guided=False)
                self.net.disable_adapters()
                teacher = self.mean_velocity(x, t, r, row, guided=True)
                self.net.enable_adapters()
            self.net.set_adapter("default")
            (((teacher - auxiliary) * x).mean() / ROWS).backward()
        self.step("default")

    def step(self, name: str) -> None:
        torch.nn.utils.clip_grad_norm_(self.weights[name], 1.0)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()

    def cycle(self, number: int) -> None:
        torch.manual_seed(number)
        for _ in range(LENGTH - 1):
            self.auxiliary_update()
        self.student_update()


def ours() -> DistillTraining:
    """The same distillation, at the released script's settings and the cycle of the paper."""
    chosen = (
        *("distill.precision=float32", "distill.cycle_auxiliary=10", "distill.cycle_student=1"),
        *(f"distill.{name}={RANK}" for name in ("lora_rank", "lora_alpha")),
        *(
            f"distill.batch_size={ROWS}",
            "distill.sample_rows=1024",
            "distill.compile=off",
            "distill.recompute_steps=false",
            "distill.rollout.runner=eager",
        ),
        *(f"distill.{role}_optimizer.name=adamw" for role in ("student", "auxiliary")),
    )
    settings = load_settings("sana-1600m-release", overrides=chosen).distill
    task = Task(SHAPE, prompts(ROWS), prompts(1))
    context = Context(torch.device("cpu"), World())
    roles = make_roles(SanaNetwork(transformer()), settings, seed=0)
    student = make_student(roles, task, settings, context.device)
    conditions = ConditionTable(task.conditions, task.negative_condition, 0)
    return DistillTraining(roles, student, conditions, settings, 0, context)


def cycle(training: DistillTraining, number: int) -> None:
    """All updates of one cycle."""
    for update in range(number * LENGTH, (number + 1) * LENGTH):
        training.run_update(update)


@pytest.mark.parametrize("variant", ["released", "ours"])
def bench_sana_cycle(benchmark: BenchmarkFixture, variant: str) -> None:
    """Ten auxiliary updates and one of the four-step student, eight samples each."""
    if benchmark.disabled:
        pytest.skip("takes a minute: run with --benchmark-enable")
    torch.set_num_threads(1)
    benchmark.group = f"SANA cycle, LoRA roles, {ROWS} samples"
    benchmark.extra_info.update(torch=torch.__version__, threads=1, step_size=STEP_SIZE, dtype="float32")
    benchmark._timer = time.process_time
    numbers = iter(range(100))
    if variant == "released":
        loop = Released()
        benchmark.pedantic(lambda: loop.cycle(next(numbers)), rounds=5, warmup_rounds=1)
    else:
        training = ours()
        benchmark.pedantic(lambda: cycle(training, next(numbers)), rounds=5, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    if variant == "released":
        RELEASED.append(seconds)
    elif RELEASED:
        ratio = RELEASED[0] / seconds
        benchmark.extra_info["times_faster_than_released"] = round(ratio, 2)
        print(f"\n{variant}: {1e3 * seconds:.0f} ms of CPU time, {ratio:.2f}x the released loop")
        assert ratio >= 3, "a cycle must take at most a third of the released loop's time"
