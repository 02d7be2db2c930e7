"""Files and folders written whole or not at all, through a temporary name and a rename: JSON, text, safetensors."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONGEST_NAME = 255
"""Bytes in the name of a file, on every file system in use."""
UNFINISHED = ".mfd-fast-unfinished"
"""How the names of folders begin that are being made or deleted; host and process follow."""


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it and move it there; a failure leaves no trace."""
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        sync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents; each new name has reached the disk when this returns."""
    new = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for part in new:
        sync(part.parent)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which is called ``target`` when the context is left; after an error there is none.

    Raises:
        ValueError: ``target`` exists.
    """
    if target.exists():
        raise ValueError(f"{target} exists already; choose another folder or delete it")
    make_folder(target.parent)
    with _unfinished_folder(target.parent) as aside:
        folder = aside / target.name
        folder.mkdir()
        yield folder
        folder.rename(target)
    sync(target.parent)


def delete_folder(path: Path) -> None:
    """Delete a folder that other processes of this run may delete too; it is gone at once or untouched."""
    path = path.resolve()
    with _unfinished_folder(path.parent) as aside, suppress(FileNotFoundError):
        path.rename(aside / path.name)


@contextmanager
def _unfinished_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder in ``parent``, deleted at the end with all in it; so are those that killed processes left.

    Only processes of this host, in the same space of process numbers, can be known to be gone; others' stay.
    """
    here = f"{UNFINISHED}.{platform.node()}.{_process_space()}."
    for other in parent.glob(f"{here}*"):
        if not _is_alive(other.name.removeprefix(here).partition(".")[0]):
            shutil.rmtree(other, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{here}{os.getpid()}.", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _process_space() -> int:
    """Number of the namespace that process numbers are of: containers of one host have one each."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _is_alive(process: str) -> bool:
    """Whether a process has this number; also for what is no number, which is nobody's to delete."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_file(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented; NaN and infinity are refused with ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; ValueError names the file when it is not valid."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any layout, also several of one memory, as safetensors, and compare what came to lie there.

    Raises:
        OSError: the file could not be written, or what is read back is not what was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = _of_their_own(tensors)

    def write(temporary: Path) -> None:
        try:
            save_file(plain, temporary)
        except SafetensorError as error:  # it hides the error of the file system in its text
            raise OSError(f"{path} could not be written: {error}") from error
        sync(temporary)
        if not _same_content(read_tensors(temporary), plain):
            raise OSError(f"{path} could not be written: what is read back is not what was written")

    write_file(path, write)


def _of_their_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, each with memory of its own: as they are where they have that, else as copies."""
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        memory = value.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != value.nbytes:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        plain[name] = value
    return plain


def _same_content(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names, shapes, types and bytes."""
    return a.keys() == b.keys() and all(
        a[name].dtype == value.dtype
        and a[name].shape == value.shape
        and torch.equal(a[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
        for name, value in b.items()
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors to the CPU; ValueError names the file when it is damaged.

    The sizes in the header are compared with the size of the file before anything is allocated.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, KeyError, AttributeError, RuntimeError, ValueError) as error:
        # Beside its own error: a type that this torch does not have, a shape beyond 64 bits.
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error


def check_name(name: Any, what: str) -> str:
    """``name`` if it is that of a file or folder right in another one; ValueError if it leads anywhere else."""
    plain = isinstance(name, str) and not name.startswith(".") and not set(name) & set("/\\\0")
    if not plain or not 0 < len(os.fsencode(name)) <= LONGEST_NAME:
        raise ValueError(f"{what} must be a plain name, got {name!r:.80}")
    return str(name)


def check_count(value: Any, what: str) -> int:
    """``value`` if it is a whole number from 1 on that a file can hold that many of; else ValueError."""
    if type(value) is not int or not 1 <= value < 2**40:
        raise ValueError(f"{what} must be a whole number above 0, got {value!r:.80}")
    return value


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make sure that a file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def only_writer(folder: Path, *, enabled: bool = True) -> Iterator[None]:
    """Inside, no other process can be the writer of ``folder``; the system ends that with the process, however it ends.

    Where the file system knows no locks nothing is checked.

    Raises:
        RuntimeError: another process is.
    """
    if not enabled:
        yield
        return
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another process is at work in {folder}: wait for it or choose another folder"
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
