"""`mfd-fast encode-prompts`: a prompt file as embeddings, once, so that training needs no text encoder."""

import argparse
import shlex
from pathlib import Path

SHOWN = 5
"""Broken lines that are printed."""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    encode = commands.add_parser("encode-prompts", help="embeddings of a prompt file, once, for training")
    encode.add_argument("file", metavar="FILE", type=Path, help="prompts, one a line: .tsv, .jsonl or .txt")
    encode.add_argument("out", metavar="FOLDER", type=Path, help="where the embeddings go; started again, it goes on")
    encode.add_argument("--pipeline", metavar="PATH", required=True, help="diffusers pipeline: a folder or a hub id")
    encode.add_argument("--download", action="store_true", help="fetch a pipeline that is not on this disk")
    encode.add_argument(
        "--instruction",
        metavar="TEXT",
        default="none",
        help="put before every prompt: none (default, as the released training), pipeline (as SanaPipeline) or a text",
    )
    encode.add_argument("--max-tokens", type=int, default=300, help="longest prompt in tokens (default 300)")
    encode.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the embeddings")
    encode.add_argument("--batch-size", type=int, default=16, help="prompts per call (default 16)")
    encode.add_argument("--shard-rows", type=int, default=1024, help="prompts per file (default 1024)")
    encode.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    encode.set_defaults(run_command=run_encode)


def run_encode(options: argparse.Namespace) -> int:
    """Encode a prompt file."""
    import torch
    from tqdm import tqdm

    from mfd_fast.data.prompt_file import read_prompts
    from mfd_fast.data.prompts import ENCODER_PARTS, PromptEncoder, encode_prompts, latent_shape
    from mfd_fast.pipelines import find_pipeline
    from mfd_fast.training.context import choose_device

    if options.batch_size < 1 or options.shard_rows < 1:
        raise ValueError(
            f"--batch-size and --shard-rows must be at least 1, got {options.batch_size}, {options.shard_rows}"
        )
    found = read_prompts(options.file)
    print(f"{len(found.prompts)} prompts in {options.file}, {len(found.broken)} broken lines", flush=True)
    for line, reason in found.broken[:SHOWN]:
        print(f"  line {line}: {reason}")
    if len(found.broken) > SHOWN:
        print(f"  and {len(found.broken) - SHOWN} more")
    folder = find_pipeline(options.pipeline, (*ENCODER_PARTS, "transformer/config.json"), download=options.download)
    encoder = PromptEncoder(
        folder,
        dtype=getattr(torch, options.precision),
        device=choose_device(options.device, "--device"),
        instruction=options.instruction,
        max_tokens=options.max_tokens,
    )
    with tqdm(total=len(found.prompts), desc="prompts", disable=None) as bar:
        index = encode_prompts(
            options.file,
            found,
            encoder,
            options.out,
            sample_shape=latent_shape(folder),
            batch_size=options.batch_size,
            shard_rows=options.shard_rows,
            progress=lambda rows: bar.update(rows) and None,
        )
    words = ["--preset", "sana-1600m", "--pipeline", options.pipeline, "--set", f"data.root={options.out}"]
    print(
        f"{index.prompts} prompts in {options.out}, the longest of {index.longest} tokens; "
        f"next: mfd-fast distill {shlex.join(words)}"
    )
    return 0
