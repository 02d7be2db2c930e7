"""What README and docs show is true: links lead somewhere, Python runs, commands parse, figures are those measured."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfd_fast
from mfd_fast.cli import main
from mfd_fast.cli.main import parse
from mfd_fast.closed_forms import GaussianMixture
from mfd_fast.models import build_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
RESULTS = ROOT / "benchmarks" / "results"
LINK = re.compile(r"\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")
NOT_RUN = {
    ("full_scale.md", 0): "tests/cli/test_full_scale.py runs it behind the commands that it needs",
    ("full_scale.md", 1): "it samples a whole pipeline of diffusers on a GPU",
}
"""Python blocks that are compiled only, and why."""


def fenced(page: Path) -> list[tuple[str, str]]:
    """Language and text of every block."""
    return re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text("utf-8"))


def blocks(page: Path) -> list[str]:
    return [text for language, text in fenced(page) if language == "python"]


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text("utf-8")) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in headings(target), f"{page.name}: {link}"
    assert links or page.name not in ("README.md", "healthy_run.md")  # the pattern finds what is there


def test_every_block_of_python_is_run_or_named() -> None:
    found = {(page.name, number) for page in PAGES for number in range(len(blocks(page)))}
    run = {("README.md", number) for number in range(3)} | {("own_loop.md", 0), ("own_loop.md", 1)}
    run |= {("benchmarks.md", 0)} | {("sana.md", number) for number in range(3)}
    assert found == run | NOT_RUN.keys()
    for page in PAGES:
        for code in blocks(page):
            compile(code, page.name, "exec")


class Backwards(nn.Module):
    """Somebody's network: 0 is noise, 1 is data, velocity data - noise, ten labels and one for none."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Embedding(11, 2)
        with torch.no_grad():
            self.shift.weight.zero_()
        self.law = GaussianMixture([0.7, 0.3], [[2.0, 1.0], [-1.0, 0.5]], [0.3, 0.6])

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return -self.law(x, 1 - t) + self.shift(cond)


def test_blocks_of_own_loop(capsys: pytest.CaptureFixture[str]) -> None:
    check, loop = blocks(ROOT / "docs" / "own_loop.md")
    network = Backwards()
    known: dict[str, Any] = {
        "network": network,
        "data": network.law.sample(400, torch.Generator().manual_seed(3)),
        "labels": torch.arange(400) % 10,
    }
    exec(compile(check, "own_loop.md", "exec"), known)
    assert capsys.readouterr().out.splitlines()[-1] == known["report"].suggestion
    assert known["report"].suggestion in check  # the comment shows what is printed
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(loop, "own_loop.md", "exec"), known)
    assert all(bool(role.shift.weight.any()) for role in (known["student"], known["auxiliary"]))
    assert not network.shift.weight.any()


def test_blocks_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["model.options.width=16", "teacher.updates=2", "distill.student_updates=1", "distill.batch_size=8"]
    few += ["run.device=cpu", "run.tensorboard=false", "data.name=digits"]
    for command in ("train-teacher", "distill"):
        assert main([command, "--run", "runs/demo", *(part for text in few for part in ("--set", text))]) == 0
    loop, own, load = blocks(ROOT / "README.md")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = (1, 8, 8)
        teacher, auxiliary = (build_model("mlp", shape, 10, width=8, depth=1) for _ in range(2))
        student_sample = torch.randn(16, *shape, requires_grad=True)
        t = torch.rand(16)
        known: dict[str, Any] = {
            "teacher": teacher, "auxiliary": auxiliary, "student_sample": student_sample, "t": t, "r": t / 2,
            "label": torch.arange(16) % 10,
        }  # fmt: skip
        assert loop.count("torch.randn(16, 4, 32, 32)") == 1
        exec(compile(loop.replace("16, 4, 32, 32", "16, 1, 8, 8"), "README.md", "exec"), known)
        assert student_sample.grad is not None
        assert known["u"].shape == (16, *shape)
        known["teacher"] = build_model("mlp", (2,), width=8, depth=1)
        exec(compile(own.replace("student_updates=500", "student_updates=1"), "README.md", "exec"), known)
        assert isinstance(known["student"], mfd_fast.Student)
        exec(compile(load, "README.md", "exec"), known)
    assert known["images"].shape == (16, 1, 8, 8)


def test_blocks_about_sana(sana_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    monkeypatch.chdir(tmp_path)
    fields, files, script = blocks(ROOT / "docs" / "sana.md")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        known: dict[str, Any] = {
            "x_t": torch.randn(3, 4, 4, 4), "t": torch.tensor([0.9, 0.5, 0.2]), "r": torch.zeros(3),
            "embeds": torch.randn(3, 6, 16), "mask": torch.ones(3, 6),
            "null": torch.zeros(1, 6, 16), "null_mask": torch.ones(1, 6),
        }  # fmt: skip
        code = fields.replace("path/to/pipeline", str(sana_pipeline)).replace('"cuda"', '"cpu"')
        exec(compile(code.replace("rank=64", "rank=4"), "sana.md", "exec"), known)
        assert known["u_teacher"].shape == known["u_auxiliary"].shape == (3, 4, 4, 4)
        save, load = files.index("save_lora("), files.index("load_lora(")
        exec(compile(files.replace("checkpoint-1000", "student"), "sana.md", "exec"), known)
        assert save < load
        assert Path("transformer/config.json").is_file()

        from mfd_fast.models.sana import load_transformer

        transformer = load_transformer(sana_pipeline, torch.float32)
        for adapter in ("default", "aux"):
            transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"]), adapter_name=adapter)
        known["transformer"] = transformer
        known["prompts"] = {"prompt_embeds": known["embeds"], "prompt_mask": known["mask"]}
        known["empty_prompt"] = {"prompt_embeds": known["null"], "prompt_mask": known["null_mask"]}
        exec(compile(script, "sana.md", "exec"), known)
    assert known["u_q"].shape == known["u_p"].shape == (3, 4, 4, 4)


class Stopwatch:
    """As much of pytest-benchmark's fixture as the page uses."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def __call__(self, function: Any, *arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)


def test_block_about_pytest_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(ROOT / "docs" / "benchmarks.md")
    monkeypatch.setattr(mfd_fast, "warmup", lambda field, x: None)  # tests/rollout/test_compiled.py tests it
    known: dict[str, Any] = {
        "network": build_model("mlp", (2,), width=8, depth=1),
        "x": torch.zeros(3, 2),
        "t": torch.tensor([0.1, 0.5, 0.02]),
        "r": torch.zeros(3),
    }
    exec(compile(code, "benchmarks.md", "exec"), known)
    watch = Stopwatch()
    known["test_rollout"](watch)
    assert watch.extra_info["evaluations"] == 5 + 25 + 1
    assert watch.extra_info["runner"] in ("eager", "fused")


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every mfd-fast command in a block of a shell."""
    indented = re.findall(r"(?m)^ {4}(mfd-fast .*)$", page.read_text("utf-8"))
    for block in [*indented, *(text for language, text in fenced(page) if language in ("", "sh", "bash"))]:
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.partition("#")[0].split("&&"):
                if part.strip().startswith("mfd-fast "):
                    yield shlex.split(part.replace("$DATA", "--set data.root=data"))[1:]


def test_commands_parse() -> None:
    found = [(page.name, words) for page in PAGES for words in commands(page)]
    assert len(found) > 30
    for name, words in found:
        if any(word in ("...", "NAME") or word.startswith("[") for word in words):
            continue
        assert parse(words).command == words[0], name


def rows_of_tables(page: Path) -> list[list[str]]:
    lines = [line for line in page.read_text("utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def test_digits_of_the_readme_are_those_measured() -> None:
    runs = json.loads((RESULTS / "demo-digits.json").read_text("utf-8"))["runs"]
    expected = []
    for run in runs:
        distances = [
            *(run["teacher"][steps] for steps in ("1", "10", "100")),
            run["student"]["1"],
            run["data_half_half"],
        ]
        expected.append([str(run["seed"]), *(f"{distance:.2f}" for distance in distances)])
    rows = rows_of_tables(ROOT / "README.md")
    assert [row for row in rows if row in expected] == expected
    assert all(run["class_agreement"]["student"] > 0.99 for run in runs)


def test_speeds_of_the_readme_are_those_measured() -> None:
    measured = json.loads((RESULTS / "compare.json").read_text("utf-8"))["table"]
    printed = [row[2] for row in rows_of_tables(ROOT / "README.md") if len(row) == 3 and re.match(r"\d", row[2])]
    order = ("torchdiffeq Euler", "torchode", "released loop, float32", "released loop, bfloat16")
    ratios = [next(row["ratio"] for row in measured if row["against"].startswith(start)) for start in order]
    best = [row["ratio"] for row in measured if row["ours"].startswith("mfd_fast compiled: ab2")]
    assert [words.split(" ")[0] for words in printed] == [f"{ratio:#.2g}".rstrip(".") for ratio in [*ratios, *best]]


def test_methods_of_the_readme_are_those_measured() -> None:
    finding = json.loads((RESULTS / "experiments" / "table.json").read_text("utf-8"))["finding"]
    rows = rows_of_tables(ROOT / "README.md")
    names = next(row for row in rows if row[1:2] == ["mfd"])
    ratios, seconds = (next(row for row in rows if row[0] == title) for title in ("ratio", "CPU seconds"))
    for name, ratio, cpu in zip(names[1:], ratios[1:], seconds[1:], strict=True):
        line = next(line for line in finding.splitlines() if line.split(" ")[0] == name)
        (mean,) = re.findall(r"([\d.]+) ± [\d.]+ x", line)
        (spent,) = re.findall(r"([\d.]+) ± [\d.]+ s for 1300", line)
        decimals = len(ratio.split(" ")[0].partition(".")[2])
        assert float(ratio.split(" ")[0]) == pytest.approx(float(mean), abs=0.51 * 10**-decimals), name
        assert int(cpu) == pytest.approx(float(spent), abs=0.51), name
