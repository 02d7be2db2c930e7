"""The ratio table: this package and its peers on the same trained fields, draws and accuracy measure.

    make bench            eight draws of intervals, about a quarter of an hour on one core
    make bench QUICK=1    two draws, no scaling: seven minutes

Every way is checked before it is timed. One thread, CPU time; for each draw all ways run one after the other, so that
whatever else the machine does meets all of them; a ratio is the median over the draws of its ratio within a draw.

What is known is written after every draw and every part to ``compare-unfinished.json``; a run that ends well leaves
``compare.json``, ``compare.txt`` (what it printed) and the figures in its place.
"""

import argparse
import statistics
from collections.abc import Iterator
from operator import gt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import figures
from clock import conditions, cpu_seconds, gemm_gain
from contenders import Diffrax, Own, Run, Way, euler, torch_peers
from fields import Pair, trained_pair
from limit import best_per_row
from mfd_fast.storage import write_json, write_text
from scaling import scaling
from search import DIFFRAX_GRID, OWN_GRID, Search, as_way, front, search
from small_networks import sequential_mlps
from workload import Draw, Velocities, fine_velocities, gradient_error, make_draw

RESULTS = Path(__file__).parent / "results"
FULL_DRAWS, QUICK_DRAWS = 8, 2
SAME_NUMBERS = 1e-4
"""Largest relative difference between the gradients of two ways that take the same Euler steps in float32."""
PRESUMED_GEMM_GAIN = 1.8
SAME_WORK = ("row by row Euler 0.02", "torchdiffeq Euler 0.02, rescaled", "eager lock-step Euler 0.02")
"""Peers that cost what another one in the list costs; they are timed on the MLP only."""


class Row(NamedTuple):
    """A line of the table."""

    workload: str
    ours: str
    against: str
    at_least: float
    stretch: bool = False


class Measured(NamedTuple):
    """What a way showed, draw by draw."""

    seconds: list[float]
    errors: list[float]


def main() -> None:
    """Check, time, print the table, write the results and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two draws, no scaling")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=RESULTS, help="where results go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.out, "compare-quick" if options.quick else "compare")
    measure(record, trained_pair("dit"), quick=options.quick)
    text = "\n".join(table_lines(record.results))
    print(text)
    record.finish(text)
    figures.draw_all(record.results, options.out, record.name)


class Record:
    """Results as they come in, on the disk from the first part on."""

    def __init__(self, folder: Path, name: str) -> None:
        self.results: dict[str, Any] = {}
        self.name = name
        self._folder = folder
        self._unfinished = folder / f"{name}-unfinished.json"

    def add(self, **parts: Any) -> None:
        """Keep some parts of the results, now."""
        self.results |= parts
        write_json(self._unfinished, self.results)

    def finish(self, text: str) -> None:
        """The results are complete."""
        write_json(self._folder / f"{self.name}.json", self.results)
        write_text(self._folder / f"{self.name}.txt", text + "\n")
        self._unfinished.unlink()


def measure(record: Record, pair: Pair, *, quick: bool) -> None:
    """Everything there is to measure, into ``record``."""
    began = conditions()
    draws = [make_draw(seed) for seed in range(QUICK_DRAWS if quick else FULL_DRAWS)]
    record.add(conditions={"start": began, "quick": quick, "draws": len(draws)}, gemm=gemm_gain(), fields=pair.record,
               padding_waste=[padding_waste(draw) for draw in draws])  # fmt: skip
    fine = [fine_velocities(pair, draw) for draw in tqdm(draws, desc="fine solutions in float64", unit="draw")]
    own = Own(pair)
    baseline = own.way(euler())
    ways = [baseline, own.way(euler(), runner="eager"), own.way(euler(dtype=torch.bfloat16))]
    ways += [way for way in torch_peers(pair) if way.name not in SAME_WORK]
    check(ways, draws[0].first(12))
    allowed = [gradient_error(baseline.run(draw), exact) for draw, exact in zip(draws, fine, strict=True)]
    found: dict[str, Search] = {}
    best: dict[str, Way | None] = {}
    for who, side, grid in (("mfd_fast", own, OWN_GRID), ("diffrax", Diffrax(pair), DIFFRAX_GRID)):
        found[who] = search(side.half, grid, draws, fine, allowed)
        best[who] = None if found[who].best is None else as_way(side, found[who].best)
        record.add(allowed_error=allowed, searched={name: one.record() for name, one in found.items()})
    chosen = [way for way in best.values() if way is not None]
    measured, limits = race([*ways, *chosen], draws, fine, pair.teacher, record)
    record.add(table=ratio_table(measured, best, limits), limit=limits)
    record.add(work_precision=[
        {"who": who, "way": f"{p.teacher.name} + {p.auxiliary.name}", "seconds": p.seconds, "gradient_error": p.errors}
        for who, one in found.items() for p in front(one.pairings)
    ])  # fmt: skip
    record.add(sequential_mlps=sequential_mlps(calls=100 if quick else 1000))
    if not quick:
        record.add(scaling=scaling())
    record.results["conditions"]["end"] = conditions()


def check(ways: list[Way], draw: Draw) -> None:
    """Raise unless the ways that should give this package's numbers do, and the others are no worse by far."""
    reference = ways[0].run(draw)
    for way in tqdm(ways[1:], desc="checking the numbers", unit="way"):
        error = gradient_error(way.run(draw), reference)
        limit = SAME_NUMBERS if way.same_numbers else 0.1
        if not error <= limit:
            raise SystemExit(f"{way.name}: its gradient differs by {error:.1e} from {ways[0].name}; at most {limit:g}")


def race(
    ways: list[Way], draws: list[Draw], fine: list[Velocities], network: torch.nn.Module, record: Record
) -> tuple[dict[str, Measured], dict[str, list[float]]]:
    """Time all ways draw by draw, the fast ones twice; beside them the limit of the compiled copy."""
    measured = {way.name: Measured([], []) for way in ways}
    limits: dict[str, list[float]] = {"row_evaluations": [], "best_seconds_per_row": [], "share": []}
    for draw, exact in tqdm(list(zip(draws, fine, strict=True)), desc="timing", unit="draw"):
        for way in ways:
            took, u = _timed(way.run, draw)
            if "mfd_fast" in way.name or "diffrax" in way.name:
                took = min(took, cpu_seconds(lambda run=way.run, draw=draw: run(draw)))
            measured[way.name].seconds.append(took)
            measured[way.name].errors.append(gradient_error(u, exact))
        per_row = best_per_row(network)
        limits["row_evaluations"].append(draw.evaluations())
        limits["best_seconds_per_row"].append(per_row)
        limits["share"].append(draw.evaluations() * per_row / measured[ways[0].name].seconds[-1])
        record.add(ways={name: {"seconds": m.seconds, "gradient_error": m.errors} for name, m in measured.items()})
    return measured, limits


def _timed(run: Run, draw: Draw) -> tuple[float, Velocities]:
    found: list[Velocities] = []
    took = cpu_seconds(lambda: found.append(run(draw)))
    return took, found[0]


def ratio_table(
    measured: dict[str, Measured], best: dict[str, Way | None], limits: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """The lines of the table with their medians and spread; a line without a solver within the error has None."""
    ours, low = f"mfd_fast compiled: {euler().words()}", f"mfd_fast compiled: {euler(dtype=torch.bfloat16).words()}"
    equal, theirs = (None if best[who] is None else best[who].name for who in ("mfd_fast", "diffrax"))
    diffeq = "torchdiffeq Euler 0.02, same numbers"
    rows = [
        Row("DiT, Euler 0.02, float32", ours, diffeq, 5.0),
        Row("same", ours, "released loop, float32", 4.0),
        Row("same, bfloat16 networks", low, "released loop, bfloat16", 4.0),
        Row("same, float32", ours, "torchode Euler 0.02", 5.0),
        Row("DiT, any solver at Euler 0.02's gradient error", equal or "", diffeq, 12.0),
        Row("same", equal or "", theirs or "", 3.5),
    ]
    lines = []
    for row in rows:
        ratios = None
        if row.ours in measured and row.against in measured:
            pairs = zip(measured[row.against].seconds, measured[row.ours].seconds, strict=True)
            ratios = [other / own for other, own in pairs]
        lines.append({**row._asdict(), "ratio": ratios and statistics.median(ratios), "ratios": ratios})
    share = {"workload": "DiT, share of the limit", "ours": ours, "against": "row evaluations x best time per row"}
    lines.append({**share, "at_least": 0.85, "stretch": False, "ratio": statistics.median(limits["share"]),
                  "ratios": limits["share"]})  # fmt: skip
    return lines


def padding_waste(draw: Draw) -> float:
    """Rows that a lock-step library computes for each row that is needed."""
    steps = ((draw.t - draw.r).double() / 0.02 - 1e-6).ceil().clamp(min=1)
    return float(len(steps) * steps.max() / steps.sum())


def table_lines(results: dict[str, Any]) -> Iterator[str]:
    """The table, the machine's matrix products, what was searched and the small networks as text."""
    gemm = results["gemm"]
    yield f"{results['conditions']['end']['processor']}, one thread, CPU time, {results['conditions']['draws']} draws"
    yield (
        f"float32 products: MKL {gemm['mkl_float32']:.0f}, oneDNN {gemm['onednn_float32']:.0f} GFLOP/s "
        f"({gemm['onednn_over_mkl']:.2f} times; the targets presume {PRESUMED_GEMM_GAIN}); "
        f"bfloat16 {gemm['bfloat16']:.0f}"
    )
    waste = statistics.median(results["padding_waste"])
    yield f"padding waste of lock-step: {waste:.2f}"
    if gemm["onednn_over_mkl"] < PRESUMED_GEMM_GAIN:
        expected = 0.9 * waste * max(1.0, gemm["onednn_over_mkl"])
        yield f"on this machine the first line is expected to be at least {expected:.2f} instead"
    for line in results["table"]:
        ratio = "-" if line["ratio"] is None else f"{line['ratio']:.2f}"
        yield f"{line['workload']:48} {ratio:>7} (at least {line['at_least']:g})  {line['against']}"
    for name, measured in results["ways"].items():
        milliseconds = 1e3 * statistics.median(measured["seconds"])
        yield f"  {milliseconds:9.0f} ms  gradient error {statistics.median(measured['gradient_error']):.3f}  {name}"
    for who, searched in results["searched"].items():
        yield f"tried by {who}, {searched['pairs']} pairs of these (milliseconds, own error; * above what is allowed):"
        for role, trials in searched["tried"].items():
            yield f"  {role}: {'; '.join(_trial_words(trial, results['allowed_error']) for trial in trials)}"
    for line in results["sequential_mlps"]:
        yield f"  Sequential MLP, {line['rows']} rows: {line['words']}"


def _trial_words(trial: dict[str, Any], allowed: list[float]) -> str:
    above = "*" if any(map(gt, trial["error"], allowed)) else ""
    milliseconds, error = 1e3 * statistics.median(trial["seconds"]), statistics.median(trial["error"])
    return f"{trial['choice']} ({milliseconds:.0f}, {error:.3f}{above})"


if __name__ == "__main__":
    main()
