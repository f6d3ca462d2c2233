"""Kernels of a layer found in a profile, and the bytes that are put beside them."""

from typing import Any

import jax
import kernel_times
import pytest

from flashsvd_jax.models.weights import LayerWeights
from flashsvd_jax.random_weights import random_weights
from flashsvd_jax.shapes import shape_config

LOW_RANK = ["attend", "attend_merge", *["project_down__1", "project_up__1", "project_down", "project_up"] * 2]
MIXED = ["attend_1", "fusion_7", *["project_down", "project_up"] * 4]


def trace(*layers: list[str]) -> dict[str, Any]:
    """Layers of 10 us a kernel, a head after them, and events that are none of the GPU's kernels."""
    names = [name for layer in layers for name in layer] + ["project_dense", "input_reduce_fusion"]
    meta = [
        {"ph": "M", "name": "trace_options"},
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 3, "args": {"name": "Stream #20(Compute)"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 4, "args": {"name": "XLA Ops"}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 3, "args": {"name": "Stream of text"}},
    ]
    kernels = [{"ph": "X", "pid": 1, "tid": 3, "name": n, "ts": 10.0 * i, "dur": 9.0} for i, n in enumerate(names)]
    others = [
        {"ph": "X", "pid": pid, "tid": tid, "name": "attend", "ts": 5.0, "dur": 1.0} for pid, tid in ((1, 4), (2, 3))
    ]
    return {"traceEvents": [*meta, *reversed(kernels), *others]}


@pytest.fixture(scope="module")
def layer() -> LayerWeights:
    return random_weights(shape_config("tiny", 0.5), "float32").layers[0]


@pytest.mark.parametrize("names", [LOW_RANK, MIXED], ids=["low_rank", "with_a_fusion"])
def test_each_kernel_has_its_mean_time_and_its_bytes(names: list[str], layer: LayerWeights) -> None:
    found = kernel_times.layers(kernel_times.kernel_events(trace(*[names] * 4)))
    assert [len(kernels) for kernels in found] == [len(names) + 1] * 3
    times = kernel_times.kernel_times(found, layer, cache=77)
    assert [time.kernel for time in times] == names
    assert all(time.us == pytest.approx(10.0) for time in times)
    parts = (layer.o, layer.gate_up, layer.down, layer.qkv)
    expected = [n for part in parts for n in (part.first.nbytes, sum(a.nbytes for a in jax.tree.leaves(part.ups)))]
    assert [time.bytes for time in times] == [77, None, *expected]


def test_layers_between_which_a_step_ends_are_left_out(layer: LayerWeights) -> None:
    events = kernel_times.kernel_events(
        trace(LOW_RANK, LOW_RANK, [*LOW_RANK, "project_dense", "copy"], LOW_RANK, LOW_RANK)
    )
    assert [len(kernels) for kernels in kernel_times.layers(events)] == [len(LOW_RANK) + 1] * 3
    assert kernel_times.layers([]) == []


@pytest.mark.parametrize("names", [LOW_RANK[:-1], [*LOW_RANK, "project_up"]], ids=["fewer", "more"])
def test_kernels_that_are_not_the_layers_are_an_error(names: list[str], layer: LayerWeights) -> None:
    found = kernel_times.layers(kernel_times.kernel_events(trace(*[names] * 4)))
    with pytest.raises(ValueError, match="products"):
        kernel_times.kernel_times(found, layer, cache=0)


def test_it_is_for_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["kernel_times.py"])
    monkeypatch.setenv("XLA_FLAGS", "")
    if jax.default_backend() != "gpu":
        assert kernel_times.main() == 1
        assert "on a GPU" in capsys.readouterr().err
