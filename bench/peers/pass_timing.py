"""How a pass of a whole batch is timed in PyTorch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from case_process import gpu_alone
from prompt_cases import PromptCase, median_seconds, row_of, warm_up


def timed_row(case: PromptCase, run: Callable[[], object], attention: Sequence[str]) -> dict[str, Any]:
    """The row of a pass on the GPU, or on the CPU where there is none."""
    on_gpu = torch.cuda.is_available()

    def once() -> None:
        run()
        if on_gpu:
            torch.cuda.synchronize()

    if case.impl == "torch-compile":
        once()  # compiles for long, and uses the GPU for one pass alone
    held = peak = None
    with gpu_alone():
        warm_up(once, on_gpu)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        latency = median_seconds(once, case.repeats)
        if held is not None:
            peak = torch.cuda.max_memory_allocated() - held
    row = row_of(case, latency, attention, peak_activation_bytes=peak)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    return {**row, "matmul_tflops": None, "device": name, "torch": torch.__version__}
