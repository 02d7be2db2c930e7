"""From a prompt file to a four-step student to pictures, with a whole tiny pipeline of SANA on disk."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mfd_fast import load_student
from mfd_fast.cli import main
from mfd_fast.cli.options import what_next
from mfd_fast.data.prompt_store import PromptStore
from mfd_fast.data.verify import damaged_files, recorded_digests
from mfd_fast.ops import quantized_linear
from mfd_fast.run_folder import RunFolder
from mfd_fast.training.checkpoint import latest_checkpoint
from mfd_fast.training.distill import DistillTraining

pytest.importorskip("diffusers")
TINY = (
    *("distill.student_updates=3", "distill.cycle_auxiliary=3", "distill.batch_size=4", "distill.precision=float32"),
    *("distill.lora_rank=4", "distill.rollout.step_size=0.25", "distill.sample_every=2", "distill.checkpoint_every=1"),
    *("distill.student_optimizer.learning_rate=0.02", "distill.auxiliary_optimizer.learning_rate=0.02"),
    *("distill.log_every=1", "data.options.held_out=4", "run.device=cpu", "run.threads=1", "run.tensorboard=false"),
)


class Sana:
    """A pipeline, its encoded prompts, and the command that distils it."""

    def __init__(self, pipeline: Path, folder: Path) -> None:
        from tiny_pipeline import write_prompts

        self.pipeline, self.encoded = pipeline, folder / "encoded"
        self.file = write_prompts(folder / "prompts.tsv")
        self.encode = ["encode-prompts", str(self.file), str(self.encoded), "--pipeline", str(pipeline)]
        self.encode += ["--precision", "float32", "--shard-rows", "5", "--device", "cpu"]

    def distill(self, run: Path, *settings: str, preset: str = "sana-1600m") -> list[str]:
        chosen = [part for setting in (*TINY, f"data.root={self.encoded}", *settings) for part in ("--set", setting)]
        return ["distill", "--preset", preset, "--pipeline", str(self.pipeline), "--run", str(run), *chosen]


@pytest.fixture(scope="module")
def sana(sana_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Sana:
    made = Sana(sana_pipeline, tmp_path_factory.mktemp("sana"))
    assert main(made.encode) == 0
    return made


@pytest.fixture(scope="module")
def finished_sana(sana: Sana, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    run = tmp_path_factory.mktemp("run") / "run"
    assert main(sana.distill(run)) == 0
    return run


def test_prompts_are_encoded_and_broken_lines_shown(cli: Any, sana: Sana, tmp_path: Path) -> None:
    result = cli(*sana.encode[:2], tmp_path / "an out", *sana.encode[3:])
    assert result.code == 0
    assert f"--pipeline {sana.pipeline} --set 'data.root={tmp_path / 'an out'}'" in result.out
    assert "12 prompts in " in result.out
    assert "2 broken lines" in result.out
    assert "line 4: expected image, prompt, score" in result.out
    assert damaged_files(recorded_digests(tmp_path / "an out")) == {}
    again = cli(*sana.encode[:2], tmp_path / "an out", *sana.encode[3:])
    assert again.code == 0


def test_the_run_folder_holds_no_backbone(finished_sana: Path) -> None:
    run = RunFolder(finished_sana)
    assert not run.has_network("teacher")
    assert all(name.endswith((".lora_A", ".lora_B")) for name in run.read_tensors("student"))
    checkpoint, _ = latest_checkpoint(run.distill_checkpoints())
    assert checkpoint is not None
    every = [name for group in checkpoint.tensors.values() for name in group]
    assert not any("base" in name for name in every)
    assert {"student", "auxiliary", "optimizer_student", "optimizer_auxiliary"} <= checkpoint.tensors.keys()
    lines = [json.loads(line) for line in (finished_sana / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_what_to_do_next_is_said(finished_sana: Path) -> None:
    words = what_next(RunFolder(finished_sana))
    first, second = words.splitlines()
    assert first == f"try: mfd-fast sample {finished_sana} --grid samples.png"
    assert second == f"for diffusers: mfd-fast export {finished_sana} lora"


def pixels(path: Path | str) -> Any:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_pictures_are_made_at_an_interval(finished_sana: Path) -> None:
    pictures = sorted((finished_sana / "samples").iterdir())
    assert [path.name for path in pictures] == ["update-000000.png", "update-000002.png"]
    first, later = (pixels(path).astype(float) for path in pictures)
    assert first.shape == later.shape
    assert np.abs(first - later).max() > 0  # the same prompts and noise, another student


def stop_in_update(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    original = DistillTraining.run_update

    def run_update(self: Any, update: int) -> Any:
        if update == number:
            signal.raise_signal(signal.SIGTERM)
        return original(self, update)

    monkeypatch.setattr(DistillTraining, "run_update", run_update)


def test_a_resume_is_exact(cli: Any, sana: Sana, finished_sana: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path("run")
    with monkeypatch.context() as patch:
        stop_in_update(patch, 5)  # between two auxiliary updates, with samples made ahead
        assert cli(*sana.distill(run)).code == 75
    assert cli(*sana.distill(run), "--resume").code == 0
    ends = [latest_checkpoint(RunFolder(path).distill_checkpoints())[0] for path in (finished_sana, run)]
    whole, resumed = (end.tensors for end in ends if end is not None)
    assert whole.keys() == resumed.keys()
    for group, tensors in whole.items():
        for name, value in tensors.items():
            assert torch.equal(resumed[group][name], value), f"{group} {name}"
    begun = RunFolder(run).distill_checkpoints()
    assert len(list(begun.iterdir())) == 2
    assert any(float(value.abs().max()) > 0 for name, value in whole["auxiliary"].items() if name.endswith("lora_B"))


def test_a_teacher_of_8_bits_is_measured_again_on_resume(
    cli: Any, refused: Callable[..., str], sana: Sana, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, low = Path("run"), "distill.teacher_weights=int8"
    with monkeypatch.context() as patch:
        stop_in_update(patch, 5)
        stopped = cli(*sana.distill(run, low))
    assert stopped.code == 75
    assert "distillation: 8 bits change the gradient by 0.0" in stopped.out
    with monkeypatch.context() as patch:
        patch.setitem(quantized_linear.FORMATS, "int8", quantized_linear.Format(torch.int8, 1.0))
        words = refused(*sana.distill(run, low), "--resume")
    assert "'int8' is refused after 1 student updates" in words
    assert "go on from the last checkpoint with --set distill.teacher_weights=float" in words
    resumed = cli(*sana.distill(run, "distill.teacher_weights=float"), "--resume")
    assert resumed.code == 0, resumed.err
    assert "no longer bit for bit as without a stop: teacher_weights was int8, is None" in resumed.out
    noted = json.loads((run / "teacher_weights.json").read_text())
    assert [entry["student_updates"] for entry in noted] == [0, 1, 1]
    assert [entry["error"] < entry["solver_error"] for entry in noted] == [True, True, False]
    assert "is for distill.method 'mfd'" in refused(*sana.distill(Path("vsd"), low, "distill.method=vsd"))


def checkpoint_of_the_script(pipeline: Path, folder: Path, rank: int = 4) -> dict[str, torch.Tensor]:
    """A checkpoint's folder as the released script leaves it: the student's adapter; returns its weights."""
    from diffusers import SanaPipeline, SanaTransformer2DModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = SanaTransformer2DModel.from_pretrained(pipeline / "transformer")
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v"])
    transformer.add_adapter(config)
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(transformer)
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
    SanaPipeline.save_lora_weights(folder, transformer_lora_layers=state)
    return {f"transformer.{name.removesuffix('.weight')}": value for name, value in state.items()}


def test_a_run_goes_on_from_an_adapter_of_the_script(
    cli: Any, refused: Callable[..., str], sana: Sana, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins with its bits, and a resume needs the file no more."""
    weights = checkpoint_of_the_script(sana.pipeline, Path("checkpoint-7"))
    given = ("--student-lora", "checkpoint-7")
    assert cli(*sana.distill(Path("start"), "distill.student_updates=0", "distill.lora_alpha=4"), *given).code == 0
    start = RunFolder(Path("start")).read_tensors("student")
    assert start.keys() == weights.keys()
    assert all(torch.equal(start[name], value) for name, value in weights.items())
    # Its alpha is not that of the run: the adapter's scale goes into its weights.
    straight = cli(*sana.distill(Path("straight")), *given)
    assert straight.code == 0, straight.err
    assert "the student begins from checkpoint-7/pytorch_lora_weights.safetensors (12 layers)" in straight.out
    assert "the auxiliary begins as the teacher" in straight.out
    with monkeypatch.context() as patch:
        stop_in_update(patch, 5)
        assert cli(*sana.distill(Path("run")), *given).code == 75
    noted = json.loads((Path("run") / "adapters.json").read_text())
    shutil.rmtree("checkpoint-7")
    assert "distill.student_lora was 'checkpoint-7', is None" in refused(*sana.distill(Path("run")), "--resume")
    with monkeypatch.context() as patch:
        stop_in_update(patch, 7)
        assert cli(*sana.distill(Path("run")), *given, "--resume").code == 75
    resumed = cli(*sana.distill(Path("run")), *given, "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert "begins from" not in resumed.out
    assert json.loads((Path("run") / "adapters.json").read_text()) == noted
    assert RunFolder(Path("run")).read_settings().distill.student_lora == "checkpoint-7"
    one, other = (RunFolder(Path(run)).read_tensors("student") for run in ("straight", "run"))
    assert all(torch.equal(other[name], value) for name, value in one.items())
    assert "there is no LoRA file" in refused(*sana.distill(Path("another")), *given)
    assert not Path("another").exists()


def test_both_roles_of_a_run_go_on_in_another(cli: Any, sana: Sana, finished_sana: Path) -> None:
    for role in ("student", "auxiliary"):
        assert cli("export", finished_sana, role, "--role", role).code == 0
    given = ("--student-lora", "student", "--auxiliary-lora", "auxiliary")
    result = cli(*sana.distill(Path("run"), "distill.student_updates=1"), *given)
    assert result.code == 0, result.err
    assert "as the teacher" not in result.out
    assert json.loads((Path("run") / "adapters.json").read_text()).keys() == {"student", "auxiliary"}


def test_the_exported_lora_gives_the_same_latents_in_diffusers(cli: Any, finished_sana: Path, sana: Sana) -> None:
    from diffusers import SanaPipeline

    assert cli("export", finished_sana, "lora").code == 0
    store = PromptStore(sana.encoded)
    embeds, mask = store.row(1)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    prompts = {"prompt_embeds": embeds[None], "prompt_attention_mask": mask[None].long()}
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent", "use_resolution_binning": False}
    pipeline = SanaPipeline.from_pretrained(sana.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    results = []
    for lora in (None, "lora"):
        if lora is not None:
            pipeline.load_lora_weights(lora)
        made = pipeline(**prompts, **call, latents=noise.clone(), height=64, width=64, prompt=None)
        results.append(made.images)
    bare, adapted = results
    student = load_student(finished_sana)
    with torch.no_grad():
        ours = student.generate(noise, {"prompt_embeds": embeds[None], "prompt_mask": mask[None] != 0})
    torch.testing.assert_close(ours, adapted, atol=1e-4, rtol=0.0)
    assert float((ours - bare).abs().max()) > 0.01


def test_a_grid_of_pictures(cli: Any, finished_sana: Path, sana: Sana, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a red cat\nthe moon\n")
    result = cli("sample", finished_sana, "--pipeline", sana.pipeline, "--prompts", "mine.txt", "--grid", "grid.png",
                 "--images", "single", "--out", "latents.npz", "--num", "36", "--device", "cpu")  # fmt: skip
    assert result.code == 0, result.err
    singles = [pixels(path) for path in sorted(Path("single").iterdir())]
    assert [picture.shape for picture in singles] == [(8, 8, 3)] * 36
    grid = pixels("grid.png")
    assert grid.shape == (6 * 9 + 1, 6 * 9 + 1, 3)  # a line between pictures
    for number, picture in enumerate(singles):
        top, left = 1 + number // 6 * 9, 1 + number % 6 * 9
        assert np.abs(grid[top : top + 8, left : left + 8].astype(int) - picture).max() <= 1
    latents = torch.from_numpy(np.load("latents.npz")["x"])
    assert latents.shape == (36, 4, 4, 4)
    student = load_student(finished_sana, pipeline=sana.pipeline)
    assert cli("sample", finished_sana, "--prompts", "mine.txt", "--images", "each").code == 0
    assert [path.name for path in sorted(Path("each").iterdir())] == ["00000.png", "00001.png"]  # one for each prompt
    assert cli("sample", finished_sana, "--prompts", "mine.txt", "--images", "each").code == 0  # the same names again
    mixed = cli("sample", finished_sana, "--num", "1", "--images", "each")
    assert mixed.code == 2
    assert "--images: each holds pictures beside the 1 to be made (00001.png)" in mixed.err
    held_out = cli("sample", finished_sana, "--num", "3", "--out", "held_out.npz")
    assert held_out.code == 0
    data = PromptStore(sana.encoded)
    rows = [data.row(8 + row) for row in range(3)]
    from mfd_fast.data.prompt_store import pad

    expected = student.sample(3, pad(rows, data.index.longest))
    torch.testing.assert_close(torch.from_numpy(np.load("held_out.npz")["x"]), expected, atol=1e-5, rtol=0.0)


def test_what_the_report_and_info_say_of_a_pipeline(cli: Any, finished_sana: Path, tmp_path: Path, sana: Sana) -> None:
    run = Path(shutil.copytree(finished_sana, tmp_path / "runs" / "mine"))
    assert cli("report", run).code == 0
    page = (run / "report.html").read_text()
    assert "mfd-fast evaluate runs/mine" not in page  # it would be refused
    assert page.count("mfd-fast sample runs/mine --images pictures") == 3
    assert "mfd-fast export runs/mine lora" in page
    assert f"teacher  the pipeline {sana.pipeline}\nstudent  finished\n" in cli("info", run).out


def test_another_pipeline_is_refused(
    cli: Any, refused: Callable[..., str], finished_sana: Path, sana: Sana, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(sana.pipeline, tmp_path / "other"))
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.bias"] = tensors["proj_out.bias"] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    words = refused("sample", finished_sana, "--pipeline", other, "--out", "a.npz", "--num", "1")
    assert "has other weights than the pipeline" in words
    run = Path(shutil.copytree(finished_sana, tmp_path / "again"))
    for name in ("student.json", "student.safetensors"):
        (run / name).unlink()
    changed = Sana.__new__(Sana)
    changed.pipeline, changed.encoded = other, sana.encoded
    assert "network.weights was" in refused(*changed.distill(run), "--resume")
    moved = Path(shutil.copytree(sana.pipeline, tmp_path / "moved"))
    assert cli("sample", finished_sana, "--pipeline", moved, "--out", "a.npz", "--num", "1").code == 0


def test_wrong_flags(refused: Callable[..., str], sana: Sana, finished_sana: Path, points: list[str]) -> None:
    without = [part for part in sana.distill(Path("run")) if part not in ("--pipeline", str(sana.pipeline))]
    assert "give --pipeline PATH" in refused(*without)
    assert "needs model.name to be one of sana" in refused("distill", *points, "--pipeline", str(sana.pipeline))
    nowhere = ["owner/name" if part == str(sana.pipeline) else part for part in sana.distill(Path("run"))]
    assert "neither a folder nor a pipeline in the hub's cache; --download fetches it" in refused(*nowhere)
    assert "holds no encoded prompts" in refused(*sana.distill(Path("run"), "data.root=nothing"))
    assert "--label: this student has no classes" in refused("sample", finished_sana, "--label", "3", "--out", "a.npz")
    assert "distill.sample_every=0" in refused(*without_vae(sana).distill(Path("run")))
    assert "needs real samples" in refused(*sana.distill(Path("run"), "distill.method=cd"))
    assert "comes trained from a diffusers pipeline" in refused("train-teacher", "--preset", "sana-1600m")
    assert "comes trained from a diffusers pipeline" in refused("demo", "--preset", "sana-1600m")
    assert "prompts have none" in refused("evaluate", finished_sana)
    checkpoint_of_the_script(sana.pipeline, Path("wide"), rank=8)
    wide = refused(*sana.distill(Path("run")), "--student-lora", "wide")
    assert "has rank 8, but distill.lora_rank is 4" in wide
    assert "the student of this run is no low-rank role" in refused(
        *sana.distill(Path("run"), "distill.roles=full", "distill.lora_rank=8"), "--student-lora", "wide"
    )
    assert not Path("run").exists()


def without_vae(sana: Sana) -> Sana:
    changed = Sana.__new__(Sana)
    changed.pipeline = Path(shutil.copytree(sana.pipeline, "no-vae", ignore=shutil.ignore_patterns("vae")))
    changed.encoded = sana.encoded
    return changed


@pytest.mark.parametrize("where", ["__init__", "run_update"])
def test_without_memory_a_run_says_what_to_change(
    cli: Any, sana: Sana, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In an update, and in the passes that compile it."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 24 GiB.")

    monkeypatch.setattr(DistillTraining, where, full)
    result = cli(*sana.distill(Path("run"), preset="sana-1600m-24gb"))
    assert result.code == 1
    named = ("distill.sample_rows = ", "distill.rollout.max_rows = ", "distill.accumulation twice as large")
    assert all(words in result.err for words in ("Cheapest ways to need less", *named)), result.err
    assert result.err.count("(costs") == 3


@pytest.mark.parametrize("preset", ["sana-1600m-release", "sana-1600m-24gb", "sana-1600m-96gb"])
def test_presets_run_on_a_tiny_pipeline(cli: Any, sana: Sana, preset: str) -> None:
    """In the precision and with the savings of the preset."""
    few = ("distill.student_updates=1", "distill.cycle_auxiliary=1", "distill.cycle_student=1", "distill.batch_size=8",
           "distill.precision=bfloat16", "distill.sample_every=0")  # fmt: skip
    result = cli(*sana.distill(Path("run"), *few, preset=preset))
    assert result.code == 0, result.err
    assert all(value.dtype == torch.float32 for value in RunFolder(Path("run")).read_tensors("student").values())
