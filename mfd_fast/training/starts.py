"""Low-rank roles that begin from adapters on disk: of the released script's checkpoints, of diffusers, or of `export`.

Only a start reads them. A resumed run has its adapters in its checkpoint, and needs the files no more.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfd_fast.config import DistillSettings
from mfd_fast.models.diffusers_lora import load_lora, lora_file, read_lora
from mfd_fast.models.lora import LoRARoles
from mfd_fast.storage import sha256, write_json
from mfd_fast.training.roles import Roles, UnlikeRoles

FILE_NAME = "adapters.json"
"""In a run's folder: which adapters its roles began from."""


def given_adapters(settings: DistillSettings) -> dict[str, Path]:
    """The file of each role that begins from one."""
    paths = {"student": settings.student_lora, "auxiliary": settings.auxiliary_lora}
    return {role: lora_file(path) for role, path in paths.items() if path is not None}


def check_adapters(settings: DistillSettings) -> None:
    """Raise unless the adapters that the settings name can be read and have the rank of the settings.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: it is damaged, no LoRA of a transformer, or of another rank; the message names the setting.
    """
    for role, file in given_adapters(settings).items():
        try:
            state, _ = read_lora(file)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"distill.{role}_lora: {error}") from error
        ranks = sorted({len(value) for name, value in state.items() if name.endswith(".lora_A")})
        if ranks != [settings.lora_rank]:
            raise ValueError(
                f"distill.{role}_lora: {file} has rank {', '.join(map(str, ranks))}, but distill.lora_rank is "
                f"{settings.lora_rank}: set it to that of the adapter"
            )


def begin_from_adapters(roles: Roles, settings: DistillSettings) -> dict[str, Any]:
    """Give roles the weights of the adapters that the settings name; returns what was read, for JSON.

    Raises:
        FileNotFoundError, ValueError: as `check_adapters`; or a role has no adapter, or other layers than the file.
    """
    check_adapters(settings)
    read: dict[str, Any] = {}
    for role, file in given_adapters(settings).items():
        part = roles.parts[role] if isinstance(roles, UnlikeRoles) and role in roles.parts else roles
        if not isinstance(part, LoRARoles) or role not in part.roles:
            raise ValueError(f"distill.{role}_lora is an adapter, but the {role} of this run is no low-rank role")
        try:
            load_lora(file, part, role)
        except ValueError as error:
            raise ValueError(
                f"distill.{role}_lora: {error}; set distill.lora_targets to the layers of the adapter"
            ) from error
        read[role] = {"file": str(file), "sha256": sha256(file), "rank": part.rank, "layers": len(part.layers)}
    return read


def note_start(folder: Path, read: Mapping[str, Any]) -> None:
    """Say which roles begin from what, and keep it in ``adapters.json`` of a run's folder."""
    write_json(folder / FILE_NAME, dict(read))
    for role, start in read.items():
        print(f"distillation: the {role} begins from {start['file']} ({start['layers']} layers)", flush=True)
    if read.keys() == {"student"}:
        print(
            "distillation: the auxiliary begins as the teacher and has to learn this student first; "
            "distill.auxiliary_lora goes on with one",
            flush=True,
        )
