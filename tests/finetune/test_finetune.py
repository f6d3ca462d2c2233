"""Training of factors: gradients are PyTorch's, the loss falls, the layout stays, and an interruption does no harm."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import reference
from torch import nn

from flashsvd_jax import bundled
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.cli import main
from flashsvd_jax.errors import CheckpointError, RequestError
from flashsvd_jax.finetune import Settings, finetune
from flashsvd_jax.finetune.objective import mean_loss
from flashsvd_jax.finetune.text_windows import TextWindows
from flashsvd_jax.finetune.trained import factor_names, initial, merged
from flashsvd_jax.inspection import inspect
from flashsvd_jax.schema import flatten
from flashsvd_jax.tokenizer import Tokenizer

TEXT = bundled.CALIBRATION.read_text(encoding="utf-8")[:4000]
SETTINGS = Settings(steps=12, batch=2, length=24, lr=3e-3, dtype="float32", seed=1, save_every=4)


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with open_folder(folder) as opened:
        return {name: opened.get(name) for name in opened.stored_names()}


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def parts(compressed: Any, lora: int | None) -> tuple[Any, Any, Any]:
    flat = flatten(compressed.reference.params)
    trained = initial(compressed.reference.config, flat.__getitem__, lora, 0)
    return flat, trained, {name: jnp.asarray(array) for name, array in flat.items() if name not in trained}


TOKENS = np.random.default_rng(0).integers(3, 4096, (2, 19)).astype(np.int32)


def test_loss_and_gradients_are_those_of_pytorch(compressed: Any) -> None:
    _, trained, frozen = parts(compressed, None)
    config, model = compressed.reference.config, compressed.reference.model
    value, gradients = jax.value_and_grad(mean_loss, 1)(config, trained, frozen, TOKENS, jnp.float32)
    tokens = torch.tensor(TOKENS).long()
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    names = {n: p for n, p in model.named_parameters() if ".0.weight" in n or ".1.weight" in n}
    expected = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    assert len(expected) == len(gradients) == len(factor_names(config)) > 20
    for name, gradient in expected.items():
        site, number, _ = name.removeprefix("model.").replace("layers.", "layers_", 1).rsplit(".", 2)
        ours = gradients[f"{site}.{'down' if number == '0' else 'up'}"]
        np.testing.assert_allclose(ours, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-8)


@pytest.mark.parametrize("architecture", ["gemma3", "opt", "gpt2"])
def test_the_loss_of_models_whose_embedding_is_more_than_a_row(architecture: str) -> None:
    ref = reference(architecture, factorized=True)
    model, config = ref.model, ref.config
    tokens = torch.tensor(TOKENS % config.vocab_size).long()
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    frozen = {name: jnp.asarray(array) for name, array in flatten(ref.params).items()}
    value = mean_loss(config, {}, frozen, jnp.asarray(tokens.numpy(), jnp.int32), jnp.float32)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)


def test_the_loss_is_float32_where_weights_are_not(compressed: Any) -> None:
    _, trained, frozen = parts(compressed, None)
    config = compressed.reference.config
    value, expected = (mean_loss(config, trained, frozen, TOKENS, jnp.dtype(name)) for name in ("bfloat16", "float32"))
    assert value.dtype == jnp.float32
    assert float(expected) != float(value) == pytest.approx(float(expected), rel=2e-2)


def test_adapters_begin_at_nothing_and_their_gradients_are_products_with_the_factors_own(compressed: Any) -> None:
    flat, adapters, frozen = parts(compressed, 3)
    _, factors, rest = parts(compressed, None)
    config = compressed.reference.config
    value, found = jax.value_and_grad(mean_loss, 1)(config, adapters, frozen, TOKENS, jnp.float32)
    expected, whole = jax.value_and_grad(mean_loss, 1)(config, factors, rest, TOKENS, jnp.float32)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for name in factor_names(config):
        assert np.array_equal(merged(name, jnp.asarray(flat[name]), adapters), flat[name])
        product = whole[name] @ adapters[f"{name}.lora_a"].T
        scale = float(jnp.abs(product).max())
        np.testing.assert_allclose(found[f"{name}.lora_b"], product, rtol=1e-3, atol=1e-4 * scale)
        assert not found[f"{name}.lora_a"].any()


def test_a_layers_activations_are_computed_again_on_the_way_back(compressed: Any) -> None:
    """Else what is kept grows with all that a layer computes: here gates, for one."""
    _, trained, frozen = parts(compressed, None)
    config = compressed.reference.config
    _, residuals = jax.eval_shape(
        lambda t: jax.vjp(lambda t: mean_loss(config, t, frozen, TOKENS, jnp.float32), t), trained
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(residuals)]
    assert (2, 18, config.hidden_size) in shapes
    assert not any(shape[-1:] == (config.intermediate_size,) and len(shape) == 3 for shape in shapes)


@pytest.mark.parametrize("lora", [None, 4])
def test_the_loss_falls_and_the_layout_stays(lora: int | None, compressed: Any, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, steps=40, lora=lora, lr=1e-2)
    losses = finetune(compressed.folder, tmp_path / "out", TEXT, settings, text_name="mine.txt", progress=False)
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.5
    before, after = inspect(compressed.folder), inspect(tmp_path / "out")
    assert after.sites == before.sites and after.params == before.params and after.dtype == before.dtype
    assert after.notes[:-1] == before.notes
    assert after.notes[-1].startswith("adapters of rank 4 on the factors" if lora else "factors trained for 40 steps")
    assert "on mine.txt" in after.notes[-1] and f"to {np.mean(losses[-2:]):.4f}" in after.notes[-1]
    old, new = arrays(compressed.folder), arrays(tmp_path / "out")
    for name in old:
        changed = name in factor_names(compressed.reference.config)
        assert np.array_equal(old[name], new[name]) != changed, name
    config, tokenizer = compressed.reference.config, Tokenizer(tmp_path / "out")
    last = TextWindows(TEXT, "text", tokenizer, config, settings).batch(39)
    written = mean_loss(config, {}, {name: jnp.asarray(array) for name, array in new.items()}, last, jnp.float32)
    assert float(written) == pytest.approx(
        losses[-1], abs=0.01
    )  # what is written is what was trained; the last steps are small


def test_windows_are_read_once_in_each_pass_and_the_seed_orders_them(compressed: Any) -> None:
    tokenizer, config = Tokenizer(compressed.folder), compressed.reference.config
    windows = TextWindows(TEXT, "text", tokenizer, config, SETTINGS)
    ids = tokenizer.encode(TEXT)
    steps = (len(ids) - 1) // 24 // 2
    passes = [[tuple(row) for step in range(n * steps, (n + 1) * steps) for row in windows.batch(step)] for n in (0, 1)]
    for rows in passes:
        assert len(set(rows)) == 2 * steps
        starts = [next(s for s in range(0, len(ids), 24) if tuple(ids[s : s + 25]) == row) for row in rows]
        assert starts != sorted(starts)
    assert passes[0] != passes[1]
    other = TextWindows(TEXT, "text", tokenizer, config, dataclasses.replace(SETTINGS, seed=2))
    assert not np.array_equal(other.batch(0), windows.batch(0))
    assert np.array_equal(TextWindows(TEXT, "text", tokenizer, config, SETTINGS).batch(7), windows.batch(7))


@pytest.mark.parametrize("lora", [None, 4])
def test_an_interrupted_run_goes_on_from_its_last_state(
    lora: int | None, compressed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS, lora=lora)
    expected = finetune(compressed.folder, tmp_path / "whole", TEXT, settings, progress=False)
    whole, read = TextWindows.batch, []

    def batch(self: TextWindows, step: int) -> np.ndarray:
        read.append(step)
        if step == 6 and len(read) == 7:
            raise KeyboardInterrupt
        return whole(self, step)

    monkeypatch.setattr(TextWindows, "batch", batch)
    with pytest.raises(KeyboardInterrupt):
        finetune(compressed.folder, tmp_path / "out", TEXT, settings, resume=True, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.finetune", "whole"]
    with pytest.raises(CheckpointError, match=r"of other work \(lr was 0\.003, now 0\.004"):
        other = dataclasses.replace(settings, lr=4e-3)
        finetune(compressed.folder, tmp_path / "out", TEXT, other, resume=True, progress=False)
    read.clear()
    losses = finetune(compressed.folder, tmp_path / "out", TEXT, settings, resume=True, progress=False)
    assert read == list(range(4, 12))
    assert losses == expected
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_killed_run_leaves_no_model_and_the_next_goes_on(compressed: Any, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT, encoding="utf-8")
    script = """
        import sys
        from flashsvd_jax.cli import main
        sys.exit(main(["finetune", *sys.argv[1:], "--batch", "2", "--length", "24", "--dtype", "float32", "--quiet",
                       "--steps", "100000", "--save-every", "2", "--resume"]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(compressed.folder), str(out), "--text", str(text)]
    with subprocess.Popen(command, env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}) as process:
        while not (tmp_path / ".out.finetune" / "state.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == [
        ".out.finetune", "text.txt",
    ]  # fmt: skip
    state = tmp_path / ".out.finetune" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    settings = Settings(steps=100000, batch=2, length=24, dtype="float32", save_every=2)
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged"):
        finetune(compressed.folder, out, TEXT, settings, resume=True, progress=False)


def test_the_command(compressed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    begin = ["finetune", str(compressed.folder), str(tmp_path / "out"), "--text", str(text)]
    options = ["--steps", "3", "--batch", "2", "--length", "24", "--dtype", "float32"]
    assert main([*begin, *options]) == 0
    assert capsys.readouterr().out.startswith("loss ")
    assert "in float32, seed 0 on text.txt" in inspect(tmp_path / "out").notes[-1]
    assert main([*begin, *options]) == 1
    assert "out already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"lora": 0}, "lora must be at least 1, not 0"),
        ({"lr": float("nan")}, "lr must be above 0, not nan"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**63}, "seed must be from 0"),
        ({"length": 65}, "length must be from 2 to 64, the model's limit, not 65"),
        ({"batch": 5000}, r"text has \d+ tokens; a step reads 120001: give a longer text"),
        ({"lr": 1e30}, "the loss is not finite at step"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    change: dict[str, Any], message: str, compressed: Any, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        finetune(compressed.folder, tmp_path / "out", TEXT, dataclasses.replace(SETTINGS, **change), progress=False)
    assert not list(tmp_path.iterdir())
