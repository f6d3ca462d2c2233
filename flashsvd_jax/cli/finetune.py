"""Train the factors of a compressed model on a text, to win back what compression lost; the layout stays as it is."""

import argparse
from pathlib import Path

from flashsvd_jax.cli.options import read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("model", help="folder that `flashsvd compress` or `convert` wrote, or the hub id of one")
    add("destination", help="folder to write; must not exist")
    add("--text", type=Path, required=True, metavar="FILE", help="what to train on, in UTF-8")
    add("--steps", type=int, default=1000, metavar="N", help="of the optimizer")
    add("--batch", type=int, default=8, metavar="N", help="windows of the text a step")
    add("--length", type=int, default=512, metavar="N", help="tokens of a window")
    add("--lr", type=float, default=1e-4, metavar="X", help="highest learning rate; falls as a cosine to 0")
    add("--lora", type=int, metavar="RANK", help="train adapters of this rank on the factors, and add them in the end")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="compute in this")
    add("--seed", type=int, default=0, metavar="N", help="orders the windows, and draws adapters")
    add("--save-every", type=int, default=100, metavar="N", help="with --resume: steps from one kept state to the next")
    add("--resume", action="store_true", help="keep the state now and then, and go on from that of an interrupted call")
    add("--quiet", action="store_true", help="no progress bar and no losses")


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    from flashsvd_jax.finetune import Settings, finetune
    from flashsvd_jax.hub import resolve_model

    names = ("steps", "batch", "length", "lr", "lora", "dtype", "seed", "save_every")
    settings = Settings(**{name: getattr(parsed, name) for name in names})
    losses = finetune(
        resolve_model(parsed.model), parsed.destination, read_text(parsed.text), settings, text_name=parsed.text.name,
        resume=parsed.resume, progress=not parsed.quiet,
    )  # fmt: skip
    if not parsed.quiet:
        print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
