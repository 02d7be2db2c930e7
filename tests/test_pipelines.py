"""Pipelines on disk: found without a network, read in parts, told apart by their weights."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mfd_fast.pipelines import (
    FlowSchedule,
    check_schedule,
    find_pipeline,
    read_schedule,
    stored_variant,
    weights_digest,
)


def scheduler(folder: Path, **config: object) -> Path:
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert find_pipeline(tmp_path, ["transformer"]) == tmp_path


@pytest.mark.parametrize("pipeline", ["nowhere", "/no/where", "../where", "a/b/c"])
def test_what_is_no_id_is_not_looked_for(pipeline: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is neither a folder nor a pipeline in the hub's cache$"):
        find_pipeline(pipeline, ["transformer"])


def test_an_id_is_looked_for_in_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot(name: str, **options: object) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert find_pipeline("owner/name", ["transformer", "transformer/config.json"]) == tmp_path
    patterns = ["model_index.json", "transformer/*", "transformer/config.json"]
    assert asked == [("owner/name", {"allow_patterns": patterns, "local_files_only": True})]
    find_pipeline("owner/name", [], download=True)
    assert asked[1][1]["local_files_only"] is False


def test_the_scheduler(tmp_path: Path) -> None:
    assert read_schedule(tmp_path) is None
    assert check_schedule(tmp_path, "euler", 1.0) is None
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    scheduler(tmp_path, _class_name="DPMSolverMultistepScheduler", **flow)
    assert read_schedule(tmp_path) == FlowSchedule("dpm++", 3.0)
    assert check_schedule(tmp_path, "dpm++", 3.0) is None
    assert "(dpm++, shift 3)" in str(check_schedule(tmp_path, "euler", 1.0))
    scheduler(tmp_path, _class_name="FlowMatchEulerDiscreteScheduler", shift=2)
    assert read_schedule(tmp_path) == FlowSchedule("euler", 2.0)
    scheduler(tmp_path, _class_name="DDIMScheduler")
    assert read_schedule(tmp_path) == FlowSchedule(None, 1.0)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("[]")
    with pytest.raises(ValueError, match="not the configuration of a scheduler"):
        read_schedule(tmp_path)


@pytest.mark.parametrize(
    ("files", "variant"),
    [
        (["diffusion_pytorch_model.safetensors"], None),
        (["diffusion_pytorch_model.bf16.safetensors"], "bf16"),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], "fp16"),
        (["model-00001-of-00002.safetensors", "model.bf16.safetensors"], None),
        (["model-00001-of-00002.fp16.safetensors", "model.safetensors.index.fp16.json"], "fp16"),
        (["model.bf16.safetensors", "model.safetensors.index.json"], "bf16"),
        (["model.bf16.safetensors", "model.fp16.safetensors"], None),
        ([], None),
    ],
)
def test_weights_of_a_variant_are_found(files: list[str], variant: str | None, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert stored_variant(tmp_path) == variant


@pytest.mark.parametrize("largest", ["10GB", "20KB"], ids=["whole", "shards"])
def test_weights_of_a_variant_are_loaded(make_sana: object, tmp_path: Path, largest: str) -> None:
    from mfd_fast.models.sana import load_transformer

    made = make_sana()  # type: ignore[operator]
    made.save_pretrained(tmp_path / "transformer", variant="bf16", max_shard_size=largest)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (largest == "20KB")
    assert weights_digest(load_transformer(tmp_path)) == weights_digest(made)


def test_a_digest_sees_every_value_name_and_type() -> None:
    module = nn.Linear(3, 2)
    first = weights_digest(module)
    same = nn.Linear(3, 2)
    same.load_state_dict(module.state_dict())
    assert weights_digest(same) == first
    with torch.no_grad():
        same.weight[1, 2] = torch.nextafter(same.weight[1, 2], torch.tensor(9.0))
    assert weights_digest(same) != first
    assert weights_digest(module.bfloat16()) != first
