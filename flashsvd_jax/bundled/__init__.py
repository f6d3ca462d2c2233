"""A small decoder trained on Python's standard library, dense and compressed, some of that text, and text it never saw.

bench/bundled_model/ makes these files; README.md beside this one says from what, and how they were measured.
"""

from pathlib import Path

_HERE = Path(__file__).parent

DENSE = _HERE / "stdlib-llama"
COMPRESSED = _HERE / "stdlib_llama_whitening_only_0.6.pt"
HELDOUT = _HERE / "heldout.txt"
CALIBRATION = _HERE / "calibration.txt"
