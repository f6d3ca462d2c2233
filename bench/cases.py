"""What the decode benchmark measures, as data, in order of importance."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

ALL_PEERS = ("layer-graph", "eager", "whole-graph", "compile")
# Compiling 32 layers takes PyTorch about a minute, so that peer runs only where a table or plot needs it.
QUICK_PEERS = ("layer-graph", "eager", "whole-graph")


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement, made with our kernels, with plain XLA and with the PyTorch variants that ``peers`` names.

    ``group`` is the name that ``--cases`` takes; ``ranks`` is "uniform", "mixed" or "partly dense" (see
    `flashsvd_jax.shapes`), or "allocated" and "allocated alike" (see `allocated`).
    """

    group: str
    model: str
    ratio: float
    batch: int = 1
    context: int = 512
    new_tokens: int = 64
    repeats: int = 3
    ranks: str = "uniform"
    peers: tuple[str, ...] = ALL_PEERS

    @property
    def suite(self) -> str:
        """The ``suite`` of its rows."""
        return "end-to-end" if self.group == "end-to-end" else "decode"

    @property
    def weights(self) -> tuple[str, float, str]:
        """What decides the weights: cases that share it can share a process."""
        return self.model, self.ratio, self.ranks

    def __str__(self) -> str:
        kept = "dense" if self.ratio == 1 else f"{self.ratio:g} {self.ranks}"
        return f"{self.group}: {self.model} {kept}, batch {self.batch}, context {self.context}"


LLAMA = "llama-2-7b"

CASES: tuple[Case, ...] = (
    Case("core", LLAMA, 0.5, repeats=5),
    Case("end-to-end", LLAMA, 0.5, new_tokens=32, repeats=5),
    Case("ratios", LLAMA, 1.0),
    Case("ratios", LLAMA, 0.6),
    Case("ratios", LLAMA, 0.8),
    Case("ratios", LLAMA, 0.4),
    Case("gqa", "llama-3.1-8b", 0.6),
    Case("batch", LLAMA, 0.5, batch=8),
    Case("batch", LLAMA, 0.5, batch=2, peers=QUICK_PEERS),
    Case("batch", LLAMA, 0.5, batch=4, peers=QUICK_PEERS),
    Case("batch", LLAMA, 0.5, batch=32, peers=QUICK_PEERS),
    Case("context", LLAMA, 0.5, context=4096),
    Case("context", LLAMA, 0.5, context=16384, repeats=2, peers=QUICK_PEERS),
    Case("context", LLAMA, 0.5, batch=8, context=4096, peers=QUICK_PEERS),
    Case("context", LLAMA, 0.5, batch=8, context=16384, repeats=2, peers=QUICK_PEERS),
    Case("mixed", LLAMA, 0.5, ranks="mixed", peers=QUICK_PEERS),
    Case("mixed", LLAMA, 0.5, ranks="partly dense", peers=QUICK_PEERS),
    # Beside uniform ranks of the same parameters: those of "core" and "ratios".
    *(Case("allocated", LLAMA, ratio, ranks="allocated alike", peers=()) for ratio in (0.5, 0.4, 0.6, 0.8)),
    *(Case("allocated", LLAMA, ratio, ranks="allocated", peers=()) for ratio in (0.5, 0.6)),
)

GROUPS = tuple(dict.fromkeys(case.group for case in CASES))


def tiny(cases: Iterable[Case]) -> list[Case]:
    """The same cases of a model that a CPU runs in seconds, contexts short and batches small, with `eager` alone beside ours.

    Mixed ranks stand for those chosen by time: a model so small is fastest dense.
    """
    return [
        dataclasses.replace(
            case,
            model="tiny",
            batch=min(case.batch, 4),
            context=case.context // 32,
            new_tokens=8,
            repeats=1,
            ranks="mixed" if case.group == "allocated" else case.ranks,
            peers=("eager",),
        )
        for case in cases
    ]


def processes(cases: Sequence[Case]) -> list[list[Case]]:
    """Neighbouring cases of the same weights, which one process measures one after the other."""
    return [list(group) for _, group in itertools.groupby(cases, key=lambda case: case.weights)]
