"""The conversation loop, its commands, and what it does when it is interrupted or a conversation grows too long."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flashsvd_jax import SamplingParams, generate, generation
from flashsvd_jax.cli import main
from flashsvd_jax.cli.chat import chat
from flashsvd_jax.model import Model

PARAMS = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
Talk = Callable[..., Any]  # gives pytest's capture result: .out and .err


@pytest.fixture
def talk(tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Types lines; returns what was printed, and what was said beside it."""

    def run(*lines: str, system: str | None = None) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat(tiny.short, PARAMS, system)
        return capsys.readouterr()

    return run


def reply(tiny: Any, *messages: str, system: str | None = None) -> str:
    """What the model says to messages of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    start = [] if system is None else [{"role": "system", "content": system}]
    return generate(tiny.short, tiny.short.tokenizer.encode_chat([*start, *turns]), PARAMS)


def test_each_reply_knows_the_conversation(tiny: Any, talk: Talk) -> None:
    out, err = talk("hi", "", "more")
    first = reply(tiny, "hi")
    second = reply(tiny, "hi", first, "more")
    assert second != reply(tiny, "more")
    assert out == f"{first}\n{second}\n"
    assert err.count("new tokens; first token") == 2


def test_reset_forgets(tiny: Any, talk: Talk) -> None:
    assert talk("hi", "/reset", "more").out == f"{reply(tiny, 'hi')}\n{reply(tiny, 'more')}\n"


def test_system_message_is_set_changed_and_removed(tiny: Any, talk: Talk) -> None:
    out, _ = talk("hi", "/reset", "/system  be bad", "hi", "/reset", "/system", "hi", system="be good")
    expected = [reply(tiny, "hi", system=system) for system in ("be good", "be bad", None)]
    assert len(set(expected)) == 3
    assert out == "".join(f"{text}\n" for text in expected)


def test_help_lists_the_commands_and_so_does_an_unknown_one(talk: Talk) -> None:
    out, err = talk("/help", "/nothing here")
    assert out == ""
    assert err.count("/reset        forget the conversation") == 2
    assert "there is no command /nothing;" in err


def test_quit_ends_before_what_follows(talk: Talk) -> None:
    assert talk("/quit", "hi") == ("", "")


def test_a_conversation_too_long_is_not_kept_and_says_what_to_do(tiny: Any, talk: Talk) -> None:
    out, err = talk("x" * 26, "hi")
    assert "there is room for 32: /reset begins a new one, --max-length makes more room" in err
    assert out == f"{reply(tiny, 'hi')}\n"


def test_no_more_room_is_advised_than_the_model_has(tiny: Any, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    most = tiny.short.config.max_position
    monkeypatch.setattr(tiny.short, "max_length", most)
    err = talk("x" * most).err
    assert f"there is room for {most}: /reset begins a new one\n" in err


def test_a_reply_cut_short_says_why(talk: Talk) -> None:
    assert "cut short: see --max-tokens" in talk("hi").err
    assert "no room is left: /reset" in talk("x" * 22).err


def test_a_message_that_the_template_refuses_is_not_kept(
    tiny: Any, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny.short.tokenizer
    encode, roles = tokenizer.encode_chat, iter(["tool", "user"])
    monkeypatch.setattr(tokenizer, "encode_chat", lambda m: encode([*m[:-1], {**m[-1], "role": next(roles)}]))
    out, err = talk("hi", "hi")
    assert "the chat template does not take these messages: no tools" in err
    monkeypatch.undo()
    assert out == f"{reply(tiny, 'hi')}\n"


def test_an_interrupted_reply_is_kept_as_far_as_it_came(tiny: Any, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, interruptions = generation.stream_generate, [True, False]

    def interrupted(*args: Any) -> Iterator[Any]:
        stream = whole(*args)
        yield next(stream)
        if interruptions.pop(0):
            raise KeyboardInterrupt
        yield from stream

    monkeypatch.setattr(generation, "stream_generate", interrupted)
    out, err = talk("hi", "more")
    first, second = out.splitlines()
    assert reply(tiny, "hi").startswith(first)
    assert 0 < len(first) < len(reply(tiny, "hi"))
    assert second == reply(tiny, "hi", first, "more")
    assert "interrupted" in err


def test_an_interruption_while_nothing_is_said_does_not_end_the_program(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = iter([KeyboardInterrupt, EOFError])

    def read(prompt: str) -> str:
        raise next(events)

    monkeypatch.setattr("builtins.input", read)
    chat(tiny.short, PARAMS)
    assert "/quit or Ctrl-D ends" in capsys.readouterr().err
    assert not list(events)


def test_command_line(tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    options = ["--system", "be good", "--temperature", "0", "--max-tokens", "5", "--max-length", "32", "--ignore-eos"]
    assert main(["chat", str(tiny.folder), *options]) == 0
    assert capsys.readouterr().out == reply(tiny, "hi", system="be good") + "\n"


def test_a_model_without_a_template_is_refused(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flashsvd_jax.cli.chat.load_model", lambda _: Model(tiny.model.config, tiny.model.weights))
    assert main(["chat", str(tiny.folder)]) == 1
    assert "has no chat template: use `flashsvd generate`" in capsys.readouterr().err
