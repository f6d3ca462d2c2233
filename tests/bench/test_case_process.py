"""Cases that are started ahead take turns on the GPU, and one that hangs ends with all that it started."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from case_process import ScriptProcess, taking_turns

TURN = """
import json, sys, time
from case_process import gpu_alone
with gpu_alone():
    start = time.time()
    time.sleep(float(sys.argv[1] or 0.3))
    print(json.dumps({"start": start, "end": time.time()}))
"""
HANGS = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
child.wait()
"""


PARENT = """
import os, sys
from pathlib import Path
from case_process import ScriptProcess, in_turn
start = lambda number, case, turns: ScriptProcess(Path(case), sys.argv[2], os.environ)
for case, process in in_turn([sys.argv[1]], 0, start):
    process.row(60)
"""


def started(tmp_path: Path, text: str, case: str = "", **env: str) -> ScriptProcess:
    script = tmp_path / "script.py"
    if not script.exists():  # an earlier process may be about to read it
        script.write_text(text)
    return ScriptProcess(script, case, {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **env})


def test_none_uses_the_gpu_while_another_does(tmp_path: Path) -> None:
    with taking_turns(3) as turns:
        assert turns["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        rows = [process.row(60) for process in [started(tmp_path, TURN, **turns) for _ in range(3)]]
    rows.sort(key=lambda row: row["start"])
    assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(rows))


def test_a_limit_is_of_the_case_itself_and_not_of_those_before_it(tmp_path: Path) -> None:
    with taking_turns(3) as turns:
        others = [started(tmp_path, TURN, "2", **turns) for _ in range(2)]
        time.sleep(0.5)
        assert "error" not in started(tmp_path, TURN, "1", **turns).row(2.5)
        assert all("error" not in other.row(2.5) for other in others)


def test_alone_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    with taking_turns(1) as turns:
        assert turns == {}
        assert set(started(tmp_path, TURN).row(60)) == {"start", "end"}


def test_what_hangs_ends_with_its_children(tmp_path: Path) -> None:
    process = started(tmp_path, HANGS, str(tmp_path / "pid"))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    assert process.row(0.1) == {"error": "no result after 0 s"}
    child, end = int((tmp_path / "pid").read_text()), time.time() + 10
    while running(child) and time.time() < end:
        time.sleep(0.05)
    assert not running(child)


def test_a_signal_to_end_ends_what_was_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (tmp_path / "script.py").write_text(HANGS)
    (tmp_path / "parent.py").write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *(str(tmp_path / name) for name in ("parent.py", "script.py", "pid"))]
    parent = subprocess.Popen(command, env=env)
    while not pid.exists() or not pid.read_text():
        time.sleep(0.05)
    parent.terminate()
    assert parent.wait(20) == 128 + signal.SIGTERM
    end = time.time() + 10
    while running(int(pid.read_text())) and time.time() < end:
        time.sleep(0.05)
    assert not running(int(pid.read_text()))


def running(pid: int) -> bool:
    """Whether a process lives; who has ended, but was not waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("raise ValueError('no such model')", "exit status 1: ValueError: no such model"),
        ("raise ValueError('no such model\\n\\nSet THIS=1 to see more')", "exit status 1: ValueError: no such model"),
        ("raise SystemExit('ends')", "exit status 1: ends"),
        ("raise SystemExit(3)", "exit status 3: no message"),
        ("", "no result"),
    ],
)
def test_without_a_row_the_last_words_are_the_error(tmp_path: Path, text: str, error: str) -> None:
    assert started(tmp_path, text).row(60) == {"error": error}


def test_the_last_row_counts(tmp_path: Path) -> None:
    text = f"print('noise'); print({json.dumps(json.dumps({'a': 1}))})"
    assert started(tmp_path, text).row(60) == {"a": 1}
