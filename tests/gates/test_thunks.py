"""XLA's list of thunks as a tree, from lists written by hand in its format."""

import pytest
from xla_thunks import Kernel, parse_thunks

NESTED = """\
001: kCopy  [source       | next=003 (2)] kCopy
003: kWhile [prev=002 (1) | sink        ]
condition:
    004: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    005: kCopy         [source       | next=007 (2)] kCopy
    007: kWhile        [prev=005 (2) | next=017 (1)]
condition:
        008: kCustomKernel [source | sink] inner grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
      body:
        000: kCommandBuffer [source | sink]
            009: kCustomKernel [source | sink] gemm grid: [8, 2, 1] threads: [64, 1, 1]  shared_memory: 1024 bytes
            050: kConditional  [prev=047 (1)  | next=051 (1)]
              false_branch:
                048: kCopy [source | sink] kCopy
              true_branch:
                049: kCopy [source | sink] kCopy
    017: kCustomKernel [prev=007 (1) | sink        ] last grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
"""


def test_loops_buffers_and_branches_nest() -> None:
    copy, loop = parse_thunks(NESTED)
    assert (copy.kind, copy.parts) == ("kCopy", {})
    assert [thunk.kind for thunk in loop.parts["condition"]] == ["kCustomKernel"]
    assert [thunk.kind for thunk in loop.parts["body"]] == ["kCopy", "kWhile", "kCustomKernel"]
    inner = loop.parts["body"][1]
    assert inner.parts["condition"][0].kernel is not None
    (buffer,) = inner.parts["body"]
    assert [thunk.kind for thunk in buffer.parts[""]] == ["kCustomKernel", "kConditional"]
    assert buffer.parts[""][1].parts.keys() == {"false_branch", "true_branch"}


def test_a_launch_is_read() -> None:
    launches = [thunk.kernel for thunk in parse_thunks(NESTED)[1].walk() if thunk.kernel]
    assert launches[2] == Kernel("gemm", (8, 2, 1), (64, 1, 1), 1024)
    assert [kernel.name for kernel in launches] == ["compare", "inner", "gemm", "last"]


def test_an_unknown_line_is_an_error() -> None:
    with pytest.raises(ValueError, match="neither a thunk nor a label: 'fusion of two'"):
        parse_thunks("000: kCopy [source | sink] kCopy\nfusion of two\n")


def test_a_condition_without_thunks_is_seen() -> None:
    lines = ["000: kWhile [a | b]", "condition:", "    No thunks.  body:", "    001: kCopy [a | b] copy"]
    (loop,) = parse_thunks("\n".join(lines))
    assert [thunk.kind for thunk in loop.parts["body"]] == ["kCopy"] and "condition" not in loop.parts
