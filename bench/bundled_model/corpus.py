"""Collects the training corpus of the bundled model: the Python source of the running interpreter's standard library.

`collect()` is deterministic for one Python release: files are taken in sorted order, identical files once, and a file
belongs to the held-out or validation part by a hash of its relative path alone. Run as a script, it writes the held-out
text that perplexity is measured on, the text that compression takes its statistics of, and the licence of both.
"""

import argparse
import hashlib
import platform
import re
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BUNDLED = Path(__file__).resolve().parents[2] / "flashsvd_jax" / "bundled"

MAX_FILE_BYTES = 200_000
MIN_FILE_BYTES = 200
MAX_DATA_LINE_SHARE = 0.5
HELDOUT_TEXT_BYTES = 120_000
HELDOUT_FILE_BYTES = 12_000
MIN_HELDOUT_FILE_BYTES = 2_000
CALIBRATION_TEXT_BYTES = 400_000
CALIBRATION_FILE_BYTES = 4_000

# Installed packages, and files that the build of the interpreter generates with the paths of the machine in them.
_SKIPPED = re.compile(r"^(site-packages|dist-packages|config-[^/]*|_sysconfigdata[^/]*)(/|$)")
_TEST_PART = re.compile(r"(^|/)(_?tests?(_|/|\.py)|idle_test/|[^/]*_test\.py)")
_CODING = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_DATA_LINE = re.compile(r"""^\s*[bBrRuUfF]{0,2}["'\d(\[{}\])\-+]""")

Part = Literal["train", "validation", "heldout"]


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the standard library, its text, and the part it belongs to."""

    path: str
    text: str
    part: Part


def collect(stdlib: Path | None = None) -> list[Document]:
    """Returns the documents of the standard library (the running interpreter's by default) in path order."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    documents, seen = [], set()
    for file in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        path = file.relative_to(root).as_posix()
        if _SKIPPED.match(path):
            continue
        text = _read_text(file)
        if text is None or _is_mostly_data(text):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            documents.append(Document(path, text, part_of(path, len(text.encode()))))
    return documents


def part_of(path: str, size: int) -> Part:
    """Assigns a file to a part by the hash of its path; tests and very short files are always trained on."""
    if size < MIN_HELDOUT_FILE_BYTES or _TEST_PART.search(path):
        return "train"
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 1000
    if bucket < 45:
        return "heldout"
    return "validation" if bucket < 75 else "train"


def heldout_text(documents: list[Document]) -> str:
    """Joins the beginnings of held-out files, each cut at a line end, up to HELDOUT_TEXT_BYTES."""
    heldout = [document for document in documents if document.part == "heldout"]
    return _beginnings(heldout, HELDOUT_FILE_BYTES, HELDOUT_TEXT_BYTES)


def calibration_text(documents: list[Document]) -> str:
    """Joins the beginnings of training files, in the order of a hash of their path, up to CALIBRATION_TEXT_BYTES."""
    train = [document for document in documents if document.part == "train"]
    train.sort(key=lambda document: hashlib.sha256(document.path.encode()).digest())
    return _beginnings(train, CALIBRATION_FILE_BYTES, CALIBRATION_TEXT_BYTES)


def _beginnings(documents: list[Document], file_bytes: int, text_bytes: int) -> str:
    pieces, total = [], 0
    for document in documents:
        piece = _first_lines(document.text, min(file_bytes, text_bytes - total))
        pieces.append(piece)
        total += len(piece.encode())
    return "".join(pieces)


def _read_text(file: Path) -> str | None:
    """Reads one source file, or returns None for one that is too small, too large or not plain UTF-8."""
    raw = file.read_bytes()
    if not MIN_FILE_BYTES <= len(raw) <= MAX_FILE_BYTES:
        return None
    declared = [m.group(1).lower() for line in raw.split(b"\n", 2)[:2] if (m := _CODING.match(line))]
    if declared and declared[0] not in (b"utf-8", b"utf8", b"ascii", b"us-ascii"):
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if text.startswith("\ufeff") or "\0" in text else text.replace("\r\n", "\n")


def _is_mostly_data(text: str) -> bool:
    """Tells a table written as Python (a code page, a word list) by the share of lines that start with a literal."""
    lines = [line for line in text.split("\n") if line.strip()]
    return sum(bool(_DATA_LINE.match(line)) for line in lines) > MAX_DATA_LINE_SHARE * len(lines)


def _first_lines(text: str, limit: int) -> str:
    """Returns the longest prefix of whole lines that has at most `limit` bytes."""
    if len(text.encode()) <= limit:
        return text if text.endswith("\n") else text + "\n"
    prefix = text.encode()[:limit]
    return prefix[: prefix.rfind(b"\n") + 1].decode()


def main() -> None:
    """Writes both texts and the licence, and prints the size of every part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stdlib", type=Path, help="standard library folder (default: the running interpreter's)")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="folder for the texts and PYTHON_LICENSE.txt")
    parser.add_argument("--list", action="store_true", help="also list the files of the validation and held-out parts")
    options = parser.parse_args()

    root = options.stdlib or Path(sysconfig.get_path("stdlib"))
    documents = collect(root)
    texts = {"heldout.txt": heldout_text(documents), "calibration.txt": calibration_text(documents)}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (options.out / name).write_text(text, encoding="utf-8", newline="")
    shutil.copyfile(root / "LICENSE.txt", options.out / "PYTHON_LICENSE.txt")

    print(f"Python {platform.python_version()}")
    for part in ("train", "validation", "heldout"):
        chosen = [document for document in documents if document.part == part]
        print(f"{part:10} {len(chosen):5} files {sum(len(d.text.encode()) for d in chosen):10} bytes")
        if options.list and part != "train":
            print("".join(f"    {d.path} {len(d.text)}\n" for d in chosen), end="")
    for name, text in texts.items():
        print(f"{name} {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
