"""Entry point: parses, runs one command, turns expected errors into one line and an exit code."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress

from mfd_fast import __version__
from mfd_fast.cli import bench, checkpoints, estimate, export, look, occupancy, prompts, reproduce, runs, verify
from mfd_fast.cli.examples import EXAMPLES
from mfd_fast.config import did_you_mean
from mfd_fast.training.distributed import is_first_process, leave_world
from mfd_fast.training.interrupts import Interrupted, raise_on_preemption

EXIT_WRONG_INPUT = 2
EXIT_FAILED = 1
LONGEST_PART = 2000
"""Characters that are shown of either end of a long message."""


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="mfd-fast",
        description="Distil flow-matching models into one-step and few-step generators.",
        epilog="Begin with `mfd-fast demo`; `mfd-fast COMMAND --help` has options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"mfd_fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    runs.add_commands(commands)
    look.add_commands(commands)
    bench.add_command(commands)
    checkpoints.add_commands(commands)
    occupancy.add_commands(commands)
    export.add_commands(commands)
    prompts.add_commands(commands)
    verify.add_command(commands)
    estimate.add_commands(commands)
    reproduce.add_command(commands)
    for words in commands._choices_actions:
        command = commands.choices[words.dest]
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.description = f"{str(words.help)[:1].upper()}{str(words.help)[1:]}."
        command.epilog = "\n  ".join(["examples:", *EXAMPLES[words.dest]])
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command; what does not exist ends the process with exit code 2 and the nearest name."""
    parser = build_parser()
    commands = _commands(parser)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        hint = did_you_mean(arguments[0], tuple(commands))
        parser.error(f"there is no command {arguments[0]!r}{hint}; all: mfd-fast --help")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        command, word = commands[options.command], unknown[0]
        inner = _commands(command).get(getattr(options, "action", ""), command)
        names = tuple(name for part in (command, inner) for action in part._actions for name in action.option_strings)
        hint = did_you_mean(word.partition("=")[0], names) if word.startswith("-") else ""
        inner.error(f"unknown argument {word!r}{hint}; all: {inner.prog} --help")
    return options


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands that a parser has, by name."""
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mfd-fast`` with ``arguments`` (default: the process's); returns the exit code.

    0: done; 1: the work failed; 2: wrong input; 75: stopped by SIGTERM, SIGUSR1, SIGHUP, the time limit, or as nobody
    reads its output, to be started again with ``--resume auto``; 130: stopped by Ctrl-C.
    """
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        with raise_on_preemption() if hasattr(options, "resume") else nullcontext():
            code: int = options.run_command(options)
    except Interrupted as stop:
        if is_first_process():
            with suppress(OSError):  # the terminal may be what has gone
                print(f"\n{stop}\n{_how_to_go_on(options)} goes on from there.", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("\nmfd-fast: stopped", file=sys.stderr)
        return 130
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError, ModuleNotFoundError) as error:
        print(f"mfd-fast {options.command}: {_one_line(error)}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except (OSError, RuntimeError, FloatingPointError) as error:
        print(f"mfd-fast {options.command} failed: {_one_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        leave_world()
    return code


def _how_to_go_on(options: argparse.Namespace) -> str:
    """Which command continues one that was stopped; the demo, also by make, goes on by itself."""
    resume = [] if options.command == "demo" else ["with --resume auto"]
    fresh = ["in place of --fresh" if resume else "without --fresh"] if getattr(options, "fresh", False) else []
    return " ".join(["The same command", *resume, *fresh])


def _one_line(error: Exception) -> str:
    """The message without line breaks; of one that is a whole log, as a compiler's, its beginning and its end."""
    words = " ".join(str(error).split()) or type(error).__name__
    left_out = len(words) - 2 * LONGEST_PART
    return words if left_out <= 0 else f"{words[:LONGEST_PART]} [... {left_out} characters ...] {words[-LONGEST_PART:]}"
