"""The script that times streaming measures the calls that it says, and writes what the package reads."""

import dataclasses
import json

import pytest
import streaming_times
from streaming_times import MEASURED, attention, layer, milliseconds, operands, rendered, row_of

from pallas_kernels.triton.stream_costs import AttentionCall, Call, FeedForwardCall
from pallas_kernels.tuned import table


@pytest.mark.parametrize(
    "call", [layer(130, 20, 40, inner=64), layer(130, 20, 30, 40, inner=64), attention(1, 70, 8, rotary=True, seen=33)]
)
def test_operands_are_of_the_call(call: Call) -> None:
    args, options = operands(call)
    if isinstance(call, FeedForwardCall):
        x, up, down = args
        assert FeedForwardCall.of(x.shape[1], up, down) == call
    else:
        x, qkv, visible = args
        assert AttentionCall.of(x.shape, qkv, visible, 64, options["tables"] is not None) == call
    assert set(milliseconds(call)) == {"products"}  # on a CPU


def test_a_row_has_its_floor() -> None:
    row = row_of(layer(1024, 64, 64), "hopper", 0.5, 1e14)
    operations = 2 * 1024 * (768 + 3072) * (64 + 64)
    assert row["floor_ms"] == round(1e3 * operations / 1e14, 4) and row["tflops"] == round(operations / 0.5e9, 1)
    assert row["impl"] == "hopper" and row["call"]["up_ranks"] == (64,)


def test_it_writes_tables_as_the_package_has_them() -> None:
    found = table("pallas_kernels.triton", "NVIDIA H200", "streaming")
    assert json.loads(rendered(found)) == found
    for call in MEASURED:
        fields = {field.name for field in dataclasses.fields(call)}
        assert all(set(entry["call"]) <= fields for entry in found[call.op])


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["streaming_times.py", "--out", "none"])
    assert streaming_times.main() == 1
    assert "timed on a GPU" in capsys.readouterr().err
