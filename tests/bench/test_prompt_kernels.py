"""A prompt's pass taken apart: host times of a tiny model, and a layer's kernels from a made-up profile."""

import jax
import prompt_kernels
import pytest
from prefill_cases import PrefillCase
from prefill_ours import lower_prompt


def test_host_times_of_a_tiny_model() -> None:
    lowered, draw = lower_prompt(PrefillCase("flashsvd_jax", "tiny", 0.5, 1, 16).config, 1, 16)
    times = prompt_kernels.host_times(lowered.compile(), draw())
    assert times["nothing, waited for"] < times["waited for"] and times["until sent"] <= times["waited for"]


def test_a_layer_is_told_kernel_by_kernel() -> None:
    names = ["embed", *["cudnn_sdpa_fprop", "nvjet_128x256", "add_rms_norm_3"] * 4, "head"]
    events = [{"name": name, "ts": 10.0 * i, "dur": 9.0} for i, name in enumerate(names)]
    lines = prompt_kernels.layer_lines(events, count=100)
    assert [line.split()[-1] for line in lines[:3]] == names[1:4]
    assert lines[0].split()[:2] == ["9.00", "10.00"]
    assert lines[3].split()[:2] == ["27.00", "30.00"] and lines[4].split()[:2] == ["2.70", "3.00"]
    assert "embed" in prompt_kernels.layer_lines(events[:1], 1)[0]


def test_kernels_outside_layers_are_told_and_passes_compared() -> None:
    names = ["embed", *["nvjet", "add_rms_norm"] * 4, "head"] * prompt_kernels.PROFILED
    events = [{"name": name, "ts": 10.0 * i, "dur": 5.0 if name == "embed" else 9.0} for i, name in enumerate(names)]
    lines = prompt_kernels.outside_lines(events)
    assert [line.split()[2] for line in lines[:-1]] == ["head,", "embed,"]
    assert lines[-1].split()[0] == "0.10"


def test_it_is_for_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")
    if jax.default_backend() != "gpu":
        assert prompt_kernels.main([]) == 1
        assert "on a GPU" in capsys.readouterr().err
