"""Perplexity and lm-eval tasks of several models, as a table.

The text is tokenized as a whole and cut into windows that do not overlap, 2048 tokens each or the model's limit; the first token of
each is not scored. So SVD papers report WikiText-2. Name the dense model first: the others are also given as multiples of it.
"""

import argparse
from pathlib import Path

from flashsvd_jax.cli.options import add_kernels, add_materialize, check_folder_of, read_text
from flashsvd_jax.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("models", nargs="+", metavar="model", help="folder that `flashsvd convert` or `compress` wrote, or its hub id")
    add("--text", type=Path, metavar="FILE", help="a text in UTF-8; held-out Python of the package if not given")
    add("--window", type=int, metavar="N", help="tokens in a window; 2048 or the model's limit if not given")
    add("--batch", type=int, metavar="N", help="sequences at once; by memory if not given")
    add("--tasks", type=_names, default=[], metavar="T,..", help='lm-eval\'s names of tasks; needs the extra "eval"')
    add("--task-folder", type=Path, metavar="DIR", help="with --tasks: where further ones are, as lm-eval's YAML")
    add("--limit", type=int, metavar="N", help="with --tasks: examples of each")
    add("--num-fewshot", type=int, metavar="N", help="with --tasks: examples shown before each question")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="compute in this; as stored if not given")
    add_materialize(parser)
    add_kernels(parser)
    add("--append", type=Path, metavar="FILE", help="also append each model's results to this file, as a JSON line")
    add("--quiet", action="store_true", help="no progress bars")


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    from flashsvd_jax.bundled import HELDOUT
    from flashsvd_jax.checkpoint import open_folder
    from flashsvd_jax.evaluation import evaluate, table
    from flashsvd_jax.hub import resolve_model

    if not parsed.tasks and (parsed.limit, parsed.num_fewshot) != (None, None):
        raise RequestError("--limit and --num-fewshot are for --tasks")
    check_folder_of(parsed.append)
    file = parsed.text or HELDOUT
    text = read_text(file)
    for model in parsed.models:  # all are there before one is scored, which takes minutes
        with open_folder(resolve_model(model)):
            pass
    found = []
    for model in parsed.models:
        found.append(
            evaluate(
                model, text=text, text_name=file.name, window=parsed.window, batch=parsed.batch, tasks=parsed.tasks,
                task_folder=parsed.task_folder, limit=parsed.limit, num_fewshot=parsed.num_fewshot,
                progress=not parsed.quiet, dtype=parsed.dtype, materialize=parsed.materialize, kernels=parsed.kernels,
            )
        )  # fmt: skip
        if parsed.append:
            with parsed.append.open("a", encoding="utf-8") as lines:
                print(found[-1].to_json(), file=lines)
    print(table(found))


def _names(text: str) -> list[str]:
    """Parses `arc_easy,wikitext`."""
    return [name for name in (part.strip() for part in text.split(",")) if name]
