"""Text to tokens and back, through `transformers`: encoding, chat templates, and decoding a stream piece by piece."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flashsvd_jax.errors import CheckpointError, RequestError, first_line

_ANY_OF = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""Files of which transformers needs one at least."""


class Tokenizer:
    """A model's tokenizer.

    Args:
      folder: holds tokenizer.json (or what transformers needs to make one).

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """

    def __init__(self, folder: str | Path):
        # transformers advises at import to install PyTorch; tokenizers need none.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        if not any((Path(folder) / name).is_file() for name in _ANY_OF):
            raise CheckpointError(
                f"{folder} has no usable tokenizer: copy the base model's tokenizer.json there, or convert with --base"
            )
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its backends do
            raise CheckpointError(f"{folder}: no usable tokenizer ({first_line(error)})") from error

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end token, if it has one."""
        return () if self.hf.eos_token_id is None else (int(self.hf.eos_token_id),)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.hf.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the model expects at the start.

        Raises:
          RequestError: the tokenizer does not take the text.
        """
        with _refused_as_request_error([text]):
            return list(self.hf.encode(text, verbose=False))

    def encode_all(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """The same for many texts, cut off so that each has at most ``limit`` tokens, special ones at its end included."""
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        with _refused_as_request_error(texts):
            return [list(row) for row in self.hf(list(texts), verbose=False, **cut)["input_ids"]]

    def encode_windows(self, text: str, length: int) -> list[list[int]]:
        """The whole text in pieces of so many tokens, each with the special tokens of a text by itself; the last may be shorter.

        Raises:
          RequestError: the tokenizer cannot do that or does not take the text, or its special tokens leave no room.
        """
        if not self.hf.is_fast:
            raise RequestError("the tokenizer cannot cut a text into windows: a tokenizer.json is needed for that")
        if length <= self.hf.num_special_tokens_to_add():
            raise RequestError(f"windows of {length} tokens leave no room beside the tokenizer's special tokens")
        cut = {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
        with _refused_as_request_error([text]):
            return [list(row) for row in self.hf(text, verbose=False, **cut)["input_ids"]]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks next.

        Raises:
          RequestError: the model has no chat template, or it does not take these messages.
        """
        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template: use generate, or give the folder a chat_template.jinja"
            )
        try:
            ids = self.hf.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template raises what its author wrote
            raise RequestError(f"the chat template does not take these messages: {error}") from error
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.hf.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> "TextStream":
        """A decoder for one completion."""
        return TextStream(self)


@contextlib.contextmanager
def _refused_as_request_error(texts: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises whatever its backends do
        why = next(filter(None, map(_not_unicode, texts)), first_line(error))
        raise RequestError(f"the tokenizer does not take the text: {why}") from error


def _not_unicode(text: str) -> str | None:
    """Where a text is none, as of bytes that Python could not decode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"{text[error.start]!r}, its character {error.start}, is not Unicode; was it read as UTF-8, and is it that?"
        )
    return None


class TextStream:
    """Decodes tokens as they come, holding back bytes that do not form a character yet.

    Decodes from the last point where the text was whole, so that a token's text may depend on those before it (as with the
    leading space of sentencepiece) and the cost of a token does not grow with the length.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that becomes certain with this token, possibly none."""
        self._pending.append(token)
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)
        if text.endswith("\ufffd") or len(text) <= len(before):
            return ""
        self._context, self._pending = self._pending, []
        return text[len(before) :]

    def finish(self) -> str:
        """What was held back, with replacement characters for incomplete bytes."""
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)
        self._pending = []
        return text[len(before) :]
