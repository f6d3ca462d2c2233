"""Jobs: cases of one model measured by one process, and how the parent starts, watches and ends that process."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from allocated import allocated_config
from case_process import ScriptProcess
from cases import Case

from flashsvd_jax.benchmark import provenance
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import first_line
from flashsvd_jax.shapes import kept_share, mixed_config, partly_dense_config, rank_layout, shape_config

HERE = Path(__file__).resolve().parent


def results_folder(device: str) -> Path:
    """Where rows of a device are kept, by the name that it gives itself."""
    return HERE / "results" / device.lower().replace(" ", "_")


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a file of them, which need not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        print(json.dumps(row), file=lines)


@dataclasses.dataclass(frozen=True)
class Job:
    """Cases of one model for one implementation.

    Attributes:
      script: path of the script that measures them, below this folder.
      variant: of the script: the ``kernels`` of an engine, or the name of a PyTorch variant.
      impl: what rows call the implementation.
      cases: all with the same weights.
      bandwidth: bytes a second that the device reads.
      deadline: seconds since the epoch after which no further case is started.
      dtype: of weights and activations.
      autotune: whether XLA tries matrix products out before it chooses them. Without, a process starts sooner, and our kernels
        decode as fast; but prompts take longer, so rows do not tell of them.
    """

    script: str
    variant: str
    impl: str
    cases: tuple[Case, ...]
    bandwidth: float
    deadline: float
    dtype: str = "bfloat16"
    autotune: bool = True

    def to_json(self) -> str:
        """For the command line of the process that measures it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """What `to_json` wrote."""
        fields = json.loads(text)
        cases = tuple(Case(**{**case, "peers": tuple(case["peers"])}) for case in fields.pop("cases"))
        return cls(**fields, cases=cases)


def config_of(case: Case) -> ModelConfig:
    """The model of a case."""
    build = {"mixed": mixed_config, "partly dense": partly_dense_config, "allocated": allocated_config}
    build |= {"allocated alike": partial(allocated_config, alike=True)}
    return build.get(case.ranks, shape_config)(case.model, case.ratio)


def ranks_told(case: Case, config: ModelConfig) -> str:
    """The ``ranks`` of a case's rows: how they are spread, or that they were chosen by time."""
    return case.ranks if case.ranks.startswith("allocated") else rank_layout(config)


def described(job: Job, case: Case) -> dict[str, Any]:
    """The keys that say what a row is of, for implementations that are not ours and for failures."""
    config = config_of(case)
    return {
        "suite": case.suite, "impl": job.impl, "model": case.model, "ratio": kept_share(config),
        "ranks": ranks_told(case, config), "dtype": job.dtype, "batch": case.batch, "context": case.context,
        "new_tokens": case.new_tokens, **provenance(),
    }  # fmt: skip


def serve(job: Job, measure: Callable[[Case], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Inside the process: a row for each case begun before the deadline; one that fails gives a row with an `error`."""
    for case in job.cases:
        if time.time() > job.deadline:
            return
        try:
            row = measure(case)
        except Exception as error:  # whatever stops one case, the others are still worth measuring
            row = {**described(job, case), "error": f"{type(error).__name__}: {first_line(error)}"[:300]}
        yield row


class JobProcess(ScriptProcess):
    """The process of a job."""

    def __init__(self, job: Job, env: Mapping[str, str]):
        super().__init__(HERE / job.script, job.to_json(), env)
        self._job = job

    def rows(self, limit: float) -> Iterator[dict[str, Any]]:
        """Its rows as they come.

        A case that takes longer than ``limit`` seconds is the end; it, or the case during which the process died, gives a row with
        an `error`, and so does every later case of the job.
        """
        done = 0
        for row in super().rows(limit):
            done += 1
            yield row
        if self.failure:
            for case in self._job.cases[done:]:
                yield {**described(self._job, case), "error": self.failure}
