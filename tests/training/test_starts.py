"""Roles that begin from adapters on disk."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mfd_fast.config import DistillSettings
from mfd_fast.models.diffusers_lora import save_lora
from mfd_fast.models.sana import SanaNetwork, SanaRoles
from mfd_fast.training.roles import FullRoles, UnlikeRoles
from mfd_fast.training.starts import begin_from_adapters, check_adapters, note_start

SETTINGS = DistillSettings(roles="lora", lora_rank=4, lora_alpha=8.0, lora_targets=["to_q", "to_k", "to_v"])


@pytest.fixture
def adapters(make_sana: Callable[..., Any], randomize: Any, tmp_path: Path) -> SanaRoles:
    """Random roles; both lie in ``student`` and ``auxiliary`` as files."""
    roles = SanaRoles(make_sana(), rank=4, lora_alpha=8)
    randomize(roles)
    for role in roles.roles:
        save_lora(tmp_path / role, roles, role)
    return roles


def test_both_roles_begin_bit_for_bit(make_sana: Callable[..., Any], adapters: SanaRoles, tmp_path: Path) -> None:
    given = replace(SETTINGS, student_lora=str(tmp_path / "student"), auxiliary_lora=str(tmp_path / "auxiliary"))
    roles = SanaRoles(make_sana(), rank=4, lora_alpha=8, seed=3)
    read = begin_from_adapters(roles, given)
    for role in roles.roles:
        for name, value in adapters.state_dict(role).items():
            assert torch.equal(roles.state_dict(role)[name], value), name
    assert {role: (start["rank"], start["layers"]) for role, start in read.items()} == {
        "student": (4, 12),
        "auxiliary": (4, 12),
    }
    assert read["student"]["sha256"] != read["auxiliary"]["sha256"]


def test_a_low_rank_student_beside_a_whole_auxiliary(
    make_sana: Callable[..., Any], adapters: SanaRoles, tmp_path: Path
) -> None:
    teacher = SanaNetwork(make_sana())
    student = SanaRoles(teacher, rank=4, lora_alpha=8, roles=["student"])
    roles = UnlikeRoles(auxiliary=FullRoles(teacher, ["auxiliary"]), student=student)
    begin_from_adapters(roles, replace(SETTINGS, student_lora=str(tmp_path / "student")))
    for name, value in adapters.state_dict("student").items():
        assert torch.equal(student.state_dict("student")[name], value), name
    with pytest.raises(ValueError, match="the auxiliary of this run is no low-rank role"):
        begin_from_adapters(roles, replace(SETTINGS, auxiliary_lora=str(tmp_path / "auxiliary")))


def test_what_was_read_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = {"student": {"file": "a/b.safetensors", "sha256": "00", "rank": 4, "layers": 12}}
    note_start(tmp_path, read)
    assert json.loads((tmp_path / "adapters.json").read_text()) == read
    said = capsys.readouterr().out
    assert "the student begins from a/b.safetensors (12 layers)" in said
    assert "the auxiliary begins as the teacher and has to learn this student first" in said
    note_start(tmp_path, read | {"auxiliary": read["student"]})
    assert "as the teacher" not in capsys.readouterr().out


def test_what_does_not_fit_is_refused(make_sana: Callable[..., Any], adapters: SanaRoles, tmp_path: Path) -> None:
    given = replace(SETTINGS, student_lora=str(tmp_path / "student"))
    with pytest.raises(FileNotFoundError, match=r"distill.auxiliary_lora: there is no LoRA file nowhere/pytorch"):
        check_adapters(replace(SETTINGS, auxiliary_lora="nowhere"))
    with pytest.raises(ValueError, match=r"has rank 4, but distill.lora_rank is 16: set it to that of the adapter"):
        check_adapters(replace(given, lora_rank=16))
    with pytest.raises(ValueError, match="the student of this run is no low-rank role"):
        begin_from_adapters(FullRoles(make_sana()), given)
    more = SanaRoles(make_sana(), rank=4, lora_alpha=8, targets=["to_q", "to_k", "to_v", "to_out.0"])
    with pytest.raises(ValueError, match=r"it lacks 4 of the layers \(.*attn1.to_out.0, .*set distill.lora_targets"):
        begin_from_adapters(more, given)
    less = SanaRoles(make_sana(), rank=4, lora_alpha=8, targets=["to_q"])
    before = less.state_dict("student")
    with pytest.raises(ValueError, match=r"it also adapts 8 of the layers \(.*attn1.to_k, .*, \.\.\.\)"):
        begin_from_adapters(less, given)
    assert all(torch.equal(less.state_dict("student")[name], value) for name, value in before.items())
    file = tmp_path / "student" / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if "attn1.to_q.lora_B" not in name}, file)
    with pytest.raises(ValueError, match=r"distill.student_lora: .*\.safetensors: lora_A or lora_B is missing"):
        check_adapters(given)
