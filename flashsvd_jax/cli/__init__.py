"""The `flashsvd` command: a table of sub-commands, each in a module of its own that is imported when it is called."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from flashsvd_jax import __version__
from flashsvd_jax.errors import FlashSVDError

COMMANDS = {
    "demo": "convert, run and measure the bundled model",
    "generate": "complete a prompt",
    "chat": "talk to a model that has a chat template",
    "encode": "turn lines of text into vectors, with an encoder",
    "convert": "turn a PyTorch SVD checkpoint into a folder that the other commands load",
    "export": "write a converted model in a published form, for other tools",
    "compress": "turn a dense model into factors, by plain SVD or one of seven methods",
    "finetune": "train the factors of a compressed model on a text",
    "inspect": "ranks, sizes and memory of a model, from file headers alone",
    "perplexity": "perplexity of a text file, with its standard error",
    "evaluate": "perplexity and lm-eval tasks of several models, side by side",
    "bench": "measure prompt processing and decoding",
    "env": "versions, device, caches and kernels, for a bug report",
}

NEED_TORCH = ("convert", "evaluate")  # to verify logits, and for lm-eval's tasks


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def command() -> int:
    """`main` as a process of its own.

    PyTorch is hidden from it, where it is installed: transformers would import it for tokenizers, which takes seconds and 600 MB.
    """
    if _called(sys.argv[1:]) not in NEED_TORCH:
        sys.modules.setdefault("torch", None)  # pyright: ignore[reportArgumentType]
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0, 1 for an error that is explained, 2 for a wrong call, 130 if interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="flashsvd",
        description="Run transformers compressed by SVD.",
        epilog="flashsvd COMMAND --help tells more of each command.",
    )
    parser.add_argument("--version", action="version", version=f"flashsvd_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # Only the command that is called is imported: help for all of them needs no more than the table.
    called = _called(arguments)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, add_help=name == called)
        if name == called:
            module = importlib.import_module(f"flashsvd_jax.cli.{name}")
            sub.description = module.__doc__
            sub.formatter_class = _HelpFormatter
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed) or 0
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (FlashSVDError, OSError) as error:  # of the system: a name that it does not take, for one; it says which
        print(f"flashsvd {parsed.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        reason = _no_device()
        if reason is None:
            raise
        print(f"flashsvd {parsed.command}: {reason}", file=sys.stderr)
        return 1


def _no_device() -> str | None:
    """Why nothing can run, if JAX has no device: what it raises then need not say so, and differs from place to place."""
    import jax

    try:
        jax.devices()
    except Exception:
        wanted = os.environ.get("JAX_PLATFORMS") or "any kind"
        return f"JAX finds no device of {wanted}: choose another with JAX_PLATFORMS (cpu is always there), or install JAX for it"
    return None


def _called(arguments: Sequence[str]) -> str | None:
    return next((a for a in arguments if not a.startswith("-")), None)
