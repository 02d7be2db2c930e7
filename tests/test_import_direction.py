"""Who may import whom: architecture by an AST walk over the sources, so it also holds for lazy imports in functions."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = "mfd_fast"


class Rule(NamedTuple):
    """Modules that match ``where`` (and not ``except_``) use none of ``names``."""

    where: str
    names: tuple[str, ...]
    except_: tuple[str, ...] = ()


RULES = {
    "kernels-stand-alone": Rule("mfd_fast.kernels*", (OURS,)),
    "types-stand-alone": Rule("mfd_fast.types", (OURS,)),
    "config-stands-alone": Rule("mfd_fast.config", (OURS,)),
    "only-ops-import-kernels": Rule("*", ("mfd_fast.kernels",), ("mfd_fast.ops*", "mfd_fast.kernels*")),
    "methods-know-no-models": Rule("mfd_fast.methods*", ("mfd_fast.models",)),
    "solvers-know-no-rollout": Rule(
        "mfd_fast.solvers*", ("mfd_fast.rollout", "mfd_fast.mean_velocity", "mfd_fast.training")
    ),
    "estimates-stand-above-training": Rule(
        "*",
        ("mfd_fast.estimate",),
        ("mfd_fast.estimate*", "mfd_fast.cli*", "mfd_fast.distillation", "mfd_fast.experiments.cost"),
    ),
    "triton": Rule("*", ("triton",), ("mfd_fast.kernels*",)),
    "deepspeed": Rule("*", ("deepspeed",), ("mfd_fast.training.zero",)),
    "diffusers": Rule(
        "*",
        ("diffusers", "transformers", "peft"),
        (
            *(f"mfd_fast.models.{name}" for name in ("sana*", "sd3", "flux", "lora")),
            "mfd_fast.data.prompts",
            "mfd_fast.metrics.text_image",
        ),
    ),
    "compilation": Rule(
        "*",
        ("torch.compile", "torch.cuda.CUDAGraph", "torch.cuda.graph", "torch.cuda.graphs"),
        ("mfd_fast.rollout*", "mfd_fast.training.step"),
    ),
    "kernels-of-hugging-face": Rule("*", ("kernels",)),
    "only-commands-rehearse": Rule("*", ("mfd_fast.dry_run",), ("mfd_fast.dry_run", "mfd_fast.cli*")),
    "only-commands-run-experiments": Rule(
        "*", ("mfd_fast.experiments",), ("mfd_fast.experiments*", "mfd_fast.cli.reproduce")
    ),
}


def dotted(node: ast.expr) -> str | None:
    """``a.b.c`` for an attribute chain on a plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return None


@cache
def used_names(source: str, module: str, is_package: bool) -> frozenset[str]:
    """Absolute dotted names that a module imports, names in ``import_module``, or reaches through an attribute."""
    return frozenset(_walk(source, module, is_package))


def _walk(source: str, module: str, is_package: bool) -> Iterator[str]:
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parents = parts[: len(parts) - node.level + is_package] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{origin}.{alias.name}"
                yield f"{origin}.{alias.name}"
        elif isinstance(node, ast.Call) and (dotted(node.func) or "").split(".")[-1] in ("import_module", "__import__"):
            yield from (
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            )
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            head, _, rest = name.partition(".")
            if head in aliases:
                yield f"{aliases[head]}.{rest}"


def violations(rule: Rule, modules: dict[str, tuple[str, bool]]) -> set[tuple[str, str]]:
    """(module, name) for every use that the rule forbids; ``modules``: name -> (source, is it a package)."""
    return {
        (module, name)
        for module, (source, is_package) in modules.items()
        if fnmatch(module, rule.where) and not any(fnmatch(module, pattern) for pattern in rule.except_)
        for name in used_names(source, module, is_package)
        if any(f"{name}.".startswith(f"{forbidden}.") for forbidden in rule.names)
    }


@cache
def our_modules() -> dict[str, tuple[str, bool]]:
    """Every module of the package, under the name it has when installed."""
    modules = {}
    for folder, package in ((ROOT / "mfd_fast", OURS), (ROOT / "kernels", f"{OURS}.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            modules[".".join(parts[:-1] if is_package else parts)] = (path.read_text("utf-8"), is_package)
    return modules


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_imports_follow_the_architecture(rule: Rule) -> None:
    assert violations(rule, our_modules()) == set()


def test_every_module_is_looked_at() -> None:
    modules = our_modules()
    assert {OURS, "mfd_fast.types", "mfd_fast.solvers", "mfd_fast.kernels", "mfd_fast.step_control"} <= set(modules)


BAD = {
    "kernels-stand-alone": ("mfd_fast.kernels.bad", "from ..types import Status"),
    "types-stand-alone": ("mfd_fast.types", "from . import path"),
    "config-stands-alone": ("mfd_fast.config", "import mfd_fast.path"),
    "only-ops-import-kernels": ("mfd_fast.rollout.bad", "from mfd_fast import kernels"),
    "methods-know-no-models": ("mfd_fast.methods.bad", "def f():\n    from mfd_fast.models.mlp import MLP"),
    "solvers-know-no-rollout": ("mfd_fast.solvers.bad", "from mfd_fast.mean_velocity import integrate"),
    "estimates-stand-above-training": ("mfd_fast.training.bad", "from mfd_fast.estimate import plan"),
    "triton": ("mfd_fast.ops.bad", "import triton.language as tl"),
    "deepspeed": ("mfd_fast.training.trainer", "import importlib\nimportlib.import_module('deepspeed')"),
    "diffusers": ("mfd_fast.models.bad", "def f():\n    import peft"),
    "compilation": ("mfd_fast.mean_velocity", "import torch as th\nfast = th.compile(print)"),
    "kernels-of-hugging-face": ("mfd_fast.ops.bad", "import kernels"),
    "only-commands-rehearse": ("mfd_fast.distillation", "from mfd_fast import dry_run"),
    "only-commands-run-experiments": ("mfd_fast.report.bad", "from mfd_fast.experiments import EXPERIMENTS"),
}


@pytest.mark.parametrize("name", RULES)
def test_the_check_can_fail(name: str) -> None:
    module, source = BAD[name]
    assert violations(RULES[name], {module: (source, False)}) != set()
    assert violations(RULES[name], {module: ("import math\nfrom torch import nn\nnn.Linear(1, 1)", False)}) == set()


def test_exceptions_are_allowed() -> None:
    source = "import triton\nimport torch\ntorch.compile(print)"
    assert violations(RULES["triton"], {"mfd_fast.kernels.guided_step": (source, False)}) == set()
    assert violations(RULES["compilation"], {"mfd_fast.rollout.compiled": (source, False)}) == set()
    # Compiling a regular expression or naming a field is not compiling a network.
    assert violations(RULES["compilation"], {"mfd_fast.cli": ("import re\nre.compile('a')\nx.kernels", False)}) == set()
