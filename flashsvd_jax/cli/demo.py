"""The main job on the bundled model: convert its PyTorch SVD checkpoint, complete some Python, compare perplexity with dense."""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashsvd_jax.model import Model

PROMPT = '''import argparse


def main():
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)'''
MAX_LENGTH = 1024
OPTIONS = {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--prompt", default=PROMPT, help="the text to complete")
    parser.add_argument("--max-tokens", type=int, default=120, metavar="N", help="length of the completion")


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    from flashsvd_jax import _siblings
    from flashsvd_jax.bundled import COMPRESSED, DENSE, HELDOUT

    convert = _siblings.load("converters").convert
    with tempfile.TemporaryDirectory(prefix="flashsvd-demo-") as folder:
        compressed, dense = Path(folder, "compressed"), Path(folder, "dense")
        print(f"1. Reading {COMPRESSED.name}, a PyTorch pickle as SVD-LLM publishes it, without PyTorch\n")
        print(convert(COMPRESSED, compressed, base=DENSE, progress=False))
        convert(DENSE, dense, progress=False)
        print("\n2. Completing Python from the factors\n")
        model = _complete(compressed, parsed.prompt, parsed.max_tokens)
        print("\n3. Perplexity of held-out standard library code, never trained on\n")
        _perplexities(model, dense, HELDOUT.read_text(encoding="utf-8"))


def _complete(folder: Path, prompt: str, max_tokens: int) -> "Model":
    from flashsvd_jax.cli.generate import announce_compilation, describe
    from flashsvd_jax.generation import stream_generate
    from flashsvd_jax.model import load
    from flashsvd_jax.sampling import SamplingParams

    model = load(folder, max_length=MAX_LENGTH, dtype=_dtype())
    print(prompt, end="", flush=True)
    params = SamplingParams(max_tokens=max_tokens, **OPTIONS)
    piece = None
    for piece in announce_compilation(stream_generate(model, prompt, params)):
        print(piece.text, end="", flush=True)
    assert piece is not None
    print(f"\n\ncold: {describe(piece.statistics)}")
    *_, piece = stream_generate(model, prompt, params)
    print(f"warm: {describe(piece.statistics)}")
    return model


def _dtype() -> str | None:
    """As stored on a GPU; float32 on a CPU, which only emulates half precision."""
    import jax

    return "float32" if jax.default_backend() == "cpu" else None


def _perplexities(compressed: "Model", dense_folder: Path, text: str) -> None:
    from flashsvd_jax.model import load
    from flashsvd_jax.schema import count_params
    from flashsvd_jax.scoring import perplexity

    print("| model | parameters | perplexity |\n|---|---|---|")
    for name, model in (
        ("dense", load(dense_folder, max_length=MAX_LENGTH, dtype=_dtype())),
        ("compressed", compressed),
    ):
        result = perplexity(model, text)
        print(
            f"| {name} | {count_params(model.config):,} | {result.value:.3f} ± {result.standard_error:.3f} |",
            flush=True,
        )
