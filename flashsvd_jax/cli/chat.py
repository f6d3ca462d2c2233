"""Talk to a model that has a chat template.

Replies go to standard output, everything else to standard error, so that messages can be piped in and replies out.
Ctrl-C ends a reply that is being written; /quit or the end of the input ends the program; /help lists the commands.
"""

import argparse
import contextlib
import sys
from typing import Any

from flashsvd_jax.cli.generate import describe
from flashsvd_jax.cli.options import add_model_options, add_sampling_options, load_model, sampling_params
from flashsvd_jax.errors import RequestError

_HELP = """\
/reset        forget the conversation
/system TEXT  set the system message; without TEXT there is none
/help         this list
/quit         end; so does Ctrl-D"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling_options(parser, temperature=0.7)


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    params = sampling_params(parsed)
    model = load_model(parsed)
    if model.tokenizer is None or not model.tokenizer.has_chat_template:
        raise RequestError(f"{parsed.model} has no chat template: use `flashsvd generate`")
    chat(model, params, parsed.system)


def chat(model: Any, params: Any, system: str | None = None) -> None:
    """Reads lines from standard input and answers each, until its end or /quit.

    Args:
      model: from `load`, with a tokenizer that has a chat template.
      params: SamplingParams of every reply.
      system: the system message.
    """
    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  gives `input` line editing and history
    conversation = _Conversation(model, params, system)
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        _note(_HELP)
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _note("\n/quit or Ctrl-D ends")
            continue
        if line == "/quit":
            return
        if line.startswith("/"):
            conversation.command(line)
        elif line:
            conversation.answer(line)


class _Conversation:
    """Messages so far, and what changes them."""

    def __init__(self, model: Any, params: Any, system: str | None):
        self._model, self._params, self._system = model, params, system
        self._messages: list[dict[str, str]] = []

    def command(self, line: str) -> None:
        """Carries out a line that begins with a slash."""
        name, _, text = line.partition(" ")
        if name == "/reset":
            self._messages.clear()
        elif name == "/system":
            self._system = text.strip() or None
        else:
            _note(_HELP if name == "/help" else f"there is no command {name}; the commands are\n{_HELP}")

    def answer(self, text: str) -> None:
        """Streams the reply to a message and keeps both; a message that cannot be answered is not kept."""
        messages = [*self._messages, {"role": "user", "content": text}]
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        try:
            prompt = self._model.tokenizer.encode_chat([*system, *messages])
            if len(prompt) >= self._model.max_length:
                more = self._model.max_length < self._model.config.max_position
                raise RequestError(
                    f"the conversation has {len(prompt)} tokens and there is room for {self._model.max_length}:"
                    f" /reset begins a new one{', --max-length makes more room' if more else ''}"
                )
            reply = self._stream(prompt)
        except RequestError as error:
            _note(str(error))
            return
        self._messages = [*messages, {"role": "assistant", "content": reply}]

    def _stream(self, prompt: list[int]) -> str:
        """Prints a reply as it comes, then its statistics; returns it, cut short if interrupted."""
        from flashsvd_jax.generation import stream_generate

        shown, piece = "", None
        try:
            for piece in stream_generate(self._model, prompt, self._params):
                print(piece.text, end="", flush=True)
                shown += piece.text
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            _note("interrupted")
        if piece is not None:
            _note(describe(piece.statistics))
            if piece.finish_reason == "length":
                full = len(prompt) + piece.statistics.generated_tokens >= self._model.max_length
                _note("no room is left: /reset begins a new conversation" if full else "cut short: see --max-tokens")
        return shown


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
