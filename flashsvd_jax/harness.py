"""Evaluation with lm-eval: this project's models as its model "flashsvd".

    results = flashsvd_jax.harness.evaluate(model, ["arc_easy", "wikitext"], limit=100)
    print(lm_eval.utils.make_table(results))

lm-eval finds models among its own modules alone, so its command line is started through this one, which adds ours:

    python -m flashsvd_jax.harness run --model flashsvd --model_args pretrained=FOLDER --batch_size auto --tasks arc_easy
"""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashsvd_jax.errors import MissingExtraError, RequestError
from flashsvd_jax.generation import batch_generate
from flashsvd_jax.model import Model, load
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.scoring import score

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingExtraError("evaluation", "lm-eval", "eval") from error

_log = logging.getLogger(__name__)
_GENERATE_BATCH = 8


def evaluate(
    model: Model | str | Path, tasks: Sequence[Any], *, batch_size: int | str = "auto", **options: Any
) -> dict[str, Any]:
    """Runs lm-eval tasks on a model.

    Args:
      model: from `load`, or what `load` takes.
      tasks: names, or whatever else `lm_eval.simple_evaluate` takes.
      batch_size: sequences computed together; "auto" chooses.
      options: further arguments of `lm_eval.simple_evaluate`, such as ``num_fewshot``, ``limit`` or ``task_manager``.

    Returns:
      lm-eval's dictionary: a task's metrics are in ``["results"][task]``; ``lm_eval.utils.make_table`` prints them.
    """
    results = simple_evaluate(
        model=FlashSVDLM(model, batch_size=batch_size), tasks=list(tasks), batch_size=batch_size, **options
    )
    assert results is not None  # None is for processes of a distributed run that are not the first
    return dict(results)


class FlashSVDLM(TemplateLM):
    """A model as lm-eval sees it.

    Args:
      pretrained: a loaded model, or what `load` takes.
      dtype, max_length: as for `load`; not for a model that is loaded already.
      batch_size: sequences computed together; "auto" chooses.
      max_batch_size, device: ignored. lm-eval's command line always names a device; here it is JAX's default one.
    """

    def __init__(
        self,
        pretrained: Model | str | Path,
        dtype: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if isinstance(pretrained, Model):
            if dtype is not None or max_length is not None:
                raise RequestError("dtype and max_length are chosen when a model is loaded, not after")
            self.model = pretrained
        else:
            self.model = load(pretrained, dtype=dtype, max_length=max_length)
        if self.model.tokenizer is None:
            raise RequestError("this model was made without a tokenizer; evaluation needs one")
        self.tokenizer: Any = self.model.tokenizer.hf
        if batch_size != "auto" and not (str(batch_size).isdecimal() and int(batch_size) > 0):
            raise RequestError(f"batch_size must be a number above 0 or 'auto', not {batch_size!r}")
        self.batch_size = None if batch_size == "auto" else int(batch_size)

    @property
    def eot_token_id(self) -> int:
        ends = self.model.config.eos_token_ids
        if self.tokenizer.eos_token_id is None and not ends:
            raise RequestError("the tokenizer has no end token, after which texts without a context are scored")
        return ends[0] if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is scored after."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        return self.model.max_length

    @property
    def max_gen_toks(self) -> int:
        """Length of completions where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without ``add_generation_prompt`` its last message is there to be continued."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; unless told, with the special tokens of the start, if the text does not have them already."""
        if add_special_tokens is None:
            start = self.tokenizer.bos_token
            add_special_tokens = not (start and string.startswith(start))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation after its context."""
        for _, _, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise RequestError(f"a continuation has {len(continuation)} tokens, not from 1 to {self.max_length}")
        whole = [[*context, *continuation] for _, context, continuation in requests]
        self._warn_of_cut([len(ids) - 1 for ids in whole], self.max_length)
        sequences = [ids[-self.max_length - 1 :] for ids in whole]
        scores = score(self.model, sequences, batch=self.batch_size, progress=not disable_tqdm)
        results = []
        for (_, _, continuation), found in zip(requests, scores, strict=True):
            tail = slice(-len(continuation), None)
            results.append((float(found.logprobs[tail].sum(dtype="float64")), bool(found.greedy[tail].all())))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token after as much context as fits."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.arguments[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, context, text) for context, text in map(make_disjoint_window, pairs)]
            counts.append(len(windows) - before)
        values = iter(value for value, _ in self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        return [sum(itertools.islice(values, count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions up to a task's stop texts, greedy unless it asks for sampling."""
        prompts = [self.tok_encode(request.arguments[0]) for request in requests]
        params = [_sampling_params(request.arguments[1], self.max_gen_toks) for request in requests]
        rooms = [self.max_length - (p.max_tokens or 0) for p in params]
        if any(room < 1 for room in rooms):
            raise RequestError(f"max_gen_toks leaves no room for a prompt: raise max_length, it is {self.max_length}")
        self._warn_of_cut([len(prompt) for prompt in prompts], min(rooms, default=0))
        # Prompts of like lengths together, so that little is computed on padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        texts: dict[int, str] = {}
        with progress_bar("generating", total=len(order), unit=" requests", enabled=not disable_tqdm) as bar:
            for chunk in itertools.batched(order, self.batch_size or _GENERATE_BATCH):
                cut = [prompts[i][-rooms[i] :] for i in chunk]
                found = batch_generate(self.model, cut, [params[i] for i in chunk])
                texts |= {i: completion.text for i, completion in zip(chunk, found, strict=True)}
                bar.update(len(chunk))
        return [texts[i] for i in range(len(prompts))]

    def _warn_of_cut(self, lengths: list[int], limit: int) -> None:
        longer = sum(length > limit for length in lengths)
        if longer:
            _log.warning(
                "%d of %d requests do not fit max_length %d: cut at their start", longer, len(lengths), self.max_length
            )


register_model("flashsvd")(FlashSVDLM)


def _sampling_params(options: dict[str, Any], max_gen_toks: int) -> SamplingParams:
    """SamplingParams of a task's generation options."""
    given: dict[str, Any] = dict(normalize_gen_kwargs(options, max_gen_toks))
    samples = given.pop("do_sample")
    given.setdefault("temperature", 1.0 if samples else 0.0)
    stop = tuple(text for text in given.pop("until") if text)
    try:
        return SamplingParams(stop=stop, max_tokens=given.pop("max_gen_toks"), **given)
    except TypeError as error:
        raise RequestError(f"the task's generation options are not supported: {error}") from error


def main() -> None:
    """lm-eval's command line, with the model "flashsvd"."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
