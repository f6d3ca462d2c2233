"""Converted checkpoints of every family against the PyTorch modules they were saved from."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_modules import ABLinear, compress, compress_in_blocks
from folder_logits import folder_logits
from published_checkpoints import CASES, ROPE, base_model, hf_config, save_safetensors, state_dict, write_config
from torch import nn

from converters import convert
from converters.naming import torch_name
from flashsvd_jax.checkpoint import ModelFolder, load_params, open_folder
from flashsvd_jax.schema import Site, count_params, sites

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 19)).astype(np.int32)
ATTENTION = "model.layers.0.self_attn"
NARROW = ("eigen_attention", "modegpt")  # biases of keys went through another factor


def torch_projection(model: nn.Module, module: str, x: np.ndarray) -> np.ndarray:
    """What the source makes of x by its own forward pass; SVD-LLM's blocks have methods in place of modules, others `project`."""
    parent, _, leaf = module.rpartition(".")
    block = model.get_submodule(parent)
    with torch.no_grad():
        if hasattr(block, "project"):
            return block.project(leaf, torch.from_numpy(x)).numpy()
        return getattr(block, leaf)(torch.from_numpy(x)).numpy()


def torch_logits(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def projection(folder: ModelFolder, site: Site, x: np.ndarray) -> np.ndarray:
    for part in ("weight",) if folder.config.factorization.rank(site.name) is None else ("down", "up"):
        weight = folder.get(f"{site.name}.{part}")
        groups = weight.shape[0] if weight.ndim == 3 else 1
        shares = zip(np.split(x, groups, axis=1), weight.reshape(groups, -1, weight.shape[-1]), strict=True)
        x = np.concatenate([share @ block.T for share, block in shares], axis=1)
    return x + folder.get(f"{site.name}.bias") if site.has_bias else x


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


def stored(path: Path) -> dict[str, np.ndarray]:
    with open_folder(path) as folder:
        return {name: folder.get(name) for name in folder.stored_names()}


@pytest.mark.parametrize("case", CASES)
def test_every_site_is_the_source_modules_own_forward(case: str, converted) -> None:
    result, rng = converted(case), np.random.default_rng(1)
    with open_folder(result.path) as folder:
        for site in sites(folder.config):
            # Unit vectors show every element of the product, zero shows the bias.
            x = np.vstack([np.zeros(site.d_in), np.eye(site.d_in), rng.standard_normal((5, site.d_in))]).astype(
                np.float32
            )
            want = torch_projection(result.source.model, torch_name(site.name), x)
            assert_close(projection(folder, site, x), want)
            bias = folder.get(f"{site.name}.bias") if site.has_bias else np.zeros(site.d_out)
            np.testing.assert_allclose(bias, want[0], rtol=1e-6, atol=1e-6 if case in NARROW else 0)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_source_model(case: str, converted) -> None:
    result = converted(case)
    np.testing.assert_allclose(folder_logits(result.path, TOKENS), torch_logits(result.source.model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_family_ranks_and_sizes_are_reported_and_recorded(case: str, converted) -> None:
    result = converted(case)
    report, arrays = result.report, stored(result.path)
    assert report.family == result.source.family
    assert {torch_name(site): rank for site, rank in report.config.factorization.ranks} == result.source.ranks
    with open_folder(result.path) as folder:
        assert folder.config == report.config
        assert (folder.manifest.family, folder.manifest.notes) == (report.family, report.notes)
    assert report.params == sum(array.size for array in arrays.values())
    assert report.params_dense == count_params(report.config.dense())
    assert report.nbytes == sum(array.nbytes for array in arrays.values())
    assert {array.dtype.name for array in arrays.values()} == {report.dtype} == {"float32"}


def test_configuration_is_the_base_models_without_what_the_family_added(converted) -> None:
    for case in ("lowrankarena-qwen3", "asvd", "dobi", "svdllm-hf", "lems"):
        result = converted(case)
        with open_folder(result.path) as folder:
            hf = folder.hf_config
        original = hf_config(result.source.model)
        assert hf["model_type"] == original["model_type"]
        assert {key: original[key] for key in hf if key not in ("architectures", "model_type")}.items() <= hf.items()
        assert hf.get("architectures") in (None, original["architectures"])


def test_source_files_and_base_model_are_recorded(converted) -> None:
    with open_folder(converted("lems").path) as folder:
        assert folder.manifest.base_model == "somebody/tiny-qwen2"
        (file,) = folder.manifest.sources
    weights = converted("lems").source.path / "model.safetensors"
    assert (file.name, file.bytes) == (weights.name, weights.stat().st_size)
    with open_folder(converted("svdllm-hf").path) as folder:
        assert len(folder.manifest.sources) == 2 and folder.manifest.base_model is None


def test_two_conversions_are_equal_to_the_byte(published, tmp_path) -> None:
    for case in ("lowrankarena-qwen2", "svdllm"):
        source = published(case)
        folders = [tmp_path / f"{case}-{number}" for number in range(2)]
        for folder in folders:
            convert(source.path, folder, base=source.base, progress=False)
        first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
        assert first == second and len(first) == 4


def test_positions_heads_and_norms_are_the_base_configurations(published, tmp_path) -> None:
    """SVD-LLM's Llama class rotates with base 10000; the model that was compressed did not."""
    source = published("svdllm")
    model = base_model("llama", **ROPE, rms_norm_eps=1e-3)
    compress_in_blocks(model, source.ranks)
    base = write_config(tmp_path / "base", hf_config(model))
    report = convert(source.path, tmp_path / "out", base=base, dtype="float32", progress=False)
    logits = folder_logits(tmp_path / "out", TOKENS)
    np.testing.assert_allclose(logits, torch_logits(model), rtol=0, atol=1e-4)
    assert np.abs(logits - torch_logits(source.model)).max() > 1e-2
    assert report.config.rope.theta == 5e5 and report.config.rope.kind == "llama3"
    assert report.config_origin == str(base)
    (note,) = (note for note in report.notes if "base 10000" in note)
    assert "base 500000, scaling llama3" in note


def test_plain_positions_need_no_note(converted) -> None:
    report = converted("svdllm").report
    assert not any("base 10000" in note for note in report.notes)
    assert report.config_origin == "the configuration inside the pickle"


def test_dropped_tensors_and_names_in_a_pickle_are_reported(converted) -> None:
    notes = "\n".join(converted("svdllm").report.notes)
    assert "2 tensors were not needed: model.layers.0.self_attn.rotary_emb.inv_freq" in notes
    assert "component.svd_llama.SVD_LlamaAttention" in notes


@pytest.mark.parametrize(
    ("saved", "asked", "expected"),
    [
        (torch.float32, None, "bfloat16"),
        (torch.float64, None, "bfloat16"),
        (torch.float16, None, "float16"),
        (torch.bfloat16, None, "bfloat16"),
        (torch.bfloat16, "float32", "float32"),
        (torch.float16, "bfloat16", "bfloat16"),
        (torch.float32, "float16", "float16"),
    ],
)
def test_weights_are_cast_once(saved: torch.dtype, asked: str | None, expected: str, published, tmp_path) -> None:
    source = published("asvd")
    tensors = {name: tensor.to(saved) for name, tensor in state_dict(source.model).items()}
    # Larger than any other tensor, and smaller than all others together, which decide.
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()
    config = (source.path / "config.json").read_text()
    path = save_safetensors(tmp_path / "in", tensors, {})
    (path / "config.json").write_text(config)
    report = convert(path, tmp_path / "out", dtype=asked, progress=False)
    arrays = stored(tmp_path / "out")
    assert report.dtype == expected
    dtype = np.dtype(ml_dtypes.bfloat16 if expected == "bfloat16" else expected)
    for name, tensor in (
        ("layers_0.self_attn.q_proj.down", tensors[f"{ATTENTION}.q_proj.BLinear.weight"]),
        ("layers_0.mlp.down_proj.up", tensors["model.layers.0.mlp.down_proj.ALinear.weight"]),
        ("embed_tokens.weight", tensors["model.embed_tokens.weight"]),
    ):
        want = tensor.double().numpy() if tensor.dtype != torch.float32 else tensor.numpy()
        assert arrays[name].dtype == dtype
        np.testing.assert_array_equal(arrays[name], want.astype(dtype))


def test_a_factor_shared_by_modules_stays_one_array(tmp_path) -> None:
    """QSVD's joint q, k and v: three modules with one first factor, saved as one storage."""
    model = base_model("llama")
    compress(model, {f"{ATTENTION}.{stem}_proj": 7 for stem in "qkv"}, ABLinear)
    attention = model.model.layers[0].self_attn
    attention.k_proj.BLinear = attention.v_proj.BLinear = attention.q_proj.BLinear
    torch.save(model.state_dict(), tmp_path / "qsvd.pt")
    base = write_config(tmp_path, hf_config(model))
    report = convert(tmp_path / "qsvd.pt", tmp_path / "out", base=base, dtype="float32", verify=True, progress=False)
    names = [f"layers_0.self_attn.{stem}_proj.down" for stem in "qkv"]
    assert report.config.factorization.owner_by_name == dict.fromkeys(names[1:], names[0])
    params = load_params(tmp_path / "out")["params"]["layers_0"]["self_attn"]
    assert params["q_proj"]["down"] is params["k_proj"]["down"] is params["v_proj"]["down"]
    assert report.params == sum(tensor.numel() for tensor in model.parameters())
    np.testing.assert_allclose(folder_logits(tmp_path / "out", TOKENS), torch_logits(model), rtol=0, atol=1e-4)


def test_head_saved_beside_a_tied_embedding_is_left_out(published, tmp_path) -> None:
    source = published("dense-llama-tied")
    torch.save(source.model.state_dict(), tmp_path / "whole.bin")  # one storage under two names
    copied = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    torch.save(copied, tmp_path / "copied.bin")
    for name in ("whole", "copied"):
        report = convert(tmp_path / f"{name}.bin", tmp_path / name, base=source.path, dtype="float32", progress=False)
        assert "1 tensors were not needed: lm_head.weight" in report.notes
        np.testing.assert_allclose(
            folder_logits(tmp_path / name, TOKENS), torch_logits(source.model), rtol=0, atol=1e-4
        )


def test_merged_checkpoint_is_read_as_dense_whatever_its_configuration_claims(published, tmp_path) -> None:
    source = published("dense-mistral")
    config = hf_config(
        source.model, truncation_ranks={f"{ATTENTION}.q_proj": 5}, architectures=["ASVDMistralForCausalLM"]
    )
    path = save_safetensors(tmp_path / "in", state_dict(source.model), config)
    report = convert(path, tmp_path / "out", progress=False)
    assert report.family == "dense" and not report.config.factorization
    assert "although config.json has truncation_ranks" in str(report)


def test_tokenizer_and_sampling_files_come_along(published, tmp_path) -> None:
    source = published("dense-qwen2")
    path = save_safetensors(tmp_path / "in", state_dict(source.model), hf_config(source.model))
    base = write_config(tmp_path / "base", hf_config(source.model)).parent
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (base / name).write_text(f'{{"of": "base {name}"}}')

    def copied(name: str) -> dict[str, str]:
        report = convert(path, tmp_path / name, base=base, progress=False)
        files = {file: (tmp_path / name / file).read_text() for file in report.copied}
        assert {file.name for file in (tmp_path / name).iterdir()} >= set(files)
        return {file: text.split('"')[3].split()[0] for file, text in files.items()}

    assert copied("nothing beside the weights") == {
        "generation_config.json": "base",
        "tokenizer.json": "base",
        "tokenizer_config.json": "base",
    }
    (path / "tokenizer.json").write_text('{"of": "own"}')
    assert copied("a tokenizer beside the weights") == {"generation_config.json": "base", "tokenizer.json": "own"}
    (path / "generation_config.json").write_text('{"of": "own"}')
    assert copied("both beside the weights") == {"generation_config.json": "own", "tokenizer.json": "own"}


def test_report_shows_ranks_by_layer(converted) -> None:
    lines = str(converted("asvd").report).splitlines()
    assert lines[0].endswith("asvd")
    table = [line.split() for line in lines[lines.index("") + 1 :]]
    assert table == [
        ["layer", "q", "k", "v", "o", "gate", "up", "down"],
        ["0", "3", "4", "dense", "6", "7", "dense", "9"],
        ["1", "10", "dense", "12", "13", "dense", "15", "16"],
        ["lm_head", "11"],
    ]
    table = converted("svdllm").report.rank_table()
    assert [line.split() for line in table[1:]] == [["0-1", *["13"] * 4, *["17"] * 3], ["lm_head", "dense"]]
    assert converted("dense-qwen3").report.rank_table() == []
    text = str(converted("lems").report)
    assert "10 low rank, 5 dense" in text and "20,210 of 27,628 (73.2%)" in text
