from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mfd_fast.models import build_model, describe_model
from mfd_fast.run_folder import RunFolder, build_from_settings, network_from_description, versions, with_weights
from mfd_fast.settings_io import load_settings
from mfd_fast.storage import write_json


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def small(num_classes: int | None = 3) -> Any:
    model = build_model("mlp", (2,), num_classes, width=8, depth=1)
    return model


def test_settings_and_versions_are_kept(run: RunFolder) -> None:
    settings = load_settings("mixture-2d", overrides=["run.seed=4"])
    run.write_settings(settings)
    assert run.read_settings() == settings
    assert {path.name for path in run.path.iterdir()} == {"installed.json", "settings.toml", "versions.json"}


def test_versions_name_what_numbers_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions()
    assert {"python", "torch", "numpy", "safetensors"} <= found.keys()
    monkeypatch.setattr("mfd_fast.run_folder.RECORDED_PACKAGES", ("torch", "a-package-nobody-has"))
    assert versions().keys() == {"python", "torch"}


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_settings_is_no_run(run: RunFolder, exists: bool) -> None:
    if exists:
        run.path.mkdir()
    words = r"run is not a run folder: it has no settings\.toml" if exists else r"there is no run folder \S*run$"
    with pytest.raises(FileNotFoundError, match=words):
        run.read_settings()


def test_a_network_is_there_when_both_files_are(run: RunFolder) -> None:
    assert not run.has_network("teacher")
    with pytest.raises(FileNotFoundError, match=r"there is no run folder \S*run$"):
        run.read_teacher()
    run.path.mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no teacher yet \(teacher\.json and teacher\.safetensors\)"):
        run.read_teacher()
    model = small()
    run.write_network("teacher", dict(model.state_dict()), describe_model(model))
    assert run.has_network("teacher")
    assert not run.has_network("student")
    (run.path / "teacher.json").unlink()
    assert not run.has_network("teacher")


def test_the_description_is_written_last(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says that a network is finished must not be there before the weights."""

    def fail(path: Path, tensors: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mfd_fast.run_folder.write_tensors", fail)
    with pytest.raises(OSError, match="No space left"):
        run.write_network("teacher", {}, {})
    assert not (run.path / "teacher.json").exists()


def test_a_teacher_is_read_back_ready_for_use(run: RunFolder) -> None:
    model = small()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    run.write_network("teacher", dict(model.state_dict()), describe_model(model))
    read = run.read_teacher()
    x, t = torch.randn(4, 2), torch.rand(4)
    assert torch.equal(read(x, t), model(x, t))
    assert not read.training
    assert not any(parameter.requires_grad for parameter in read.parameters())


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)the weights do not fit the network: .*size mismatch"):
        network_from_description(describe_model(small(3)), dict(small(4).state_dict()))
    with pytest.raises(ValueError, match="Missing key"):
        with_weights(nn.Linear(2, 2), {})


def test_only_its_code_builds_a_users_class() -> None:
    with pytest.raises(ValueError, match="only your code can build this run's somewhere:Net"):
        network_from_description({"class": "somewhere:Net"}, {}, trust_code=True)


def test_a_factory_is_called_where_it_is_trusted() -> None:
    factory = {"factory": "torch.nn:Identity"}
    assert isinstance(network_from_description(factory, {}, trust_code=True), nn.Identity)
    with pytest.raises(
        ValueError, match=r"made by 'torch\.nn:Identity'.* pass --trust-code \(in Python trust_code=True"
    ):
        network_from_description(factory, {})
    with pytest.raises(ValueError, match="there is no module 'nowhere'"):
        network_from_description({"factory": "nowhere:make"}, {}, trust_code=True)
    with pytest.raises(ValueError, match=r"factory must be a text package\.module:name, got list"):
        network_from_description({"factory": []}, {}, trust_code=True)


HUGE = {
    "width": {"options": {"width": 10**12}},
    "depth": {"options": {"depth": 10**12}},
    "beyond 64 bits": {"options": {"width": 10**19}},
    "shape": {"sample_shape": [10**6, 10**6]},
    "classes": {"num_classes": 10**13},
}


@pytest.mark.parametrize("part", HUGE)
def test_a_network_far_larger_than_its_weights_is_refused_before_it_is_made(part: str) -> None:
    model = small()
    description = describe_model(model) | {"options": {}} | HUGE[part]
    with pytest.raises(
        ValueError, match=r"needs more than \d+ numbers, its weights have fewer|cannot be built as described"
    ):
        network_from_description(description, dict(model.state_dict()))


def test_a_damaged_description_is_refused(run: RunFolder) -> None:
    model = small()
    run.write_network("teacher", dict(model.state_dict()), describe_model(model))
    write_json(run.path / "teacher.json", {"model": "mlp"})
    with pytest.raises(ValueError, match="the description of a model lacks sample_shape, num_classes, options"):
        run.read_teacher()
    (run.path / "teacher.json").write_text("{")
    with pytest.raises(ValueError, match=r"teacher\.json is not valid JSON"):
        run.read_teacher()


def test_a_network_as_the_settings_want_it() -> None:
    settings = load_settings("demo", overrides=["model.options.width=12", "model.options.depth=2"])
    model = build_from_settings(settings, (1, 8, 8), 10)
    assert (model.options["width"], model.options["depth"]) == (12, 2)
    assert (model.sample_shape, model.num_classes) == ((1, 8, 8), 10)
