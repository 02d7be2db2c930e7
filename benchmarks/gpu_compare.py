"""The student's rollout and the whole 10:1 cycle on a GPU: this package against the released loop's arithmetic.

Of OccFM also the student's update alone, and frames per second of one step of the student and ten of the teacher.

    make bench-gpu        SANA-1.6B-shaped and occupancy-shaped networks in bfloat16, batches of 1 and 8
    python benchmarks/gpu_compare.py --toy --device cpu     the same at toy size, anywhere

Networks have random weights in bfloat16. Uniform pairs of times, guidance 4.5, LoRA of rank 64.
"""

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mfd_fast
from clock import conditions
from gpu_networks import Case, occupancy_case, sana_case
from gpu_released import ReleasedLoop
from mfd_fast.distillation import make_student
from mfd_fast.fields import autocast
from mfd_fast.guidance import FixedGuidance
from mfd_fast.intervals import Uniform, sample_pairs
from mfd_fast.models.lora import LoRARoles
from mfd_fast.storage import write_json
from mfd_fast.student import Student
from mfd_fast.task import Task
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import make_context
from mfd_fast.training.distill import DistillTraining

RESULTS = Path(__file__).parent / "results"
GUIDANCE = 4.5
CASES: dict[str, Callable[[bool], Case]] = {"sana": sana_case, "occupancy": occupancy_case}
STEPS = (0.02, 0.05)
"""Euler steps of the loop and of this package, and AB2 steps of this package."""
TOY_STEPS = (0.2, 0.25)
FINE = {"solver": "rk4", "step_size": 0.05}


def main(arguments: list[str] | None = None) -> int:
    """Measure every case; the exit code is 1 where there is no such device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny networks, for any device")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case", choices=CASES, action="append", help="only this network; may be repeated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here: nothing was measured. (--toy --device cpu runs the code without one.)")
        return 1
    results: dict[str, Any] = {"conditions": {**conditions(), **describe(device)}, "toy": options.toy, "cases": {}}
    for name in options.case or CASES:
        results["cases"][name] = measure_case(CASES[name](options.toy), device, options.toy, options.repeats)
        print_case(results["cases"][name])
    results["conditions"]["after"] = describe(device)
    write_json(options.out, results)
    return 0


def measure_case(case: Case, device: torch.device, toy: bool, repeats: int) -> dict[str, Any]:
    """Rollouts and cycles at batches of 1 and 8; of forecasts also student updates and frames per second."""
    torch.manual_seed(0)
    roles, plain = case.roles(device, 4 if toy else 64)
    perturb(roles)
    if plain is not roles:
        plain.load_state_dict("auxiliary", roles.state_dict("auxiliary"))
    steps = TOY_STEPS if toy else STEPS
    loop = ReleasedLoop(plain, case, device, GUIDANCE, steps[0])
    parameters = sum(value.numel() for value in roles.module.parameters())
    found: dict[str, Any] = {"network": case.name, "parameters": parameters}
    for rows in (1, 2) if toy else (1, 8):
        found[f"rollout, batch {rows}"] = rollouts(roles, loop, case, rows, device, repeats, steps)
        settings = settings_of(case, rows, device, toy)
        task = Task(case.sample_shape, case.condition(max(rows, 2)), case.negative)
        student = make_student(roles, task, settings.distill, device)
        table = ConditionTable(task.conditions, task.negative_condition, 0)
        training = DistillTraining(roles, student, table, settings.distill, 0, make_context(settings.run))
        found[f"cycle, batch {rows}"] = cycles(training, loop, rows, device, 1 if toy else 2)
        if case.frames:
            found[f"student update, batch {rows}"] = student_updates(training, loop, rows, device, repeats)
            found[f"forecast, batch {rows}"] = forecasts(student, roles, case, rows, device, repeats)
    return found


def settings_of(case: Case, rows: int, device: torch.device, toy: bool) -> Any:
    """Settings of a 10:1 distillation with LoRA roles in bfloat16."""
    changes = [
        "distill.cycle_auxiliary=10", "distill.cycle_student=1", f"distill.batch_size={rows}", "distill.roles=lora",
        f"distill.student_steps={case.student_steps}", f"distill.guidance_scale={GUIDANCE}",
        "distill.precision=bfloat16", "distill.times.law=uniform", f"run.device={device}",
        f"distill.compile={'off' if toy else 'on'}", "distill.rollout.solver=ab2",
        f"distill.rollout.step_size={(TOY_STEPS if toy else STEPS)[1]}",
    ]  # fmt: skip
    return mfd_fast.load_settings("mixture-2d", overrides=changes)


def rollouts(
    roles: LoRARoles,
    loop: ReleasedLoop,
    case: Case,
    rows: int,
    device: torch.device,
    repeats: int,
    steps: tuple[float, float],
) -> dict[str, Any]:
    """Seconds, error, peak memory and host synchronisations of the pair's mean velocities, ours and the loop's."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, *case.sample_shape, generator=generator).to(device)
    t, r = sample_pairs(Uniform(), rows, generator=generator)
    given = {name: value.to(device) for name, value in case.condition(rows).items()}
    shared: dict[str, Any] = {
        "condition": given,
        "negative_condition": {name: value.to(device) for name, value in case.negative.items()},
        "guidance_scale": GUIDANCE,
        "field_dtype": torch.bfloat16,
    }

    def own(**options: Any) -> tuple[Tensor, Tensor]:
        u: tuple[Tensor, Tensor] = mfd_fast.mean_velocity_pair(
            roles.teacher, roles.auxiliary, x, t, r, **shared, **options
        )
        return u

    if steps is STEPS:  # at toy size compiling takes longer than everything else
        mfd_fast.warmup(roles.teacher, x, auxiliary=roles.auxiliary, **shared)
    exact = own(**FINE, runner="eager")
    ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "released loop": lambda: loop.rollout(x, t, r, given),
        f"mfd_fast, Euler {steps[0]:g}": lambda: own(step_size=steps[0]),
        f"mfd_fast, AB2 {steps[1]:g}": lambda: own(solver="ab2", step_size=steps[1]),
    }
    found = {name: measure(call, device, repeats) for name, call in ways.items()}
    for name, call in ways.items():
        gap, fine = ((u[0] - u[1]).float() for u in (call(), exact))
        found[name]["gradient_error"] = float((gap - fine).norm() / fine.norm())
    return found


def perturb(roles: LoRARoles) -> None:
    """Give the auxiliary's low-rank part some weight, so that it differs from the teacher."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in roles.parameters("auxiliary"):
            value.copy_(torch.randn(value.shape, generator=generator).mul_(0.02).to(value.device))


def cycles(
    training: DistillTraining, loop: ReleasedLoop, rows: int, device: torch.device, count: int
) -> dict[str, Any]:
    """Seconds of whole cycles: ten auxiliary updates and one of the student."""
    done = 0

    def own() -> None:
        nonlocal done
        for _ in range(11):
            training.run_update(done % training.total_updates)
            done += 1

    return {
        "released loop": measure(lambda: loop.cycle(rows), device, count),
        "mfd_fast": measure(own, device, count),
    }


def student_updates(
    training: DistillTraining, loop: ReleasedLoop, rows: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Seconds of an update of the student: a sample with its gradient, and two rollouts."""
    return {
        "released loop": measure(lambda: loop.update("student", rows), device, repeats),
        "mfd_fast": measure(lambda: training.run_update(training.cycle.auxiliary), device, repeats),
    }


def forecasts(
    student: Student, roles: LoRARoles, case: Case, rows: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Seconds and frames per second of the guided teacher on OccFM's grid of ten steps, and of the student."""
    given = {name: value.to(device) for name, value in case.condition(rows).items()}
    negative = {name: value.to(device) for name, value in case.negative.items()}
    guided = FixedGuidance(autocast(roles.teacher, torch.bfloat16), negative, GUIDANCE)
    teacher = replace(student, field=guided, steps=10, shift=3.0)
    noise = torch.randn(rows, *case.sample_shape, device=device)
    ways = {"teacher, 10 steps": teacher, f"student, {student.steps} step": student}
    found = {name: measure(partial(way.generate, noise, given), device, repeats) for name, way in ways.items()}
    for seen in found.values():
        seen["frames_per_second"] = rows * case.frames / seen["seconds"]
    return found


def measure(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, Any]:
    """Median seconds after one call to warm up, peak memory and synchronisations of one call (None off CUDA)."""
    call()
    on_gpu = device.type == "cuda"
    seconds = []
    for _ in range(repeats):
        _finish(device)
        begin = time.perf_counter()
        call()
        _finish(device)
        seconds.append(time.perf_counter() - begin)
    found: dict[str, Any] = {"seconds": statistics.median(seconds), "peak_gib": None, "synchronisations": None}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        call()
        _finish(device)
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["synchronisations"] = synchronisations(call)
    return found


def synchronisations(call: Callable[[], object]) -> int:
    """How often the host waits for the device in one call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def describe(device: torch.device) -> dict[str, Any]:
    """The device's name and, where nvidia-smi tells, its clocks and power."""
    if device.type != "cuda":
        return {"device": device.type}
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        told = "nvidia-smi does not answer"
    return {"device": torch.cuda.get_device_name(device), query: told, "cuda": torch.version.cuda}


def print_case(found: dict[str, Any]) -> None:
    """One line for each way."""
    print(f"{found['network']}, {found['parameters'] / 1e6:.1f} million parameters")
    for title, ways in found.items():
        if not isinstance(ways, dict):
            continue
        base = next(iter(ways.values()))["seconds"]
        for name, seen in ways.items():
            error = f"  gradient error {seen['gradient_error']:.1e}" if "gradient_error" in seen else ""
            speed = f"  {seen['frames_per_second']:.1f} frames/s" if "frames_per_second" in seen else ""
            peak = "" if seen["peak_gib"] is None else f"  peak {seen['peak_gib']:.1f} GiB"
            waits = "" if seen["synchronisations"] is None else f"  {seen['synchronisations']} synchronisations"
            took = f"{1e3 * seen['seconds']:10.1f} ms {base / seen['seconds']:6.2f}x"
            print(f"  {title:23} {name:22} {took}{speed}{error}{peak}{waits}")


if __name__ == "__main__":
    sys.exit(main())
