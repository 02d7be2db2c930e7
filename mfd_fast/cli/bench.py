"""The command that times a user's own field: bench."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.intervals import LAWS
from mfd_fast.types import VelocityField


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    bench = commands.add_parser("bench", help="time the integration of your field, beside torchdiffeq")
    bench.add_argument("--field", metavar="MODULE:FACTORY", required=True, help="what builds the field")
    bench.add_argument("--weights", metavar="FILE", type=Path, help="safetensors with the weights of --field")
    other = bench.add_mutually_exclusive_group()
    other.add_argument("--auxiliary", metavar="MODULE:FACTORY", help="time the pair: a second network of its own")
    other.add_argument("--lora-rank", metavar="N", type=int, help="time the pair: --field with LoRA on all its Linears")
    bench.add_argument("--auxiliary-weights", metavar="FILE", type=Path, help="safetensors of --auxiliary")
    bench.add_argument(
        "--data",
        default="digits",
        metavar="NAME|FILE",
        help="a data set (default digits), or npz with x and an array for each of the "
        "field's conditions, by their names",
    )
    bench.add_argument("--guidance-scale", type=float, default=1.0, help="needs a field with classes (default 1: off)")
    bench.add_argument("--law", choices=LAWS, default="logit-normal", help="of both ends of an interval")
    bench.add_argument("--law-mean", type=float, default=0.0, help="mean of logit(t) for logit-normal (default 0)")
    bench.add_argument("--law-std", type=float, default=1.0, help="its standard deviation (default 1)")
    bench.add_argument("--rows", type=int, default=64, help="rows of the batch (default 64)")
    bench.add_argument("--step-size", type=float, default=0.02, help="largest Euler step (default 0.02)")
    bench.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    bench.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    bench.add_argument("--json", action="store_true", help="machine-readable")
    bench.set_defaults(run_command=run_bench)


def run_bench(options: argparse.Namespace) -> int:
    """Time a user's field, or its pair, on noised data."""
    from mfd_fast.bench import compare_runners, format_timings
    from mfd_fast.training.context import choose_device

    for name in ("rows", "threads", "lora_rank"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    device = choose_device(options.device, "--device")
    torch.set_num_threads(options.threads)
    field, auxiliary = _fields(options, device)
    x, t, r, condition = _problem(options, device)
    for name, network in (("field", field), ("auxiliary", auxiliary)):
        if network is not None:
            _try(name, network, x, t, condition or {}, options.data)
    timings = compare_runners(
        field,
        x,
        t,
        r,
        auxiliary=auxiliary,
        step_size=options.step_size,
        condition=condition,
        negative_condition=_negative(options, field),
        guidance_scale=options.guidance_scale,
    )
    what = "one field" if auxiliary is None else "field and auxiliary"
    title = (
        f"{options.rows} rows, {options.law} intervals, Euler {options.step_size:g}, {what}, "
        f"guidance {options.guidance_scale:g}, {options.threads} thread(s)"
    )
    if options.json:
        print(json.dumps({"title": title, "timings": [timing._asdict() for timing in timings]}, indent=2))
    else:
        print(f"{title}\n{format_timings(timings)}")
    return 0


def _try(name: str, field: VelocityField, x: Tensor, t: Tensor, condition: dict[str, Any], data: str) -> None:
    """Call a user's field once; ValueError with what it was given where it raises."""
    from mfd_fast.field_check import failed_call

    try:
        with torch.no_grad():
            field(x, t.to(x), **condition)
    except Exception as error:
        raise ValueError(f"--{name} on --data {data}: {failed_call(x, t, condition, error)}") from error


def _fields(options: argparse.Namespace, device: torch.device) -> tuple[VelocityField, VelocityField | None]:
    """The field and, where asked for, the auxiliary beside it."""
    from mfd_fast.models.lora import LoRARoles
    from mfd_fast.user_code import load_field

    if options.auxiliary_weights is not None and options.auxiliary is None:
        raise ValueError("--auxiliary-weights needs --auxiliary")

    def load(reference: str, weights: Path | None) -> VelocityField:
        field = load_field(reference, weights)
        return field.to(device).eval() if isinstance(field, torch.nn.Module) else field

    field = load(options.field, options.weights)
    if options.lora_rank is not None:
        if not isinstance(field, torch.nn.Module):
            raise TypeError(f"--lora-rank needs an nn.Module, {options.field!r} makes {type(field).__name__}")
        roles = LoRARoles(field, rank=options.lora_rank, alpha=float(options.lora_rank))
        # New adapters are zero, and the pair would be equal: give the auxiliary some weight of its own.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in roles.parameters("auxiliary"):
                value.copy_(0.02 * torch.randn(value.shape, generator=generator))
        return roles.teacher, roles.auxiliary
    return field, None if options.auxiliary is None else load(options.auxiliary, options.auxiliary_weights)


def _problem(options: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor, dict[str, Any] | None]:
    """States, starts, ends and the condition of the batch."""
    from mfd_fast.cli.look import field_data
    from mfd_fast.intervals import make_law, sample_pairs
    from mfd_fast.path import interpolate
    from mfd_fast.streams import make_generator, standard_normal

    data, condition = field_data(options.data)
    generator = make_generator(0, "bench")
    index = torch.randint(len(data), (options.rows,), generator=generator)
    law = make_law(options.law, mean=options.law_mean, std=options.law_std)
    t, r = sample_pairs(law, options.rows, generator=generator)
    x = interpolate(data[index], standard_normal((options.rows, *data.shape[1:]), generator), t).to(device)
    return x, t, r, None if condition is None else {name: rows[index].to(device) for name, rows in condition.items()}


def _negative(options: argparse.Namespace, field: VelocityField) -> dict[str, Tensor] | None:
    from mfd_fast.models import null_condition

    if options.guidance_scale == 1.0:
        return None
    negative = null_condition(field)
    if negative is None:
        raise ValueError("--guidance-scale other than 1 needs a field with classes (an attribute num_classes)")
    return negative
