"""Measures one case of the benchmark of prompts with flashsvd_jax: the process that `prefill.py` starts. Prints a JSON row."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from prefill_cases import PrefillCase
from prompt_timing import timed_row

from flashsvd_jax.background_compile import BackgroundStep, BackgroundSteps
from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models.pass_options import prompt_options
from flashsvd_jax.models.weights import DecoderWeights
from flashsvd_jax.prompt_steps import PromptSteps, Step
from flashsvd_jax.random_weights import random_weights
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.sampling.device import sampling_arrays
from flashsvd_jax.sequences import Requests
from pallas_kernels import prefer, record
from pallas_kernels.registry import Record


class CompiledPrompt:
    """The steps of a prompt, compiled, as `generate` sends them one after the other; called with weights, tokens, requests."""

    def __init__(self, steps: PromptSteps, compiled: dict[BackgroundStep, Any]):
        self._steps, self._compiled = steps, compiled
        self._bound: tuple[Any, PromptSteps] | None = None

    def __call__(self, weights: DecoderWeights, tokens: Any, requests: Requests) -> Step:
        if self._bound is None or self._bound[0] is not weights:
            self._bound = weights, self._steps.of(weights)
        return self._bound[1].through(self._sent, [tokens], requests, greedy=True)

    def memory_analysis(self) -> Any:
        """As of a compiled function: beside what a step needs for itself there is what one leaves to the next."""
        needed = max(step.memory_analysis().temp_size_in_bytes for step in self._compiled.values())
        left = sum(
            math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(next(iter(self._compiled.values())).out_info)
        )
        return SimpleNamespace(temp_size_in_bytes=needed + left)

    def _sent(self, step: BackgroundStep, *arguments: Any) -> Any:
        return self._compiled[step](*arguments)


@dataclasses.dataclass(frozen=True)
class LoweredPrompt:
    """The steps of a prompt, lowered."""

    steps: PromptSteps
    lowered: dict[BackgroundStep, Any]

    def compile(self) -> CompiledPrompt:
        """All of them, compiled."""
        return CompiledPrompt(self.steps, {step: lowered.compile() for step, lowered in self.lowered.items()})


def lower_prompt(config: ModelConfig, batch: int, length: int) -> tuple[LoweredPrompt, Callable[[], tuple[Any, ...]]]:
    """The pass of such prompts up to their first tokens, lowered, and what draws its arguments, random weights among them."""
    weights = jax.eval_shape(lambda: random_weights(config))

    def steps_of(step: Callable[..., Any], *given: Any, **options: Any) -> BackgroundSteps:
        return BackgroundSteps(
            jax.jit(partial(step, *given), compiler_options=prompt_options(weights.layers), **options)
        )

    greedy = sampling_arrays([SamplingParams(temperature=0.0)] * batch, (), config.vocab_size, [0] * batch)
    requests = Requests(np.full(batch, length, np.int32), np.ones(batch, np.int32), greedy)  # type: ignore[arg-type]
    steps = PromptSteps(config, weights, length, steps_of)
    lowered = steps.lower([jax.ShapeDtypeStruct((batch, length), jnp.int32)], requests)
    return LoweredPrompt(steps, lowered), lambda: (random_weights(config), np.ones((batch, length), np.int32), requests)


def main(case: PrefillCase) -> dict[str, Any]:
    """The row of a case; what follows "flashsvd_jax-" is the implementation to try first."""
    enable_persistent_cache()
    used = Record()
    with record(used), prefer(case.impl.removeprefix("flashsvd_jax").lstrip("-") or None):
        lowered, draw = lower_prompt(case.config, case.batch, case.length)
    return timed_row(case, lowered, draw, sorted(used["attend"]))


if __name__ == "__main__":
    print(json.dumps(main(PrefillCase.from_json(sys.argv[1]))), flush=True)
