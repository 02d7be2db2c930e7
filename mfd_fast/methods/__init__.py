"""Training objectives by name."""

from difflib import get_close_matches

from mfd_fast.methods.ayf import AlignYourFlow
from mfd_fast.methods.base import Method, MethodOptions
from mfd_fast.methods.cd import ConsistencyDistillation
from mfd_fast.methods.dmd2 import DistributionMatchingDistillation2
from mfd_fast.methods.imm import InductiveMomentMatching
from mfd_fast.methods.meanflow import MeanFlow
from mfd_fast.methods.mfd import MeanFlowDistillation
from mfd_fast.methods.reflow import Reflow
from mfd_fast.methods.senseflow import SenseFlow
from mfd_fast.methods.vsd import VariationalScoreDistillation

METHODS: dict[str, type[Method]] = {
    "mfd": MeanFlowDistillation,
    "vsd": VariationalScoreDistillation,
    "dmd2": DistributionMatchingDistillation2,
    "senseflow": SenseFlow,
    "cd": ConsistencyDistillation,
    "ayf": AlignYourFlow,
    "meanflow": MeanFlow,
    "imm": InductiveMomentMatching,
    "reflow": Reflow,
}


def make_method(name: str, options: MethodOptions) -> Method:
    """The method called ``name``; ValueError names the nearest valid one."""
    if name not in METHODS:
        close = get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}{hint}")
    return METHODS[name](options)


__all__ = ["METHODS", "Method", "MethodOptions", "make_method"]
