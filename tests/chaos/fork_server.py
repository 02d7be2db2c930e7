"""Starts runs of the command line at once: a process that has imported torch and forks a child for each of them.

Reads one JSON object a line, ``{"commands": [[argument, ...], ...], "output": path, "slow_sync": seconds}``, and
answers with the child's number and, when it has ended, with its status as `os.waitstatus_to_exitcode` gives it. The
child runs the commands one after the other until one fails. ``slow_sync`` is added to every fsync, so that saves take
long.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

MODULES = (
    *(
        "torch",
        "torch._dynamo",
        "safetensors.torch",
        "tqdm",
        "mfd_fast.cli.main",
        "mfd_fast.data.densities",
        "mfd_fast.distillation",
    ),
    *("mfd_fast.models.mlp", "mfd_fast.training.teacher", "mfd_fast.settings_io", "mfd_fast.methods.mfd"),
)


def slowed(sync: Callable[[int], None], seconds: float) -> Callable[[int], None]:
    def call(handle: int) -> None:
        time.sleep(seconds)
        sync(handle)

    return call


def run(task: dict[str, Any]) -> int:
    output = os.open(task["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if task.get("slow_sync"):
        os.fsync = slowed(os.fsync, task["slow_sync"])
    main = importlib.import_module("mfd_fast.cli.main").main
    for command in task["commands"]:
        code = int(main(command))
        if code:
            return code
    return 0


def serve() -> None:
    for name in MODULES:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = run(json.loads(line))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
