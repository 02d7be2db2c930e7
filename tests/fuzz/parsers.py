"""Every parser of what comes from outside: good inputs to start from, and the errors that a bad one may raise."""

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from inputs import Parser, folder, in_file
from safetensors.torch import save
from weights_inputs import WEIGHTS_PARSERS

from mfd_fast.config import Settings
from mfd_fast.data.cifar10 import cifar10
from mfd_fast.data.pickled_batch import read_pickled_batch
from mfd_fast.data.prompt_file import read_prompts
from mfd_fast.experiments.base import Work
from mfd_fast.experiments.no_auxiliary import NO_AUXILIARY
from mfd_fast.experiments.running import _cell, finding_of
from mfd_fast.finished import load_student
from mfd_fast.models import build_model, describe_model
from mfd_fast.npz import read_arrays
from mfd_fast.pipelines import read_schedule
from mfd_fast.report.grid import load_picture
from mfd_fast.report.record import read_run
from mfd_fast.run_folder import RunFolder, network_from_description
from mfd_fast.settings_io import from_toml, load_settings, to_toml
from mfd_fast.storage import read_json, read_tensors
from mfd_fast.training.checkpoint import load_checkpoint, save_checkpoint
from mfd_fast.training.monitor import cut_log
from mfd_fast.training.scores import SCORES, Score, best_names, write_score


def toml(content: bytes) -> object:
    return from_toml(content.decode("utf-8"))


def override(content: bytes) -> object:
    return load_settings("mixture-2d", overrides=content.decode("utf-8").split("\x00"))


@cache
def good_checkpoint() -> Path:
    place = folder() / "checkpoints"
    return save_checkpoint(place, 1, {"student": {"a": torch.ones(2)}}, {"done": 1}, 1)


def checkpoint_part(name: str) -> Callable[[bytes], object]:
    def call(content: bytes) -> object:
        path = good_checkpoint()
        kept = (path / name).read_bytes()
        (path / name).write_bytes(content)
        try:
            return load_checkpoint(path)
        finally:
            (path / name).write_bytes(kept)

    return call


BINARY_ROW = bytes([3]) + bytes(range(256)) * 12


def cifar_binary(content: bytes) -> object:
    place = folder() / "cifar"
    if not place.exists():
        place.mkdir()
        for name in (*(f"data_batch_{index}.bin" for index in range(2, 6)), "test_batch.bin"):
            (place / name).write_bytes(BINARY_ROW)
    (place / "data_batch_1.bin").write_bytes(content)
    return cifar10(place)


def archives() -> list[bytes]:
    files = {f"data_batch_{index}.bin": BINARY_ROW for index in range(1, 6)} | {"test_batch.bin": BINARY_ROW}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return [buffer.getvalue()]


def archive(content: bytes) -> object:
    path = folder() / "cifar.tar.gz"
    path.write_bytes(gzip.compress(content, compresslevel=0))
    return cifar10(path)


def pickles() -> list[bytes]:
    batch = {b"data": np.arange(24, dtype=np.uint8).reshape(2, 12), b"labels": [1, 2], b"filenames": [b"a", b"b"]}
    return [pickle.dumps(batch, protocol=protocol) for protocol in (0, 1, 2, 4)]


def npz_files() -> list[bytes]:
    files = []
    for write in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        write(buffer, x=np.ones((2, 3), dtype=np.float32), condition=np.arange(2))
        files.append(buffer.getvalue())
    return files


def tensor_files() -> list[bytes]:
    return [
        save({"a": torch.ones(2, 3), "b": torch.tensor(3), "c": torch.zeros(0), "d": torch.ones(2).bfloat16()}),
        save({}),
        b"\x40\x00\x00\x00\x00\x00\x00\x00"
        + json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).ljust(64).encode()
        + b"\x00",
    ]


DESCRIPTIONS = [
    {"model": "mlp", "sample_shape": [2], "num_classes": 3, "options": {"width": 8, "depth": 1}},
    {"class": "mine:Network"},
    {"factory": "torch.nn:Identity"},
]


def description(content: bytes) -> object:
    path = folder() / "teacher.json"
    path.write_bytes(content)
    value = read_json(path)
    return network_from_description(value, {}) if "factory" not in value else None


@cache
def finished_run() -> Path:
    """A run folder with networks and a checkpoint that has a score."""
    run = RunFolder(folder() / "finished")
    network = build_model("mlp", (2,), 3, width=8, depth=1)
    described = describe_model(network)
    student = {"network": described, "roles": "full", "lora": None, "steps": 1, "shift": 1.0, "sampler": "euler"}
    student |= {"gamma": 0.0, "second_time": False, "precision": "float32", "sample_shape": [2]}
    student |= {"label_counts": [1, 2, 3], "value_range": None, "condition_names": []}
    run.write_network("teacher", dict(network.state_dict()), described)
    run.write_network("student", dict(network.state_dict()), student)
    path = save_checkpoint(run.distill_checkpoints(), 1, {"student": {"a": torch.ones(2)}}, {"done": 1}, 1)
    write_score(path, Score(0.5, "distance of points, 60 samples, seed 0"))
    return run.path


def student(content: bytes) -> object:
    path = finished_run() / "student.json"
    kept = path.read_bytes()
    path.write_bytes(content)
    try:
        return load_student(finished_run()).sample(2)
    finally:
        path.write_bytes(kept)


def scores(content: bytes) -> object:
    place = RunFolder(finished_run()).distill_checkpoints()
    (place / SCORES).write_bytes(content)
    return best_names(place)


def scores_seed() -> list[bytes]:
    return [(RunFolder(finished_run()).distill_checkpoints() / SCORES).read_bytes()]


RECORDS = {
    "metrics.json": {"teacher": {"1": 2.0}, "student": {"1": 1.0}, "seconds": {"a": 1.0}, "recall": {"student": 0.5}},
    "student.json": {"network": {"model": "mlp"}, "steps": 1, "value_range": [-1, 1]},
    "log.jsonl": {"update": 3, "role": "student", "loss": 0.5, "velocity_gap_bins": [1.0, None]},
}


def record(content: bytes) -> object:
    place = folder() / "run"
    place.mkdir(exist_ok=True)
    for name in RECORDS:
        (place / name).write_bytes(content)
    return read_run(place)


def pictures() -> list[bytes]:
    from mfd_fast.report.grid import encode

    return [encode(np.zeros((4, 5, channels), dtype=np.uint8), kind) for channels in (1, 3) for kind in ("PNG", "JPEG")]


PROMPTS = b'image\tprompt\n1.jpg\ta cat\t5.0\tx\n{"prompt": "a cat"}\n'


def prompt_file(content: bytes) -> object:
    ending, _, rest = content.partition(b"\x00")
    return in_file(f"a.{ending.decode()}" if ending in (b"tsv", b"jsonl", b"txt") else "a.tsv", read_prompts)(rest)


SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_flow_sigmas": True}


def scheduler(content: bytes) -> object:
    place = folder() / "pipeline" / "scheduler"
    place.mkdir(parents=True, exist_ok=True)
    (place / "scheduler_config.json").write_bytes(content)
    return read_schedule(place.parent)


IDENTITY = {"experiment": "no-auxiliary", "versions": {"mfd_fast": "1"}}
CELLS = ("with", "without")


@cache
def experiment_cells() -> list[bytes]:
    """What the cells of an experiment keep."""
    settings, place = replace(NO_AUXILIARY.quick, updates=20), folder() / "experiment"
    for cell in CELLS:
        _cell(NO_AUXILIARY, settings, cell, Work(0, place, {}), IDENTITY)
    return [(place / f"{cell}.json").read_bytes() for cell in CELLS]


def experiment(content: bytes) -> object:
    """The finding of an experiment of which one cell was spoilt."""
    good, place = experiment_cells(), folder() / "experiment"
    results = {}
    for cell, kept in zip(CELLS, (good[0], content), strict=True):
        (place / f"{cell}.json").write_bytes(kept)
        results[cell] = [_cell(NO_AUXILIARY, NO_AUXILIARY.quick, cell, Work(0, place, {}), IDENTITY)["result"]]
    return finding_of(NO_AUXILIARY, results, place)


PARSERS = {
    "toml": Parser(toml, lambda: [to_toml(Settings()).encode(), b'preset = "demo"\n[teacher]\nupdates = 3\n']),
    "override": Parser(override, lambda: [b"teacher.updates=3", b"model.options.width=[1, 2]\x00run.device=cpu"]),
    "manifest": Parser(checkpoint_part("manifest.json"), lambda: [(good_checkpoint() / "manifest.json").read_bytes()]),
    "state": Parser(in_file("state.json", read_json), lambda: [b'{"done": 1, "deep": [[1.5, null], "text"]}']),
    "log": Parser(
        in_file("log.jsonl", lambda path: cut_log(path, 3)), lambda: [b'{"update": 3}\n{"update": 4}\n{"upd']
    ),
    "safetensors": Parser(in_file("a.safetensors", read_tensors), tensor_files),
    "npz": Parser(in_file("a.npz", lambda path: read_arrays(path, 1 << 24)), npz_files),
    "cifar-binary": Parser(cifar_binary, lambda: [BINARY_ROW * 2]),
    "cifar-pickle": Parser(lambda content: read_pickled_batch(content, 12), pickles),
    "cifar-archive": Parser(archive, archives, (ValueError, FileNotFoundError)),
    "description": Parser(
        description, lambda: [json.dumps(one).encode() for one in DESCRIPTIONS], (ValueError, TypeError)
    ),
    "student": Parser(student, lambda: [(finished_run() / "student.json").read_bytes()], (ValueError, TypeError)),
    "scores": Parser(scores, cache(scores_seed)),
    "record": Parser(record, lambda: [json.dumps(one).encode() for one in RECORDS.values()]),
    "prompts": Parser(prompt_file, lambda: [kind + b"\x00" + PROMPTS for kind in (b"tsv", b"jsonl", b"txt")]),
    "picture": Parser(in_file("a.png", load_picture), pictures, (ValueError, OSError, SyntaxError)),
    "scheduler": Parser(scheduler, lambda: [json.dumps(SCHEDULER).encode()]),
    "experiment": Parser(experiment, experiment_cells),
    **WEIGHTS_PARSERS,
}
