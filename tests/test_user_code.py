import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from mfd_fast.storage import write_tensors
from mfd_fast.user_code import call_factory, load_field, load_object, load_teacher

CODE = """
import torch
from torch import nn


def make():
    return nn.Linear(2, 2)


def needs(argument):
    return argument


def number():
    return 3


def field():
    return lambda x, t: x


class Holder:
    make = staticmethod(make)


value = 7
"""


@pytest.fixture(autouse=True)
def _user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "users_code.py").write_text(CODE)
    (tmp_path / "broken_code.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    # Programs installed by pip do not have the working directory in their path.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    yield
    for name in ("users_code", "broken_code"):
        sys.modules.pop(name, None)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"weight": torch.eye(2), "bias": torch.tensor([1.0, 2.0])})
    return path


def test_the_working_directory_is_searched() -> None:
    before = list(sys.path)
    assert isinstance(call_factory("users_code:make"), nn.Linear)
    assert load_object("users_code:value") == 7
    assert load_object("users_code:Holder.make")().in_features == 2
    assert sys.path == [os.getcwd(), *before], "and is entered once"


def test_a_teacher_gets_its_weights(weights: Path) -> None:
    teacher = load_teacher("users_code:make", weights)
    assert teacher(torch.ones(1, 2)).tolist() == [[2.0, 3.0]]
    assert isinstance(load_teacher("users_code:make", None), nn.Linear)


def test_a_field_may_be_any_callable(weights: Path) -> None:
    x = torch.ones(1, 2)
    assert load_field("users_code:field", None)(x, torch.ones(1)) is x
    assert load_field("users_code:make", weights)(x).tolist() == [[2.0, 3.0]]


WRONG: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no colon": (lambda _: load_object("users_code.make"), ValueError, "expected package.module:name, got"),
    "no module": (lambda _: load_object(":make"), ValueError, "expected package.module:name"),
    "no name": (lambda _: load_object("users_code:"), ValueError, "expected package.module:name"),
    "unknown module": (lambda _: load_object("nowhere:make"), ValueError, "there is no module 'nowhere'"),
    "module imports what is missing": (
        lambda _: load_object("broken_code:make"),
        ValueError,
        "'broken_code:make': there is no module 'a_package_nobody_has'",
    ),
    "unknown name": (lambda _: load_object("users_code:mkae"), ValueError, "module 'users_code' has no 'mkae'"),
    "no factory": (lambda _: call_factory("users_code:value"), TypeError, "must be callable, got int"),
    "factory with arguments": (lambda _: call_factory("users_code:needs"), TypeError, "users_code:needs' must need no"),
    "file as module": (
        lambda _: load_object("users_code.py:make"),
        ValueError,
        r"'users_code.py'; give users_code:make",
    ),
    "no module made": (lambda _: load_teacher("users_code:number", None), TypeError, "return an nn.Module, got int"),
    "no field made": (lambda _: load_field("users_code:number", None), TypeError, "must return a callable field"),
    "weights of a function": (
        lambda path: load_field("users_code:field", path),
        TypeError,
        "weights can only be loaded into an nn.Module",
    ),
    "no weights file": (
        lambda _: load_teacher("users_code:make", Path("none.safetensors")),
        FileNotFoundError,
        "weights must be a safetensors file, none.safetensors does not exist",
    ),
    "weights do not fit": (
        lambda path: load_teacher("torch.nn:Identity", path),
        ValueError,
        "weights.safetensors does not fit the module",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str, weights: Path) -> None:
    call, kind, words = WRONG[case]
    with pytest.raises(kind, match=words):
        call(weights)


def test_weights_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"PK\x03\x04 a pickle in a zip")
    with pytest.raises(ValueError, match=r"weights\.bin is not a valid safetensors file.*save_file"):
        load_teacher("users_code:make", tmp_path / "weights.bin")
