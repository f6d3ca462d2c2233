"""The command line: help at once, exit codes, one line for an explained error, and the output of some commands."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashsvd_jax.cli import COMMANDS, NEED_TORCH, main
from flashsvd_jax.cli.generate import describe
from flashsvd_jax.generation import Statistics
from flashsvd_jax.inspection import inspect
from flashsvd_jax.scoring import perplexity

HEAVY = ("jax", "numpy", "transformers", "torch", "flax")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: flashsvd {command}")
    assert "--help" in out


def test_help_waits_for_no_library() -> None:
    script = f"""
import contextlib, sys, time
from flashsvd_jax.cli import COMMANDS, NEED_TORCH, main
for arguments in [[], *([name] for name in COMMANDS)]:
    with contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
found = set({HEAVY!r}) & set(sys.modules)
assert not found, found
print("seconds", time.process_time(), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # Processor time, not the clock's: other tests may run beside this one. The interpreter's start and all helps.
    assert float(done.stderr.split()[-1]) < 0.5


@pytest.mark.parametrize("command", [["generate", "-p", "a", "--max-tokens", "2"], ["convert"], ["evaluate"]])
def test_a_command_imports_pytorch_only_where_it_needs_it(tiny: Any, tmp_path: Path, command: list[str]) -> None:
    """Else transformers would, wherever it is installed."""
    (tmp_path / "torch.py").write_text("print('imported')")
    script = f"""
import sys
from flashsvd_jax.cli import command
sys.argv[1:] = [{command[0]!r}, {str(tiny.folder)!r}, *{command[1:]!r}]
try:
    code = command()
except SystemExit:
    code = 0
import torch
sys.exit(code)
"""
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    needed = command[0] in NEED_TORCH
    assert ("imported" in done.stdout) == needed
    hidden = "import of torch halted; None in sys.modules"
    assert (done.returncode != 0 and hidden in done.stderr) != needed


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())  # as on one line
    assert all(f" {command} {text}" in out for command, text in COMMANDS.items())


@pytest.mark.parametrize(
    "arguments", [["nothing"], [], ["inspect"], ["inspect", "model", "--nothing"], ["chat", "m", "--seed", "x"]]
)
def test_a_wrong_call_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: flashsvd" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inspect"], ["chat"], ["generate", "--prompt", "x"]])
def test_an_explained_error_is_one_line_and_ends_with_1(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command[0], str(tmp_path / "missing"), *command[1:]]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flashsvd {command[0]}: ")
    assert err.count("\n") == 1


def test_what_the_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "x" * 300]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "xxx" in err


@pytest.mark.parametrize("command", [["evaluate", "missing"], ["bench", "missing"]])
def test_a_file_that_cannot_be_appended_to_is_told_before_the_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--append", str(tmp_path / "no" / "rows.jsonl")]) == 1
    assert "rows.jsonl cannot be written: its folder does not exist" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_one_line() -> None:
    env = os.environ | {"JAX_PLATFORMS": "tpu"}
    done = subprocess.run(
        [sys.executable, "-m", "flashsvd_jax", "env"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("flashsvd env: JAX finds no device of tpu: ")
    assert "Traceback" not in done.stderr


def test_options_of_tasks_want_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "missing", "--limit", "3"]) == 1
    assert "are for --tasks" in capsys.readouterr().err


def test_an_interruption_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashsvd_jax.inspection.inspect", interrupt)
    assert main(["inspect", "model"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_inspect_prints_a_table_and_saves_a_plot(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "ranks.png"
    assert main(["inspect", str(tiny.folder), "--context", "64", "--batch", "2", "--plot", str(plot)]) == 0
    assert capsys.readouterr().out == f"{inspect(tiny.folder, context=64, batch=2)}\n"
    assert plot.stat().st_size > 0


def test_inspect_prints_json(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] == inspect(tiny.folder).params


def test_perplexity_of_a_file(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some words, and some more of them: " * 3)
    assert main(["perplexity", str(tiny.folder), str(file), "--window", "32", "--batch", "2"]) == 0
    found = perplexity(tiny.model, file.read_text(), window=32, batch=2)
    expected = f"perplexity {found.value:.4f} ± {found.standard_error:.4f} (102 tokens scored in 4 windows of 32)\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff", b"x"])
def test_perplexity_of_a_file_without_text(
    tiny: Any, tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    assert main(["perplexity", str(tiny.folder), str(file)]) == 1
    err = capsys.readouterr().err
    assert ("the text has 2 tokens" if content == b"x" else f"{file} cannot be read as text") in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("compiled", "read", "said"),
    [
        (0, 0, "(warm)"),
        (4, 0, "(compiled 4 executables)"),
        (4, 4, "(read 4 executables)"),
        (4, 1, "(compiled 3 executables)"),
    ],
)
def test_what_a_call_waited_for_is_told(compiled: int, read: int, said: str) -> None:
    assert said in describe(Statistics(7, 3, 0.5, 0.1, compiled, read))


def test_standard_input_that_is_no_text_is_an_error(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff"), encoding="utf-8"))
    assert main(["generate", str(tiny.folder)]) == 1
    assert "standard input cannot be read as text" in capsys.readouterr().err
