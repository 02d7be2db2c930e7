"""Feed every parser with spoilt inputs: python tests/fuzz/fuzz.py --seconds 600 [PARSER ...].

An input must be read or refused with an error that the parser may raise, within ten seconds and two GiB. Uses atheris
(guided by coverage) where it is installed and ``--engine atheris`` asks for it, else mutations of good inputs. An input
that breaks a parser is written to ``tests/fuzz/corpus/PARSER/`` where `test_fuzz.py` tries it again for ever.
"""

import argparse
import contextlib
import hashlib
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import FrameType

CORPUS = Path(__file__).with_name("corpus")
TOKENS = [
    *(
        b"\x00",
        b"\xff" * 4,
        b"\xff" * 8,
        b"\x7f" + b"\xff" * 3,
        b"[" * 3000,
        b'{"a":' * 2000,
        b"-",
        b"1e999",
        b"NaN",
        b"\\u0000",
    ),
    *(
        b"9" * 5000,
        b"../",
        b"/",
        b"\xed\xa0\x80",
        b"true",
        b"null",
        b'""',
        b"'",
        b"=",
        b"\n",
        b".",
        b"0x",
        b"[[",
        b"]]",
    ),
]


def mutate(draw: random.Random, seeds: list[bytes]) -> bytes:
    """A good input spoilt in one to six places."""
    content = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 6)):
        place, length = draw.randint(0, len(content)), draw.choice([1, 1, 1, 2, 4, 8, 64])
        kind = draw.randrange(6)
        if kind == 0 and content:
            content[place % len(content)] ^= 1 << draw.randrange(8)
        elif kind == 1 and content:
            content[place % len(content)] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = draw.choice(TOKENS)
        elif kind == 4:
            other = draw.choice(seeds)
            start = draw.randint(0, len(other))
            content[place : place + length] = other[start : start + length]
        else:
            content[place : place + length] = draw.randbytes(length)
    return bytes(content)


class TooLong(BaseException):
    """An input kept its parser busy."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong


def check(name: str, content: bytes) -> None:
    """Parse; anything but a value or an allowed error comes through."""
    from parsers import PARSERS

    parser = PARSERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(*parser.errors):
            parser.parse(content)


def keep(name: str, content: bytes) -> Path:
    """Add an input to the corpus."""
    path = CORPUS / name / hashlib.sha256(content).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def fuzz(name: str, seconds: float, seed: int, most: int | None = None) -> int:
    """Try mutations for ``seconds`` (or ``most`` of them); how many. What broke is kept."""
    from parsers import PARSERS

    draw, seeds = random.Random(f"{name}{seed}"), PARSERS[name].seeds()
    for content in seeds:
        check(name, content)
    deadline, tried = time.monotonic() + seconds, 0
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        while time.monotonic() < deadline and (most is None or tried < most):
            content = mutate(draw, seeds)
            signal.alarm(10)
            try:
                check(name, content)
            except BaseException:
                print(f"{name}: kept {keep(name, content)}", file=sys.stderr)
                raise
            finally:
                signal.alarm(0)
            tried += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    return tried


def fuzz_with_atheris(name: str, seconds: int) -> None:
    """The same guided by coverage; never returns."""
    import atheris

    with atheris.instrument_imports(include=["mfd_fast", "pickletools", "zipfile", "tomllib", "tarfile"]):
        from parsers import PARSERS
    started = CORPUS.parent / ".atheris" / name
    started.mkdir(parents=True, exist_ok=True)
    for index, content in enumerate(PARSERS[name].seeds()):
        (started / f"seed-{index}").write_bytes(content)
    (CORPUS / name).mkdir(parents=True, exist_ok=True)  # where what breaks the parser is put
    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=3000", f"-artifact_prefix={CORPUS / name}/"]
    atheris.Setup(
        [sys.argv[0], *limits, "-verbosity=0", "-print_final_stats=1", str(started)],
        lambda content: check(name, content),
    )
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PARSER")
    parser.add_argument("--seconds", type=float, default=600.0, help="for each parser (default 600)")
    parser.add_argument("--seed", type=int, default=int(time.monotonic()), help="of the mutations")
    parser.add_argument("--engine", choices=("mutations", "atheris"), default="mutations")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.engine == "atheris" and len(options.names) == 1:
        fuzz_with_atheris(options.names[0], int(options.seconds))
    from parsers import PARSERS

    unknown = [name for name in options.names if name not in PARSERS]
    if unknown:
        parser.error(f"unknown parser {unknown[0]}; known: {', '.join(PARSERS)}")
    # Beyond what torch's libraries have mapped already, two GiB.
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    broken: list[str] = []
    for name in options.names or PARSERS:
        if options.engine == "atheris":
            command = [sys.executable, __file__, name, "--seconds", str(options.seconds), "--engine", "atheris"]
            broken += [name] * (subprocess.run(command, check=False).returncode != 0)
            continue
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (2 << 30), resource.RLIM_INFINITY))
        try:
            tried = fuzz(name, options.seconds, options.seed)
        except (Exception, TooLong) as error:
            broken.append(name)
            print(f"{name}: broken by {error!r:.300}", flush=True)
        else:
            print(f"{name}: {tried} inputs in {options.seconds:.0f} s, seed {options.seed}", flush=True)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
