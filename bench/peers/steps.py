"""The ways to run a decode step that users of PyTorch have: each takes a model and gives a function of token and position.

A step takes the last tokens int64 [batch, 1] and their position int64 [1], and returns the next tokens [batch, 1]. The model
writes its cache in place, so a step must be built before a prompt is processed: recording a CUDA graph runs it.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peers.model import PeerModel

Step = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a step is built, and whether its model packs projections of one input."""

    build: Callable[[PeerModel], Step]
    is_packed: bool


def greedy(logits: Tensor) -> Tensor:
    """The most likely tokens [batch, 1] of logits [batch, vocab]."""
    return logits.argmax(-1, keepdim=True)


def eager(model: PeerModel) -> Step:
    """One call a module: how published SVD checkpoints are run."""
    return lambda token, position: greedy(model.decode(token, position))


def compiled(model: PeerModel) -> Step:
    """The same under torch.compile, kernels fused and replayed as CUDA graphs."""
    step = torch.compile(eager(model), mode="reduce-overhead", fullgraph=True)
    # The graph's output buffer is written again by the next step, which reads this one.
    return lambda token, position: step(token, position).clone()


def layer_graph(model: PeerModel) -> Step:
    """One CUDA graph a layer, with a copy in and a copy out, and all between layers eager: FlashSVD v1.5's production path,
    written again for this comparison."""
    token, position = _inputs(model)
    x_in = torch.zeros_like(F.embedding(token, model.embedding))
    cos, sin, mask = (table.clone() for table in model.tables(position))
    replays = [
        record(lambda layer=layer: layer(x_in, position, cos, sin, mask), x_in.is_cuda) for layer in model.layers
    ]

    def step(new_token: Tensor, new_position: Tensor) -> Tensor:
        position.copy_(new_position)
        for table, new in zip((cos, sin, mask), model.tables(new_position), strict=True):
            table.copy_(new)
        x = F.embedding(new_token, model.embedding)
        for replay in replays:
            x_in.copy_(x)
            x = replay().clone()
        return greedy(model.logits(x))

    return step


def whole_graph(model: PeerModel) -> Step:
    """The whole step in one CUDA graph."""
    token, position = _inputs(model)
    replay = record(lambda: greedy(model.decode(token, position)), token.is_cuda)

    def step(new_token: Tensor, new_position: Tensor) -> Tensor:
        token.copy_(new_token)
        position.copy_(new_position)
        return replay().clone()

    return step


VARIANTS = {
    "eager": Variant(eager, is_packed=False),
    "compile": Variant(compiled, is_packed=False),
    "layer-graph": Variant(layer_graph, is_packed=True),
    "whole-graph": Variant(whole_graph, is_packed=True),
}


def record(run: Callable[[], Tensor], is_cuda: bool) -> Callable[[], Tensor]:
    """A function that replays ``run`` as a CUDA graph and returns its output tensor; without a GPU, ``run`` itself."""
    if not is_cuda:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries allocate their workspaces in first calls, which a graph cannot hold
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _inputs(model: PeerModel) -> tuple[Tensor, Tensor]:
    """The tensors that a graph reads its token and position from."""
    device = model.embedding.device
    return torch.zeros(model.batch, 1, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long, device=device)
