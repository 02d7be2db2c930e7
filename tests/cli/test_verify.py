"""`mfd-fast verify-data` on converted latents and encoded prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mfd_fast.data.occupancy import toy
from mfd_fast.data.occupancy.convert import convert
from mfd_fast.data.prompt_store import NEGATIVE, PromptIndex, pack, write_index, write_shard


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """Both splits of a small toy set, converted."""
    toy.write_release(tmp_path / "release", scenes={"training": 2, "validation": 1})
    for split in toy.SPLITS:
        paths = [tmp_path / "release" / name for name in (f"nus_sem_occ_{split}.pkl", f"nuscenes_infos_{split}.pkl")]
        convert(*paths, tmp_path / "latents" / split, frames_per_file=12)
    return tmp_path / "latents"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Four encoded prompts in two shards."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    rows = pack(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3))
    shards = tuple(write_shard(folder, f"shard-{number}.safetensors", rows) for number in range(2))
    negative = write_shard(folder, NEGATIVE, pack(torch.zeros(1, 2, 4), torch.ones(1, 2)))
    write_index(folder, PromptIndex(4, 4, 3, shards, negative))
    return folder


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_undamaged_data(cli: Callable[..., Any], latents: Path, prompts: Path) -> None:
    result = cli("verify-data", str(latents), str(prompts))
    assert result.code == 0, result.err
    assert "6 of 6 files are as they were written" in result.out  # 2 + 1 of latents, 2 + 1 of prompts
    assert "2 of 2 files" in cli("verify-data", str(latents / "training")).out


def test_one_bit_is_found(cli: Callable[..., Any], latents: Path, prompts: Path) -> None:
    changed = [latents / "training" / "frames-0001.safetensors", prompts / NEGATIVE]
    for path in changed:
        flip_last_byte(path)
    result = cli("verify-data", str(latents), str(prompts))
    assert result.code == 1
    assert all(f"{path}: its content is not what was written" in result.out for path in changed)
    assert "4 of 6 files" in result.out


def test_a_lost_shard_is_named(cli: Callable[..., Any], prompts: Path) -> None:
    (prompts / "shard-1.safetensors").unlink()
    result = cli("verify-data", str(prompts))
    assert result.code == 1
    assert "shard-1.safetensors: [Errno 2]" in result.out


def test_what_is_no_prepared_data(cli: Callable[..., Any], tmp_path: Path, latents: Path) -> None:
    result = cli("verify-data", str(tmp_path / "release"))
    assert result.code == 2
    assert "holds neither encoded prompts nor converted latents: there is no index.json" in result.err
    (latents / "validation" / "index.json").write_text("[1]")
    result = cli("verify-data", str(latents))
    assert result.code == 2
    assert "is not an index of encoded prompts" in result.err
