"""Flags that the device computes and the host wants to know, but not so soon that it would have to wait for them."""

from collections.abc import Callable

import torch
from torch import Tensor

UNREAD = {"cpu": 1}
"""Flags that may stay unread, by device; on the CPU reading costs nothing."""
UNREAD_ELSEWHERE = 32


class UnreadFlags:
    """Flags of past updates in order; `add` reads all of them, with one wait, when they have become many."""

    def __init__(self) -> None:
        self._flags: list[Tensor] = []
        self._actions: list[Callable[[bool], None]] = []

    def add(self, flag: Tensor, action: Callable[[bool], None]) -> None:
        """Call ``action`` with the value of ``flag`` (a scalar) now or at one of the next calls, after earlier ones."""
        self._flags.append(flag)
        self._actions.append(action)
        if len(self._flags) >= UNREAD.get(flag.device.type, UNREAD_ELSEWHERE):
            self.read()

    def read(self) -> None:
        """Call all actions that are due; what one of them raises leaves the later ones out."""
        if not self._flags:
            return
        values, actions = torch.stack(self._flags).tolist(), self._actions
        self._flags, self._actions = [], []
        for value, action in zip(values, actions, strict=True):
            action(bool(value))
