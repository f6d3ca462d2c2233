"""The corpus of the bundled model: which files are taken, which are held out, and that a rerun takes the same."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = "def add(a, b):\n    return a + b\n" * 100


@pytest.fixture(scope="module")
def corpus() -> Iterator[Any]:
    """The collecting script, found as it is when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench" / "bundled_model"))
        yield importlib.import_module("corpus")
    sys.modules.pop("corpus", None)


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """A small library with files of every kind that must be left out."""
    files = {
        "good.py": CODE.encode(),
        "twin.py": CODE.encode(),
        "package/module.py": b"# other\r\n" + CODE.encode(),
        "site-packages/installed.py": b"# installed\n" + CODE.encode(),
        "_sysconfigdata__linux.py": b"# generated\n" + CODE.encode(),
        "config-3.12/python-config.py": b"# generated too\n" + CODE.encode(),
        "latin.py": b"# coding: latin-1\n" + CODE.encode() + b"# \xe9\n",
        "broken.py": CODE.encode() + b"# \xff\n",
        "tiny.py": b"x = 1\n",
        "huge.py": CODE.encode() * 100,
        "table.py": b"TABLE = [\n" + b"    0x00, 'a',\n" * 500 + b"]\n",
        "notes.txt": CODE.encode(),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_only_distinct_readable_source_is_taken(corpus: Any, stdlib: Path) -> None:
    documents = corpus.collect(stdlib)
    assert [document.path for document in documents] == ["good.py", "package/module.py"]
    assert "\r" not in documents[1].text
    assert documents == corpus.collect(stdlib)


def test_tests_and_short_files_are_never_held_out(corpus: Any) -> None:
    for index in range(500):
        for path in (
            f"test/test_x{index}.py",
            f"test_{index}.py",
            f"pkg/tests/a{index}.py",
            f"idlelib/idle_test/b{index}.py",
        ):
            assert corpus.part_of(path, 10_000) == "train"
        assert corpus.part_of(f"short{index}.py", 100) == "train"


def test_library_files_are_split_by_their_path(corpus: Any) -> None:
    parts = [corpus.part_of(f"module{index}.py", 10_000) for index in range(4000)]
    assert 0.03 < parts.count("heldout") / 4000 < 0.06
    assert 0.02 < parts.count("validation") / 4000 < 0.04


def test_heldout_text_is_whole_lines_of_heldout_files_alone(corpus: Any) -> None:
    parts = ["train", "heldout"] * 20
    documents = [corpus.Document(f"{i}.py", f"line {i}\n" * 2_000, part) for i, part in enumerate(parts)]
    text = corpus.heldout_text(documents)
    assert corpus.HELDOUT_TEXT_BYTES - 20 < len(text.encode()) <= corpus.HELDOUT_TEXT_BYTES
    assert all(int(line.removeprefix("line ")) % 2 for line in text.splitlines())


def test_calibration_text_is_whole_lines_of_training_files_alone(corpus: Any) -> None:
    parts = ["train", "heldout", "validation"] * 200
    documents = [corpus.Document(f"{i}.py", f"line {i % 3}\n" * 1_000, part) for i, part in enumerate(parts)]
    text = corpus.calibration_text(documents)
    assert corpus.CALIBRATION_TEXT_BYTES - 20 < len(text.encode()) <= corpus.CALIBRATION_TEXT_BYTES
    assert set(text.splitlines()) == {"line 0"}


def test_bundled_calibration_text_has_nothing_of_the_heldout_text() -> None:
    """No block of 300 characters: single lines occur in both."""
    heldout, calibration = (
        (ROOT / "flashsvd_jax/bundled" / f"{name}.txt").read_text() for name in ("heldout", "calibration")
    )
    blocks = {heldout[start : start + 300] for start in range(0, len(heldout) - 300, 300)}
    assert not [block for block in blocks if block in calibration]
