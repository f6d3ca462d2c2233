"""Options that several commands share."""

import argparse
from pathlib import Path
from typing import Any

from flashsvd_jax.errors import RequestError
from flashsvd_jax.factorization import MATERIALIZE

_DTYPES = ("bfloat16", "float16", "float32")


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """The model and how its weights are loaded."""
    parser.add_argument("model", help="folder that `flashsvd convert` wrote, or the hub id of one")
    parser.add_argument("--dtype", choices=_DTYPES, help="compute in this; as stored if not given")
    add_materialize(parser)
    add_kernels(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """A decoder and how it is loaded."""
    add_loading_options(parser)
    parser.add_argument("--max-length", type=int, metavar="N", help="longest prompt plus completion, in tokens")


def add_materialize(parser: argparse.ArgumentParser) -> None:
    """Which low-rank sites are expanded to dense weights."""
    parser.add_argument(
        "--materialize",
        choices=MATERIALIZE,
        default="auto",
        help="low-rank sites to load as dense weights: those that are smaller so (auto), none, or all",
    )


def add_kernels(parser: argparse.ArgumentParser) -> None:
    """Which implementation of the ops is tried first."""
    parser.add_argument(
        "--kernels",
        default="auto",
        metavar="NAME",
        help="the fastest (auto), or try this one first; `flashsvd env` lists them",
    )


def add_sampling_options(parser: argparse.ArgumentParser, temperature: float) -> None:
    """One option for each field of SamplingParams but ``logprobs``."""
    add = parser.add_argument
    add("--max-tokens", type=int, default=256, metavar="N", help="at most so many tokens")
    add("--temperature", type=float, default=temperature, metavar="T", help="0 takes the most likely token")
    add("--top-k", type=int, default=0, metavar="K", help="only the K most likely tokens; 0 for all")
    add("--top-p", type=float, default=1.0, metavar="P", help="only the most likely tokens that together reach P")
    add("--min-p", type=float, default=0.0, metavar="P", help="only tokens at least P times as likely as the best one")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 avoids tokens seen before")
    add(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="subtracted from logits of tokens in the output",
    )
    add(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="the same, once for each time a token is there",
    )
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--stop-token-id", action="append", type=int, default=[], metavar="ID", help="end at this token; likewise")
    add("--ignore-eos", action="store_true", help="go on past the model's own end tokens")


def sampling_params(parsed: argparse.Namespace) -> Any:
    """SamplingParams from parsed options."""
    from flashsvd_jax.sampling import SamplingParams

    return SamplingParams(
        temperature=parsed.temperature,
        top_k=parsed.top_k,
        top_p=parsed.top_p,
        min_p=parsed.min_p,
        repetition_penalty=parsed.repetition_penalty,
        presence_penalty=parsed.presence_penalty,
        frequency_penalty=parsed.frequency_penalty,
        seed=parsed.seed,
        max_tokens=parsed.max_tokens,
        stop=tuple(parsed.stop),
        stop_token_ids=tuple(parsed.stop_token_id),
        ignore_eos=parsed.ignore_eos,
    )


def read_text(file: Path) -> str:
    """A text file.

    Raises:
      RequestError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} cannot be read as text: {error}") from error


def check_folder_of(file: Path | None) -> None:
    """Refuses an output file before work is done for it.

    Raises:
      RequestError: its folder does not exist, or it is one itself.
    """
    if file is not None and file.is_dir():
        raise RequestError(f"{file} cannot be written: it is a folder")
    if file is not None and not file.absolute().parent.is_dir():
        raise RequestError(f"{file} cannot be written: its folder does not exist")


def numbers(text: str) -> list[int]:
    """Parses `1,8,32`."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,8,32") from error
    if min(values) < 1:
        raise argparse.ArgumentTypeError("the numbers must be at least 1")
    return values


def load_model(parsed: argparse.Namespace) -> Any:
    """The model that `add_model_options` names."""
    from flashsvd_jax.model import load

    return load(
        parsed.model,
        dtype=parsed.dtype,
        materialize=parsed.materialize,
        max_length=parsed.max_length,
        kernels=parsed.kernels,
    )
