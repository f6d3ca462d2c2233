"""The adapter's answers to lm-eval against transformers, and a whole evaluation of tasks made here."""

import importlib
import logging
import sys
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from flashsvd_jax import SamplingParams, harness
from flashsvd_jax.errors import MissingExtraError, RequestError
from flashsvd_jax.harness import FlashSVDLM, evaluate
from flashsvd_jax.model import Model

BOS = 1
LIMIT = 32
QUESTIONS = ["2+2=", "the sky is", "a\nb", "x"]
CHOICES = [" 4", " blue", " c!"]


@pytest.fixture(scope="module")
def lm(tiny: Any) -> FlashSVDLM:
    return FlashSVDLM(tiny.short, batch_size=1)


def ask(kind: Any, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, found, index) for index, found in enumerate(arguments)]


def plain(lm: FlashSVDLM, text: str) -> list[int]:
    return lm.tokenizer.encode(text, add_special_tokens=False)


def reference_loglikelihood(tiny: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logprobs, greedy = tiny.logprobs([*context, *continuation])
    return logprobs[-len(continuation) :].sum(), bool(greedy[-len(continuation) :].all())


def test_loglikelihoods_are_those_of_transformers(tiny: Any, lm: FlashSVDLM) -> None:
    best = int(tiny.reference.logits(np.array([[BOS, *plain(lm, "so")]]))[0, -1].argmax())
    pairs = [
        ("a question", " an answer"),
        ("ends in a space ", "word"),
        ("so", lm.tokenizer.decode([best])),
        ("x", "y"),
    ]
    found = lm.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        expected, expected_greedy = reference_loglikelihood(tiny, [BOS, *plain(lm, context)], plain(lm, continuation))
        if context.endswith(" "):  # lm-eval counts the space with the continuation
            ids = [BOS, *plain(lm, context + continuation)]
            expected, expected_greedy = reference_loglikelihood(tiny, ids[:-5], ids[-5:])
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy
    assert [greedy for _, greedy in found][2]


def test_without_a_context_the_start_token_is_the_context(tiny: Any, lm: FlashSVDLM) -> None:
    found = lm.loglikelihood(ask("loglikelihood", ("", "words")), disable_tqdm=True)
    assert found[0][0] == pytest.approx(reference_loglikelihood(tiny, [BOS], plain(lm, "words"))[0], abs=1e-4)


def test_a_start_token_in_the_text_is_not_doubled(lm: FlashSVDLM) -> None:
    assert lm.tok_encode("<s>ab") == lm.tok_encode("ab") == [BOS, *plain(lm, "ab")]
    assert lm.tok_encode("ab", add_special_tokens=False) == plain(lm, "ab")
    assert lm.tok_encode("<s>ab", add_special_tokens=True) == [BOS, BOS, *plain(lm, "ab")]


def test_a_context_that_does_not_fit_loses_its_start(
    tiny: Any, lm: FlashSVDLM, caplog: pytest.LogCaptureFixture
) -> None:
    context = "0123456789" * 20
    with caplog.at_level(logging.WARNING):
        found = lm.loglikelihood(ask("loglikelihood", (context, " end")), disable_tqdm=True)
    ids = [BOS, *plain(lm, context + " end")][-LIMIT - 1 :]
    assert found[0][0] == pytest.approx(reference_loglikelihood(tiny, ids[:-4], ids[-4:])[0], abs=1e-4)
    assert "1 of 1 requests do not fit max_length 32" in caplog.text


def test_a_continuation_that_does_not_fit_is_refused(lm: FlashSVDLM) -> None:
    with pytest.raises(RequestError, match="a continuation has 200 tokens"):
        lm.loglikelihood(ask("loglikelihood", ("x", "y" * 200)), disable_tqdm=True)


@pytest.mark.parametrize("length", [20, 32, 75])
def test_rolling_loglikelihood_predicts_each_token_once_after_a_full_context(
    tiny: Any, lm: FlashSVDLM, length: int
) -> None:
    text = ("rolling over a long text, " * 20)[: length - 1]
    found = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,), ("ab",)), disable_tqdm=True)
    ids = [BOS, BOS, *plain(lm, text)]  # the prefix that lm-eval adds to what the tokenizer gives
    total = 0.0
    for start in range(0, length, LIMIT):
        end = min(start + LIMIT, length)
        first = max(end - LIMIT, 0) if start else 0  # the last window is filled up with context
        total += reference_loglikelihood(tiny, ids[first : start + 1], ids[start + 1 : end + 1])[0]
    assert found[0] == pytest.approx(total, abs=2e-3)
    assert found[1] == pytest.approx(reference_loglikelihood(tiny, [BOS], [BOS, *plain(lm, "ab")])[0], abs=1e-4)


def greedy_text(tiny: Any, lm: FlashSVDLM, prompt: str, count: int) -> str:
    ids = [BOS, *plain(lm, prompt)][-(LIMIT - count) :]
    for _ in range(count):
        ids.append(int(tiny.reference.logits(np.array([ids]))[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return lm.tokenizer.decode(ids[-count:], skip_special_tokens=True)


def test_generation_is_greedy_and_ends_before_a_stop_text(tiny: Any, lm: FlashSVDLM) -> None:
    prompts = ("hello", "of this prompt only the end counts, because it is long")
    whole = [greedy_text(tiny, lm, prompt, 6) for prompt in prompts]
    stop = whole[0][2:4]
    options: dict[str, Any] = {"until": ["", stop], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}
    requests = ask("generate_until", (prompts[0], options), (prompts[1], {"max_gen_toks": 6}))
    assert lm.generate_until(requests, disable_tqdm=True) == [whole[0].split(stop)[0], whole[1]]


def test_answers_are_in_the_order_of_the_requests(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def echo(model: Model, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        calls.append([len(prompt) for prompt in prompts])
        return [SimpleNamespace(text=f"{len(p)} {o.max_tokens}") for p, o in zip(prompts, params, strict=True)]

    monkeypatch.setattr(harness, "batch_generate", echo)
    requests = [("a" * length, {"max_gen_toks": length + 1}) for length in (3, 9, 1, 6, 2)]
    found = FlashSVDLM(tiny.short, batch_size=2).generate_until(ask("generate_until", *requests), disable_tqdm=True)
    assert found == ["4 4", "10 10", "2 2", "7 7", "3 3"]
    assert calls == [[10, 7], [4, 3], [2]]


def test_sampling_options_of_a_task_are_used(lm: FlashSVDLM) -> None:
    options = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 5.0, "top_k": 50}
    seeds = (5, 5, 6)
    same, again, other = lm.generate_until(
        ask("generate_until", *[("hello", {**options, "seed": seed}) for seed in seeds]), disable_tqdm=True
    )
    assert same == again != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": 68}, "max_gen_toks leaves no room"),
        ({"max_gen_toks": 4, "num_beams": 2}, "not supported: .*num_beams"),
        ({"max_gen_toks": 4, "do_sample": True, "top_p": 3}, "top_p must be"),
    ],
)
def test_generation_options_that_cannot_be_served_are_refused(lm: FlashSVDLM, options: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        lm.generate_until(ask("generate_until", ("hello", options)), disable_tqdm=True)


def test_chat_template(lm: FlashSVDLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(messages) == "<s>u:hi\na:"
    assert lm.apply_chat_template(messages, add_generation_prompt=False) == "<s>u:hi"
    assert lm.chat_template(True) == lm.tokenizer.chat_template


def questions(**_: Any) -> dict[str, datasets.Dataset]:
    rows = [{"question": question, "label": index % len(CHOICES)} for index, question in enumerate(QUESTIONS)]
    return {"test": datasets.Dataset.from_list(rows)}


def test_evaluation_of_tasks(tiny: Any, lm: FlashSVDLM) -> None:
    common = {
        "custom_dataset": questions,
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1},
    }
    choose = {"task": "choose", "output_type": "multiple_choice", "doc_to_choice": CHOICES, "doc_to_target": "label"}
    write = {
        "task": "write", "output_type": "generate_until", "doc_to_target": "{{question}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    }  # fmt: skip
    manager = TaskManager(include_defaults=False)
    tasks = [{**common, **choose}, {**common, **write}]
    results = evaluate(tiny.short, tasks, task_manager=manager, bootstrap_iters=0, batch_size=1)
    right = 0
    for index, question in enumerate(QUESTIONS):
        context = [BOS, *plain(lm, question)]
        scores = [reference_loglikelihood(tiny, context, plain(lm, choice))[0] for choice in CHOICES]
        right += int(np.argmax(scores)) == index % len(CHOICES)
    assert results["results"]["choose"]["acc,none"] == right / len(QUESTIONS)
    written = [sample["resps"][0][0] for sample in results["samples"]["write"]]
    assert written == [greedy_text(tiny, lm, question, 6).split("\n")[0] for question in QUESTIONS]


def test_lm_eval_finds_the_model_by_name_and_loads_a_folder(tiny: Any) -> None:
    found = get_model("flashsvd").create_from_arg_string(
        f"pretrained={tiny.folder},dtype=float32,max_length=64",
        {"batch_size": "3", "device": "cuda:0", "max_batch_size": 8},
    )
    assert isinstance(found, FlashSVDLM)
    assert (found.max_length, found.batch_size, found.eot_token_id, found.prefix_token_id) == (64, 3, 2, BOS)
    assert found.tokenizer_name == str(tiny.folder).replace("/", "__")


def test_a_model_that_cannot_be_evaluated_is_refused(tiny: Any) -> None:
    with pytest.raises(RequestError, match="without a tokenizer"):
        FlashSVDLM(Model(tiny.model.config, tiny.model.weights))
    with pytest.raises(RequestError, match="batch_size must be"):
        FlashSVDLM(tiny.model, batch_size="auto:4")
    with pytest.raises(RequestError, match="when a model is loaded"):
        FlashSVDLM(tiny.model, dtype="float32")


def test_command_line_is_that_of_lm_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["lm-eval", "run", "--help"])
    with pytest.raises(SystemExit) as ended:
        harness.main()
    assert ended.value.code == 0
    assert "--model_args" in capsys.readouterr().out


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, "flashsvd_jax.harness")
    with pytest.raises(MissingExtraError, match=r"flashsvd-jax\[eval\]"):
        importlib.import_module("flashsvd_jax.harness")
