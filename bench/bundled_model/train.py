"""Trains the bundled model with this project's own decoder on the token files of `train_tokenizer.py`.

A run is one or more trials that differ in weight decay alone: the corpus is small and is read many times over, so this
is the setting that decides how well the model generalizes. Of all trials and evaluations, the checkpoint with the
lowest validation loss is written; the held-out text chooses nothing and is measured on that checkpoint alone.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from model_files import save_model
from optimization import Params, Settings, batches, evaluate, initial_state, train_step

Data = dict[str, jax.Array]
SMOKE = Settings(batch_size=2, seq_len=64, peak_lr=1e-3, warmup_steps=5, eval_every=10, seed=0)
SMOKE_STEPS = 20


class Best(NamedTuple):
    """The checkpoint with the lowest validation loss so far, and where it was met."""

    params: Params
    validation_loss: float
    weight_decay: float
    step: int


def seconds_per_step(data: Data, settings: Settings, count: int = 20) -> float:
    """Compiles what a trial runs, then times `count` steps and adds an evaluation's time spread over its interval."""
    state, starts = initial_state(settings), batches(len(data["train"]), settings)
    begin = 0.0
    for index in range(count + 1):
        state, loss = train_step(state, data["train"], next(starts), jnp.float32(1), jnp.float32(0), settings)
        if index == 0:
            jax.block_until_ready((loss, evaluate(state.params, data["validation"], settings.seq_len)))
            begin = time.monotonic()
    jax.block_until_ready(state)
    stepped = time.monotonic()
    evaluate(state.params, data["validation"], settings.seq_len).block_until_ready()
    return (stepped - begin) / count + (time.monotonic() - stepped) / settings.eval_every


def run_trial(
    data: Data, decay: float, steps: int, settings: Settings, best: Best | None, deadline: float
) -> tuple[Best | None, dict[str, Any]]:
    """Trains once from scratch; returns the best checkpoint of all trials so far and this trial's history."""
    state, starts = initial_state(settings), batches(len(data["train"]), settings)
    total, history, recent = jnp.float32(steps), [], []
    for step in range(1, steps + 1):
        state, loss = train_step(state, data["train"], next(starts), total, jnp.float32(decay), settings)
        recent.append(loss)
        if step % settings.eval_every and step < steps:
            continue
        validation = float(evaluate(state.params, data["validation"], settings.seq_len))
        training = float(jnp.stack(recent).mean())
        recent.clear()
        history.append({"step": step, "train_loss": round(training, 4), "validation_loss": round(validation, 4)})
        print(f"decay {decay:g} step {step:5} train {training:.4f} validation {validation:.4f}", flush=True)
        if math.isfinite(validation) and (best is None or validation < best.validation_loss):
            best = Best(jax.device_get(state.params), validation, decay, step)
        if time.monotonic() > deadline or not math.isfinite(validation):
            break
    return best, {"weight_decay": decay, "steps_planned": steps, "steps_done": int(state.step), "history": history}


def run_facts(best: Best, data: Data, corpus: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What training.json says about the chosen checkpoint, the data and the machine, all of it measured or read."""
    loss = float(evaluate(best.params, data["heldout"], settings.seq_len))
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(best.params)),
        "settings": dataclasses.asdict(settings),
        "weight_decay": best.weight_decay,
        "step": best.step,
        "tokens_seen": best.step * settings.batch_size * settings.seq_len,
        "validation_loss": best.validation_loss,
        "heldout_loss": loss,
        "heldout_perplexity": math.exp(loss),
        "heldout_bits_per_byte": loss / math.log(2) / corpus["heldout"]["bytes_per_token"],
        "corpus": corpus,
        "device": f"{jax.devices()[0].platform} {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
    }


def train(data: Data, corpus: dict[str, Any], settings: Settings, options: argparse.Namespace) -> None:
    """Runs all trials within the time limit and writes the best checkpoint after each.

    The number of steps is lowered before the first trial where the measured speed asks for it, so that the learning
    rate always reaches zero; a machine that slows down later is caught by the deadline.
    """
    begin = time.monotonic()
    cost = seconds_per_step(data, settings)
    left = options.minutes * 60 - (time.monotonic() - begin)
    steps = max(1, min(options.steps, int(left / cost / len(options.weight_decay))))
    speed = settings.batch_size * settings.seq_len / cost
    print(f"{speed:.0f} tokens/s, {steps} steps a trial", flush=True)
    best, trials = None, []
    for decay in options.weight_decay:
        best, trial = run_trial(data, decay, steps, settings, best, deadline=begin + 1.2 * options.minutes * 60)
        trials.append(trial)
        if best is None:
            continue
        facts = run_facts(best, data, corpus, settings)
        facts |= {"wall_seconds": time.monotonic() - begin, "tokens_per_second": speed, "trials": trials}
        save_model(best.params, options.out, facts)
        found = f"validation loss {best.validation_loss:.4f}, held-out perplexity {facts['heldout_perplexity']:.3f}"
        print(f"best so far: decay {best.weight_decay:g} step {best.step}: {found}", flush=True)
    if best is None:
        raise SystemExit("no trial had a finite validation loss; lower --peak-lr")


def load_data(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the token files and corpus.json."""
    names = ("train.npy", "validation.npy", "heldout.npy", "corpus.json")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}; run train_tokenizer.py first")
    data = {part: np.load(folder / f"{part}.npy") for part in ("train", "validation", "heldout")}
    return data, json.loads((folder / "corpus.json").read_text(encoding="utf-8"))


def main() -> None:
    """Reads the options and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parent / ".work", help="token files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=60.0, help="time limit of the whole run")
    parser.add_argument("--steps", type=int, default=3000, help="steps of a trial")
    parser.add_argument("--weight-decay", type=float, nargs="+", default=[0.5], help="one trial for each value")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few small steps that show that everything runs")
    options = parser.parse_args()

    data, corpus = load_data(options.data)
    settings = Settings(
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        peak_lr=options.peak_lr,
        warmup_steps=200,
        eval_every=200,
        seed=options.seed,
    )
    if options.smoke:
        settings, options.steps = SMOKE, SMOKE_STEPS
        data = {part: ids[: 40 * SMOKE.seq_len] for part, ids in data.items()}
    train({part: jnp.asarray(ids) for part, ids in data.items()}, corpus, settings, options)


if __name__ == "__main__":
    main()
