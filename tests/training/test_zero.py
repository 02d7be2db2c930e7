"""Roles that DeepSpeed shares out among processes, against one process that holds them whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mfd_fast.config import SettingError, Settings
from mfd_fast.estimate.network import sana_1600m
from mfd_fast.estimate.plan import Plan
from mfd_fast.estimate.states import role_states
from mfd_fast.methods.base import Needs
from mfd_fast.storage import read_json
from mfd_fast.training import zero
from mfd_fast.training.checkpoint import list_checkpoints, load_checkpoint
from mfd_fast.training.context import Context
from mfd_fast.training.distributed import World
from mfd_fast.training.requirements import check_settings
from mfd_fast.training.zero import engine_config, import_deepspeed

STAGES = ("two-1", "two-2", "two-3")
BESIDE_LORA = ("lora-2", "lora-3", "beside LoRA, another stage", "beside LoRA, as a whole")
"""The auxiliary is shared out, the student is low-rank and whole in each process."""


class Runs(NamedTuple):
    """What zero_ranks.py left."""

    folder: Path
    told: dict[str, Any]

    def log(self, name: str) -> list[dict[str, Any]]:
        """Every line of a run's log."""
        return [json.loads(line) for line in (self.folder / name / "log.jsonl").read_text().splitlines()]

    def updates(self, name: str) -> list[dict[str, Any]]:
        """The line of every update."""
        return [line for line in self.log(name) if "role" in line]

    def student(self, name: str) -> dict[str, Tensor]:
        """The finished student."""
        return load_file(self.folder / name / "student.safetensors")

    def seen(self, name: str) -> list[list[dict[str, Any]]]:
        """What both processes saw in each update."""
        return [read_json(self.folder / f"{name}-{rank}.json") for rank in (0, 1)]

    def said(self, name: str, rank: int) -> str:
        """What a process printed."""
        return (self.folder / f"{name}-{rank}.txt").read_text()

    def teacher(self) -> dict[str, Tensor]:
        """The teacher of all runs."""
        return load_file(self.folder / "teacher" / "teacher.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All scenarios of zero_ranks.py, run once."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (mfd_fast[zero])")
    folder = tmp_path_factory.mktemp("zero")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "MASTER"))}
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            str(Path(__file__).with_name("zero_ranks.py")),
            str(folder),
        ],
        env=clean | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Runs(folder, json.loads((folder / "told.json").read_text()))


# One run of the program serves all of them.
several = [pytest.mark.slow, pytest.mark.timeout(900)]


class TestTwoProcesses:
    pytestmark = several

    @pytest.mark.parametrize(
        "name",
        [
            *STAGES,
            "offload",
            "another number",
            "another stage",
            "as a whole",
            "less shared out",
            "from a whole",
            *BESIDE_LORA,
        ],
    )
    def test_losses_and_student_are_those_of_one_process(self, runs: Runs, name: str) -> None:
        """Also from a checkpoint of another number of processes or another stage, and of whole roles."""
        assert set(runs.told[name]["codes"]) == {0}, runs.said(name, 0)
        one = "lora-one" if name in BESIDE_LORA else "one"
        whole, ours = runs.updates(one), runs.updates(name)
        assert [line["role"] for line in ours] == ["auxiliary", "auxiliary", "student"] * 7
        for key in ("loss", "grad_norm", "learning_rate"):
            assert [line[key] for line in ours] == pytest.approx([line[key] for line in whole], rel=5e-6)
        expected = runs.student(one)
        start = runs.teacher() if one == "one" else {key: 0 * value for key, value in expected.items()}
        moved = [(value - start[key]).abs().max().item() for key, value in expected.items()]
        assert max(moved) > 1e-3
        assert all(key.endswith(("lora_A", "lora_B")) for key in expected) == (one == "lora-one")
        for key, value in runs.student(name).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", [*STAGES, "offload", "two-3-bf16", "lora-2", "lora-3"])
    def test_each_engine_changes_in_its_phase_only(self, runs: Runs, name: str) -> None:
        for seen in runs.seen(name):
            assert [update["changed"] for update in seen] == [[update["role"]] for update in seen]

    @pytest.mark.parametrize("name", [*STAGES, "offload", "two-3-bf16", "two-2-fp16", "nan", "lora-3"])
    def test_rollouts_see_present_weights_in_the_same_memory(self, runs: Runs, name: str) -> None:
        for seen in runs.seen(name):
            assert not any(update["moved"] for update in seen)
            assert max(update["gap"] for update in seen) == 0
            assert all(update["linear is torch's"] for update in seen)

    def test_checkpoints_do_not_tell_how_they_were_made(self, runs: Runs) -> None:
        """The same groups, names, shapes and, to rounding, values as those of one process."""
        whole, *others = [
            load_checkpoint(list_checkpoints(runs.folder / name / "checkpoints" / "distill")[-1])
            for name in ("one", *STAGES)
        ]
        for ours in others:
            assert ours.tensors.keys() == whole.tensors.keys()
            assert ours.state["training"] == whole.state["training"]
            for group, tensors in whole.tensors.items():
                assert ours.tensors[group].keys() == tensors.keys()
                for name, value in tensors.items():
                    torch.testing.assert_close(ours.tensors[group][name], value, rtol=1e-4, atol=1e-6)

    def test_only_the_main_process_speaks(self, runs: Runs) -> None:
        for name in (*STAGES, "nan"):
            assert runs.said(name, 1) == ""
            assert "deepspeed" not in runs.said(name, 0).lower()

    def test_a_resumed_run_says_what_has_changed(self, runs: Runs) -> None:
        assert "no longer bit for bit as without a stop: processes was 2, is 1" in runs.said("another number", 0)
        assert "no longer bit for bit as without a stop: zero_stage was 2, is 3" in runs.said("another stage", 0)

    def test_a_batch_that_cannot_be_split_is_refused(self, runs: Runs) -> None:
        assert runs.told["a batch that cannot be split"]["codes"] == [2, 2, 2]
        words = "batch_size must be a multiple of processes x accumulation = 3 x 2, got 16"
        assert words in runs.said("a batch that cannot be split", 0)

    def test_a_loss_that_is_not_finite_in_one_process_skips_the_update_in_all(self, runs: Runs) -> None:
        assert runs.told["nan"]["codes"] == [0, 0]
        (event,) = [line for line in runs.log("nan") if "event" in line]
        assert (event["update"], event["skipped_role"], event["cause"], event["sample"]) == (5, "auxiliary", "loss", 13)
        for seen in runs.seen("nan"):
            assert [index for index, update in enumerate(seen) if not update["changed"]] == [4]
        assert "update 4 of the auxiliary was skipped" in runs.said("nan", 0)
        assert [line["skipped"] for line in runs.updates("nan")] == [0] * 4 + [1] * 17

    def test_a_killed_process_ends_the_others_in_words(self, runs: Runs) -> None:
        told = runs.told["dies"]
        assert told["codes"] == [1, -9]
        assert "another process of this run is gone" in runs.said("dies", 0)
        assert told["seconds"] < 120

    def test_engines_wait_no_longer_than_the_run_does(self, runs: Runs) -> None:
        """The first message that process 1 does not answer is one of an engine, in DeepSpeed's own group."""
        assert runs.told["hangs"]["codes"] == [1, 1]
        assert "did not answer within run.patience_seconds" in runs.said("hangs", 0)

    def test_memory_is_that_of_the_estimate(self, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bytes a weight; on the CPU those of the host are among them."""
        assert len(runs.told["memory"]) == 5
        for found in runs.told["memory"]:
            weights, sharing = found["weights"], {"zero": found["stage"], "offload": found["offload"], "gpus": 2}
            monkeypatch.setattr(zero, "GROUP", found["group"])
            network = sana_1600m("bfloat16", 64)._replace(parameters=weights)
            plan = Plan(auxiliary="full", student="lora", rows=1, precision="bfloat16", **sharing)
            states = role_states(plan, network, "full", average=False)
            always = states.weights + states.kept_gradients + states.master + states.moments + states.replica
            gradients, stepped = states.gradients / weights, states.stepped / weights
            # Offload has two buffers for the largest tensor, and a backward pass a few gradients on their way.
            buffers = 0.3 if plan.offload else 0.01
            assert found["kept"] == pytest.approx((always + states.host) / weights, abs=buffers)
            assert gradients <= found["backward"] + 0.01 < gradients + 0.8
            assert found["step"] == pytest.approx(stepped, abs=0.01)
            assert found["after"] == pytest.approx(0, abs=0.01)

    def test_low_precision_keeps_float32_weights(self, runs: Runs) -> None:
        """Engines compute in bfloat16; the weights that are updated and saved are those of the teacher, not rounded."""
        assert runs.told["two-3-bf16"]["codes"] == [0, 0]
        whole, ours = runs.updates("one-bf16"), runs.updates("two-3-bf16")
        for line, other in zip(whole, ours, strict=True):
            assert other["loss"] == pytest.approx(line["loss"], rel=0.03)
        student, expected, teacher = runs.student("two-3-bf16"), runs.student("one-bf16"), runs.teacher()
        moved = torch.cat([(expected[name] - teacher[name]).flatten() for name in teacher])
        gap = torch.cat([(student[name] - expected[name]).flatten() for name in teacher])
        assert gap.norm() < 0.2 * moved.norm()
        every = torch.cat([value.flatten() for value in student.values()])
        assert (every != every.bfloat16().float()).float().mean() > 0.9

    def test_a_loss_scale_falls_and_is_resumed(self, runs: Runs) -> None:
        """Float16 gradients overflow at the scale of 2^16 that it begins with; a resumed run has the same bits."""
        assert runs.told["two-2-fp16"]["codes"] == runs.told["the same"]["codes"] == [0, 0]
        (event,) = [line for line in runs.log("two-2-fp16") if "event" in line]
        assert event["skipped_role"] == "auxiliary"
        lines = runs.updates("two-2-fp16")
        good = sum(line["role"] == "auxiliary" and line["update"] > event["update"] for line in lines)
        assert good > 5
        straight, again = (
            load_checkpoint(list_checkpoints(runs.folder / name / "checkpoints" / "distill")[-1])
            for name in ("two-2-fp16", "the same")
        )
        scale = straight.state["training"]["auxiliary"]["loss_scale"]
        assert (scale["scale"], scale["_growth_tracker"]) == (2.0**15, good)
        assert straight.state["training"]["student"]["loss_scale"]["scale"] == 2.0**16
        assert again.state["training"] == straight.state["training"]
        for group, tensors in straight.tensors.items():
            for name, value in tensors.items():
                assert torch.equal(again.tensors[group][name], value), f"{group}/{name}"


@pytest.mark.parametrize(
    ("needs", "override", "words"),
    [
        (Needs(discriminator="teacher"), "", "needs a discriminator, which does not work with distill.zero_stage 2"),
        (Needs(derivative=True), "", "needs a forward-mode derivative"),
        (Needs(same_weights=True), "", "needs weights of one role moved towards the other's"),
        (Needs(target_decay=0.9), "", "needs a slowly moving target"),
        (Needs(), "distill.roles=lora", "LoRA roles are too small"),
        (Needs(auxiliary=False), "distill.roles=lora-student", "LoRA roles are too small"),
        (Needs(), "distill.recompute_steps=true", "distill.recompute_steps runs an engine inside"),
        (
            Needs(),
            "distill.auxiliary_optimizer.name=adamw8bit",
            r"auxiliary_optimizer\.name to adamw for ZeRO",
        ),
        (Needs(), "distill.compile=on", "DeepSpeed's hooks cannot be compiled"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    tiny_settings: Callable[..., Settings], needs: Needs, override: str, words: str
) -> None:
    overrides = ["distill.zero_stage=2", *([override] if override else [])]
    with pytest.raises(ValueError, match=words):
        check_settings(needs, tiny_settings(*overrides).distill)
    check_settings(Needs(), tiny_settings("distill.zero_stage=2").distill)
    # The student's own steps and moments are its own affair where it is low-rank.
    free = ["distill.recompute_steps=true", "distill.student_optimizer.name=adamw8bit", "distill.roles=lora-student"]
    check_settings(Needs(), tiny_settings("distill.zero_stage=2", *free).distill)


def test_wrong_stages_are_refused(tiny_settings: Callable[..., Settings]) -> None:
    with pytest.raises(SettingError, match=r"distill.zero_stage must be int, from 0 to 3; got 4"):
        tiny_settings("distill.zero_stage=4")
    with pytest.raises(SettingError, match=r"distill.zero_offload needs zero_stage 1, 2 or 3"):
        tiny_settings("distill.zero_offload=true")


def test_the_engine_gets_the_settings_of_its_role(tiny_settings: Callable[..., Settings]) -> None:
    settings = tiny_settings(
        *("distill.zero_stage=2", "distill.zero_offload=true", "distill.accumulation=2", "distill.precision=float16"),
        "distill.student_optimizer.clip_norm=none",
    ).distill
    context = Context(torch.device("cpu"), World(1, 4, 1))
    config = engine_config(settings, settings.auxiliary_optimizer, context)
    parts = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [config[part] for part in parts] == [16, 2, 2, 1.0]
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["fp16"]["initial_scale_power"] == 16
    assert engine_config(settings, settings.student_optimizer, context)["gradient_clipping"] == 0.0


def test_without_deepspeed_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mfd_fast\[zero\]'"):
        import_deepspeed(Context(torch.device("cpu"), World()))


@pytest.mark.parametrize(
    ("device", "launched", "number"), [("cuda:3", "0", "3"), ("cpu", "1", "1"), ("cpu", None, "0")]
)
def test_deepspeed_is_told_the_gpu_of_the_run(
    monkeypatch: pytest.MonkeyPatch, device: str, launched: str | None, number: str
) -> None:
    """It moves process and weights to the GPU of this number, whichever the run has chosen."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", launched or "")
    if launched is None:
        monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ModuleNotFoundError):
        import_deepspeed(Context(torch.device(device), World()))
    assert os.environ["LOCAL_RANK"] == number


def test_other_errors_than_of_messages_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^out of memory$"), zero.peers_in_words():
        raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match=r"another process of this run is gone"), zero.peers_in_words():
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection reset by peer")
