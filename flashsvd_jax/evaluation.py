"""What a compressed model is worth: its perplexity of a text and its scores in lm-eval's tasks, beside its size."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from flashsvd_jax.benchmark import bytes_per_token, provenance
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.errors import FlashSVDError, RequestError, first_line
from flashsvd_jax.hub import resolve_model
from flashsvd_jax.model import Model, load
from flashsvd_jax.schema import count_params
from flashsvd_jax.scoring import Perplexity, perplexity
from flashsvd_jax.shapes import kept_share

_STANDARD_ERROR = "_stderr"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model.

    Attributes:
      model: its name; family: how it was compressed; notes: how it was made.
      kept: share of the layers' parameters, 1 for a dense model.
      params: numbers stored; weight_bytes: read to decode one token, apart from keys and values.
      dtype: that it was computed in.
      text: name of the text; text_sha256: of its content.
      perplexity: of that text, with its error; None where no text was given.
      tasks: lm-eval's metrics by task.
    """

    model: str
    family: str
    notes: tuple[str, ...]
    kept: float
    params: int
    weight_bytes: int
    dtype: str
    text: str | None = None
    text_sha256: str | None = None
    perplexity: Perplexity | None = None
    tasks: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """One line, without the single tokens' losses; with what it was computed on, and when."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found = fields.pop("perplexity")
        if found is not None:
            names = ("standard_error", "tokens", "windows", "window")
            values = {"perplexity": found.value, **{name: getattr(found, name) for name in names}}
            # JSON has no infinity, which a broken model's perplexity may be.
            fields |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        return json.dumps(fields | device | provenance())


def evaluate(
    path_or_hub_id: str | Path, *, text: str | None = None, text_name: str = "text", window: int | None = None,
    batch: int | None = None, tasks: Sequence[str] = (), task_folder: str | Path | None = None,
    limit: int | None = None, num_fewshot: int | None = None, progress: bool = True, **loading: Any,
) -> Evaluation:  # fmt: skip
    """Loads a model and measures it.

    Args:
      path_or_hub_id: a folder that `convert`, `compress` or `finetune` wrote, or the hub id of one.
      text: what the perplexity is of; see `flashsvd_jax.scoring.perplexity` for how.
      text_name: what the result calls it.
      window: tokens of a window; by default 2048, or the model's limit.
      batch: sequences computed together; by memory if not given.
      tasks: lm-eval's names of tasks; they need the extra "eval".
      task_folder: where tasks of one's own are described, as lm-eval's YAML.
      limit: examples of each task; all if not given.
      num_fewshot: examples shown before each question, where a task leaves that open.
      progress: show bars for what takes more than two seconds.
      loading: further arguments of `load`.

    Raises:
      FlashSVDError: the model, the text or a task cannot be used.
    """
    manager = _task_manager(tasks, task_folder) if tasks else None  # before anything takes time
    path = resolve_model(path_or_hub_id)
    model = load(path, progress=progress, **loading)
    with open_folder(path) as folder:
        manifest = folder.manifest
    found, scores = None, {}
    if text is not None:
        found = perplexity(model, text, window=window, batch=batch, progress=progress)
    if tasks:
        options = {"batch_size": batch or "auto", "limit": limit, "num_fewshot": num_fewshot, "task_manager": manager}
        scores = _run_tasks(model, tasks, options)
    return Evaluation(
        model=Path(path_or_hub_id).name,
        family=manifest.family,
        notes=manifest.notes,
        kept=kept_share(model.config),
        params=count_params(model.config),
        weight_bytes=bytes_per_token(model.config, model.weights, 1, 0),
        dtype=model.weights.embedding.dtype.name,
        text=None if text is None else text_name,
        text_sha256=None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        perplexity=found,
        tasks=scores,
    )


def _task_manager(tasks: Sequence[str], folder: str | Path | None) -> Any:
    """What finds lm-eval's tasks by name.

    Raises:
      RequestError: a name that it does not know.
    """
    from lm_eval.tasks import TaskManager

    import flashsvd_jax.harness  # noqa: F401 - says which extra is missing, if it is

    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise RequestError(f"lm-eval has no task named {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    return manager


def _run_tasks(model: Model, tasks: Sequence[str], options: dict[str, Any]) -> dict[str, dict[str, float]]:
    from flashsvd_jax import harness

    try:
        results = harness.evaluate(model, tasks, **options)["results"]
    except FlashSVDError:
        raise
    except Exception as error:  # whatever lm-eval and the libraries that fetch its data raise
        raise RequestError(f"lm-eval cannot run {', '.join(tasks)}: {first_line(error)}") from error
    return {task: _metrics(found) for task, found in results.items()}


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a task: "acc", "acc_stderr" and the like; the name of a filter only where it is not "none"."""
    numbers = {name: value for name, value in result.items() if isinstance(value, float)}
    return {name.removesuffix(",none"): value for name, value in numbers.items()}


def table(evaluations: Sequence[Evaluation]) -> str:
    """A comparison in Markdown; perplexities also as multiples of the first one, with the error of the ratio."""
    first = evaluations[0]
    metrics = list(
        dict.fromkeys((t, m) for e in evaluations for t, found in e.tasks.items() for m in found if _shown(m))
    )
    head = ["model", "family", "kept", "parameters", "MiB a token"]
    if first.perplexity is not None:
        head += ["perplexity", f"of {first.model}'s"]
    lines = []
    for evaluation in evaluations:
        size = f"{evaluation.weight_bytes / 2**20:.1f}"
        cells = [evaluation.model, evaluation.family, f"{evaluation.kept:.2f}", f"{evaluation.params:,}", size]
        if evaluation.perplexity is not None and first.perplexity is not None:
            found = evaluation.perplexity
            cells += [f"{found.value:.2f} ± {found.standard_error:.2f}", _ratio(found, first.perplexity)]
        lines.append([*cells, *(_score(evaluation.tasks.get(task, {}), metric) for task, metric in metrics)])
    rows = [[*head, *(f"{task} {metric}" for task, metric in metrics)], ["---"] * (len(head) + len(metrics)), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _ratio(found: Perplexity, first: Perplexity) -> str:
    if found is first:
        return "1"
    if [len(loss) for loss in found.losses] != [len(loss) for loss in first.losses]:
        return "other tokens"  # of another tokenizer, or another limit: perplexities of tokens do not compare
    value, error = found.over(first)
    return f"{value:.3f} ± {error:.3f}"


def _shown(metric: str) -> bool:
    return _STANDARD_ERROR not in metric


def _score(metrics: dict[str, float], metric: str) -> str:
    if metric not in metrics:
        return "-"
    name, comma, rest = metric.partition(",")
    error = metrics.get(f"{name}{_STANDARD_ERROR}{comma}{rest}")
    return f"{metrics[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")
