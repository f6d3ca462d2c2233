"""Damaged checkpoints: whatever is cut off or changed, a CheckpointError or tensors, and nothing else."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch import nn
from torch_archives import pickle_of, pickled_text, repack

from converters.sources import open_source
from converters.sources.pickled_tensors import tensor_globals
from converters.sources.unpickle import load_inert
from flashsvd_jax.errors import CheckpointError

FUZZ = settings(max_examples=100, deadline=None, derandomize=True, database=None)


class HostileTokenizer:
    """Makes a folder when it is unpickled in earnest."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (str(self.witness),))


def outcome(path: Path, contents: bytes) -> dict[str, bytes] | None:
    """The tensors that a file of `contents` is read as, None for a CheckpointError; all else fails the test."""
    path.write_bytes(contents)
    try:
        with open_source(path) as source:
            arrays = {name: source.get(name) for name in source.infos()}
    except CheckpointError as error:
        assert str(path) in str(error)
        return None
    # A stride of 0 can make an array of any size from a small file.
    return {name: array.tobytes() if array.size < 10_000 else b"large" for name, array in arrays.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def module_file(folder) -> bytes:
    """A pickled module with tied weights, buffers and a tokenizer that would leave `executed` behind."""
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "norm": nn.BatchNorm1d(2), "head": nn.Linear(2, 3)})
    model["head"].weight = model["embed"].weight
    model.register_forward_hook(print)
    torch.save({"model": model, "tokenizer": HostileTokenizer(folder / "executed")}, folder / "model.pt")
    return (folder / "model.pt").read_bytes()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_files(folder, module_file, suffix):
    contents = module_file
    if suffix == ".safetensors":
        save_file({"a": np.ones((20, 3)), "b": np.zeros(7)}, folder / "whole.safetensors")
        contents = (folder / "whole.safetensors").read_bytes()
    path = folder / f"truncated{suffix}"
    assert outcome(path, contents) is not None
    for length in (*(len(contents) * percent // 100 for percent in range(0, 100, 5)), len(contents) - 1):
        assert outcome(path, contents[:length]) is None, length


def test_removed_middle(folder, module_file):
    for start in range(0, len(module_file), len(module_file) // 20):
        assert outcome(folder / "gap.pt", module_file[:start] + module_file[start + 64 :]) is None


def flipped(contents: bytes, flips: list[tuple[float, int]], start: int = 0, end: int | None = None) -> bytes:
    """`contents` with bytes changed; positions are fractions of the range from `start` to `end`."""
    changed = bytearray(contents)
    for position, mask in flips:
        changed[start + int(position * ((end or len(contents)) - start))] ^= mask
    return bytes(changed)


FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4)


@FUZZ
@given(flips=FLIPS)
def test_flips_in_the_pickle(folder, module_file, flips):
    outcome(folder / "flipped.pt", repack(module_file, {"data.pkl": flipped(pickle_of(module_file), flips)}))
    assert not (folder / "executed").exists()


@FUZZ
@given(flips=FLIPS)
def test_flips_in_the_directory(folder, module_file, flips):
    start = module_file.index(b"PK\x01\x02")
    read = outcome(folder / "flipped.pt", flipped(module_file, flips, start))
    assert read is None or read == outcome(folder / "whole.pt", module_file)
    assert not (folder / "executed").exists()


@FUZZ
@given(flips=FLIPS)
def test_flips_anywhere(folder, module_file, flips):
    outcome(folder / "flipped.pt", flipped(module_file, flips))
    assert not (folder / "executed").exists()


@FUZZ
@given(flips=FLIPS)
def test_flips_in_a_safetensors_header(folder, flips):
    save_file({"a": np.ones((2, 3)), "b": np.zeros(7)}, folder / "whole.safetensors")
    contents = (folder / "whole.safetensors").read_bytes()
    outcome(folder / "flipped.safetensors", flipped(contents, flips, 0, len(contents) - 13 * 8))


SINGLE = [bytes([code]) for code in b"N\x88()]}\x8f0123abesutdRQ\x81\x85\x86\x87\x90\x91\x92\x94"]
GLOBALS = [f"c{module}\n{name}\n".encode() for module, name in (*tensor_globals(), ("torch", "Size"), ("os", "system"))]
LITERALS = [
    b"K\x01",
    b"q\x00",
    b"q\x01",
    b"h\x00",
    b"h\x01",
    pickled_text("storage"),
    pickled_text("0"),
    pickled_text("_parameters"),
]


@settings(FUZZ, max_examples=300)
@given(parts=st.lists(st.sampled_from(SINGLE + LITERALS * 2 + GLOBALS), min_size=2, max_size=30))
def test_random_programs(parts):
    try:
        load_inert(b"\x80\x04" + b"".join(parts) + b".")
    except CheckpointError:
        return
