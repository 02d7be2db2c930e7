"""What an experiment is: settings, cells that are computed apart from each other, a figure, and a text about it.

A cell is the smallest part that is kept: one that is finished is not computed again.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mfd_fast.report.theme import Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

S = TypeVar("S")
Result = dict[str, Any]
"""What a cell found, as JSON."""
Results = Mapping[str, Sequence[Result]]
"""By cell what was found, a result a seed."""


@dataclass(frozen=True)
class Work:
    """What the computation of a cell gets beside its name and the settings."""

    seed: int
    folder: Path
    """For what cells of this seed share, such as a trained teacher."""
    done: Mapping[str, Result]
    """The finished cells before this one, of the same seed."""


@dataclass(frozen=True)
class Experiment(Generic[S]):
    """One claim, tested. ``S`` is a frozen dataclass of JSON values: sizes, budgets, grids."""

    summary: str
    """One line: what it shows."""
    quick: S
    """Settings that take a minute or so (`table`: up to 15 minutes) on an idle core."""
    full: S
    cells: Callable[[S], Sequence[str]]
    """Names of the cells, in the order in which they are computed."""
    run: Callable[[S, str, Work], Result]
    """Computes the cell of that name."""
    figure: "Callable[[Results, Theme], Figure]"
    finding: Callable[[Results], str]
    """A few sentences with the numbers, made from the results alone."""
    seeds: int = 1
    """How many are run unless asked otherwise."""


def spread_words(values: Sequence[float]) -> str:
    """The mean of the seeds and, if there are several, their standard deviation: ``0.12 ± 0.01``."""
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2g}"
