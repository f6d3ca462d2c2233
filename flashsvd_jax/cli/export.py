"""Write a converted model in a form that other tools read: LowRankArena's ABLinear, or SVD-LLM's keys; safetensors, config.json, tokenizer."""  # noqa: E501

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("folder", help="a converted model, or a hub id of one")
    parser.add_argument("destination", help="folder to write; must not exist")
    parser.add_argument("--format", choices=("lowrankarena", "svdllm"), required=True, help="names of the factors")
    parser.add_argument(
        "--copy-shared", action="store_true", help="write a factor that several projections share once for each of them"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no report")


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    import jax

    from flashsvd_jax import _siblings
    from flashsvd_jax.hub import resolve_model

    jax.config.update("jax_platforms", "cpu")
    report = _siblings.load("converters").export(
        resolve_model(parsed.folder),
        parsed.destination,
        format=parsed.format,
        copy_shared=parsed.copy_shared,
        progress=not parsed.quiet,
    )
    if not parsed.quiet:
        print(report)
