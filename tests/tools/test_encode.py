"""Vectors of texts against transformers, which reads each text alone: any lengths, either pooling, and the command line."""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from compressed_modules import UVLinear, compress
from hf_encoders import build_encoder
from kept_executables import end_of_process, kept_in
from letter_tokenizer import VOCAB, letter_tokenizer
from published_checkpoints import save_safetensors

import flashsvd_jax
from flashsvd_jax import encoder_model
from flashsvd_jax.background_compile import BackgroundStep
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.checkpoint.orbax_io import load_orbax, save_orbax
from flashsvd_jax.cli import main
from flashsvd_jax.compile_cache import compile_count, expect_no_compile
from flashsvd_jax.encoder_model import EncoderModel, load_encoder
from flashsvd_jax.encoding import _batch_size, encode
from flashsvd_jax.errors import FlashSVDError, RequestError
from flashsvd_jax.model import load
from flashsvd_jax.schema import schema

MOST = 59  # positions behind the padding token's
TEXTS = ["a cat", "", "the longest text of all of them goes over many tokens", "b", "a cat", "x" * 30, "one more text"]


@dataclasses.dataclass(frozen=True)
class TinyEncoder:
    """A RoBERTa with low-rank layers in transformers, as a folder, and loaded, all in float32."""

    hf: Any
    folder: Path
    model: EncoderModel

    def vector(self, ids: list[int], pooling: str = "mean") -> np.ndarray:
        with torch.no_grad():
            x = self.hf(torch.tensor([ids]))[0][0]
        return (x[0] if pooling == "cls" else x.mean(0)).numpy()

    def vectors(self, texts: list[str], pooling: str = "mean") -> np.ndarray:
        return np.stack([self.vector(ids_of(text), pooling) for text in texts])


def ids_of(text: str) -> list[int]:
    return [0, *(VOCAB.index(letter) for letter in text), 2]


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> TinyEncoder:
    sizes = {"vocab_size": len(VOCAB), "pad_token_id": 1, "max_position_embeddings": MOST + 2}
    model = build_encoder("roberta", **sizes)
    linears = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and "encoder" in name]
    compress(model, {name: 5 + i for i, name in enumerate(linears) if i % 3 != 1}, UVLinear)
    source = tmp_path_factory.mktemp("encoder")
    save_safetensors(source, model.state_dict(), json.loads(model.config.to_json_string(use_diff=False)))
    letter_tokenizer().save_pretrained(source)
    folder = tmp_path_factory.mktemp("encoders") / "tiny"
    flashsvd_jax.convert(source, folder, dtype="float32", progress=False)
    return TinyEncoder(model, folder, load_encoder(folder, progress=False))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("batch", [None, 3])
def test_vectors_are_those_of_each_text_alone_in_the_order_given(
    tiny_encoder: TinyEncoder, pooling: str, batch: int
) -> None:
    got = encode(tiny_encoder.model, TEXTS, pooling=pooling, batch=batch)
    assert got.shape == (len(TEXTS), 40) and got.dtype == np.float32
    np.testing.assert_allclose(got, tiny_encoder.vectors(TEXTS, pooling), rtol=0, atol=1e-4)


def test_normalized_vectors_have_length_one(tiny_encoder: TinyEncoder) -> None:
    got, want = encode(tiny_encoder.model, TEXTS, normalize=True), tiny_encoder.vectors(TEXTS)
    np.testing.assert_allclose(got, want / np.linalg.norm(want, axis=1, keepdims=True), rtol=0, atol=1e-5)


def test_token_ids_go_beside_texts_and_a_single_token_is_enough(tiny_encoder: TinyEncoder) -> None:
    got = encode(tiny_encoder.model, ["a cat", ids_of("b"), [7], np.array([4, 5])])
    want = [tiny_encoder.vector(ids) for ids in (ids_of("a cat"), ids_of("b"), [7], [4, 5])]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_no_texts_give_no_vectors(tiny_encoder: TinyEncoder) -> None:
    assert encode(tiny_encoder.model, []).shape == (0, 40)


def test_lengths_share_a_few_shapes(tiny_encoder: TinyEncoder) -> None:
    model = EncoderModel(tiny_encoder.model.config, tiny_encoder.model.weights)
    lengths = range(1, MOST + 1)
    before = compile_count()
    encode(model, [[5] * length for length in lengths], batch=4)
    assert compile_count() - before <= 4  # 16, 32, and the limit; one more for whatever is not the model
    with expect_no_compile():
        encode(model, [[6] * length for length in reversed(lengths)], batch=4)
    assert _batch_size(model.config, 512, 10**6) == 128  # 5 heads * 512^2 * 4 bytes within 1 GiB
    assert _batch_size(model.config, 16, 5) == 8


def test_long_texts_are_cut_before_their_end_token_if_that_is_asked_for(tiny_encoder: TinyEncoder) -> None:
    texts = ["a cat", "abcdefgh" * 20]
    with pytest.raises(RequestError, match=f"text 1 has 162 tokens, more than the {MOST} that are read; truncate=True"):
        encode(tiny_encoder.model, texts)
    got = encode(tiny_encoder.model, texts, truncate=True)
    want = [tiny_encoder.vector(ids_of(text)) for text in ("a cat", texts[1][: MOST - 2])]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    got = encode(tiny_encoder.model, texts, truncate=True, max_length=4)
    np.testing.assert_allclose(got, [tiny_encoder.vector(ids_of(t)) for t in ("a ", "ab")], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("a cat", {}, "texts is a single text: give a list"),
        (["a", []], {}, "text 1 has no token"),
        ([[3, 99]], {}, "text 0 has token ids outside the vocabulary of 30"),
        ([[-1]], {}, "text 0 has token ids outside"),
        (["a"], {"pooling": "max"}, "pooling 'max' is not one of mean, cls"),
        (["a"], {"max_length": 60}, "max_length must be from 1 to the 59 positions"),
        (["a"], {"max_length": 0}, "max_length must be from 1"),
        (["a"], {"batch": 0}, "batch must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_encoded_is_refused(
    tiny_encoder: TinyEncoder, texts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        encode(tiny_encoder.model, texts, **options)


def test_each_kind_of_model_has_its_own_loader(tiny_encoder: TinyEncoder, tiny: Any) -> None:
    with pytest.raises(
        RequestError, match="is an encoder, a roberta: use load_encoder and encode, or `flashsvd encode`"
    ):
        load(tiny_encoder.folder)
    with pytest.raises(RequestError, match="is a decoder, a llama: use load and generate, or `flashsvd generate`"):
        load_encoder(tiny.folder)
    with pytest.raises(RequestError, match="only an encoder encodes texts"):
        encode(tiny.model, ["a"])
    with pytest.raises(RequestError, match="made without a tokenizer: give the texts as token ids"):
        encode(EncoderModel(tiny_encoder.model.config, tiny_encoder.model.weights), ["a"])
    for options in ({"dtype": "int8"}, {"kernels": "none such"}, {"materialize": "some"}, {"block_tokens": 0}):
        with pytest.raises(FlashSVDError, match=r"is not one of|no kernels named|must be at least 1, not 0"):
            load_encoder(tiny_encoder.folder, progress=False, **options)


@pytest.mark.parametrize(
    "options", [{"materialize": "always"}, {"materialize": "never"}, {"kernels": "xla"}, {"block_tokens": 32}]
)
def test_vectors_do_not_depend_on_how_the_model_is_loaded(tiny_encoder: TinyEncoder, options: dict[str, Any]) -> None:
    model = load_encoder(tiny_encoder.folder, progress=False, **options)
    got = encode(model, TEXTS[:3])
    np.testing.assert_allclose(got, tiny_encoder.vectors(TEXTS[:3]), rtol=0, atol=1e-4)
    ran = {name: set(chosen) for name, chosen in model.kernels_used.items()}
    name = "xla" if "kernels" in options else "products"
    assert ran["attend_padded"] == ran["feed_forward"] == {name}


def test_a_pass_that_cannot_do_without_a_library_is_compiled_with_it_and_says_so(
    tiny_encoder: TinyEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin, begun = BackgroundStep.begin, []

    def refuses_once(step: BackgroundStep, *shapes: Any) -> Any:
        begun.append(step)
        if len(begun) == 1:
            raise jax.errors.JaxRuntimeError("NOT_FOUND: no configs for a product\nand more")
        return begin(step, *shapes)

    monkeypatch.setattr(encoder_model, "spares_workspace", lambda *of: True)
    monkeypatch.setattr(BackgroundStep, "begin", refuses_once)
    model = load_encoder(tiny_encoder.folder, progress=False, block_tokens=64)
    np.testing.assert_allclose(encode(model, TEXTS), tiny_encoder.vectors(TEXTS), rtol=0, atol=1e-4)
    told = [r.message for r in caplog.records if "set memory aside" in r.message]
    assert len(told) == 1 and told[0].endswith("NOT_FOUND: no configs for a product") and begun[0] not in begun[1:]


def test_another_process_traces_no_pass(
    tiny_encoder: TinyEncoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with kept_in(tmp_path, monkeypatch) as folder:
        model = load_encoder(tiny_encoder.folder, progress=False)
        first = encode(model, TEXTS[:2], pooling="cls")
        end_of_process()
        assert len(list(folder.iterdir())) == 1
        monkeypatch.setattr(encoder_model, "hidden_states", None)  # nothing to trace a pass with
        again = load_encoder(tiny_encoder.folder, progress=False)
        np.testing.assert_array_equal(encode(again, TEXTS[:2], pooling="cls"), first)
        assert again.kernels_used == model.kernels_used != {}
        with pytest.raises(TypeError):
            encode(again, TEXTS[:2], pooling="mean")


def test_a_model_from_a_parameter_tree_that_orbax_kept(tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    with open_folder(tiny_encoder.folder) as folder:
        params = flashsvd_jax.load_params(tiny_encoder.folder)
        save_orbax(tmp_path / "orbax", params, folder.hf_config, folder.manifest)
    restored, config, *_ = load_orbax(tmp_path / "orbax")
    assert config == tiny_encoder.model.config
    model = EncoderModel.from_params(config, restored)
    np.testing.assert_allclose(encode(model, [[4, 5]]), [tiny_encoder.vector([4, 5])], rtol=0, atol=1e-4)


def test_half_precision_is_near(tiny_encoder: TinyEncoder) -> None:
    got = encode(load_encoder(tiny_encoder.folder, dtype="bfloat16", progress=False), TEXTS, normalize=True)
    want = tiny_encoder.vectors(TEXTS)
    cosines = (got * want).sum(1) / np.linalg.norm(want, axis=1)
    assert got.dtype == np.float32 and (cosines > 0.995).all()


def test_inspection_of_an_encoder(
    tiny_encoder: TinyEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = flashsvd_jax.inspect(tiny_encoder.folder)
    assert (found.cache_bytes, found.bytes_per_step, found.context) == (None, None, MOST)
    assert found.params == sum(spec.size for spec in schema(tiny_encoder.model.config).values())
    assert found.weight_bytes >= 4 * found.params
    assert json.loads(found.to_json())["model_type"] == "roberta"
    assert main(["inspect", str(tiny_encoder.folder), "--plot", str(tmp_path / "ranks.svg")]) == 0
    assert (tmp_path / "ranks.svg").stat().st_size
    out = capsys.readouterr().out
    (row,) = (line for line in out.splitlines() if line.startswith("layers"))
    assert row.split() == ["layers", "q", "k", "v", "o", "up", "down"]
    assert "KV cache" not in out and "read per step" not in out


def test_command_writes_an_array(tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("a cat\r\n\nthe second line\n")
    arguments = [
        "encode",
        str(tiny_encoder.folder),
        str(tmp_path / "texts"),
        "--pooling",
        "cls",
        "--block-tokens",
        "16",
        "-o",
    ]
    assert main([*arguments, str(tmp_path / "vectors.npy")]) == 0
    want = tiny_encoder.vectors(["a cat", "", "the second line"], "cls")
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), want, rtol=0, atol=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["texts", "vectors.npy"]


def test_command_writes_where_a_link_leads_and_into_a_pipe(tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("a cat\n")
    (tmp_path / "link.npy").symlink_to("real.npy")
    os.mkfifo(tmp_path / "pipe")
    arguments = ["encode", str(tiny_encoder.folder), str(tmp_path / "texts"), "-o"]
    assert main([*arguments, str(tmp_path / "link.npy")]) == 0
    with ThreadPoolExecutor() as pool:
        read = pool.submit((tmp_path / "pipe").read_bytes)
        assert main([*arguments, str(tmp_path / "pipe")]) == 0
        assert read.result() == (tmp_path / "real.npy").read_bytes()
    assert (tmp_path / "link.npy").is_symlink() and (tmp_path / "pipe").is_fifo()


def test_texts_may_be_any_iterable(tiny_encoder: TinyEncoder) -> None:
    want = encode(tiny_encoder.model, ["a cat", "b"])
    for texts in (iter(["a cat", "b"]), dict.fromkeys(["a cat", "b"]).keys()):
        np.testing.assert_array_equal(encode(tiny_encoder.model, texts), want)


def test_command_prints_a_vector_a_line(
    tiny_encoder: TinyEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").write_text("a cat\nb")
    assert main(["encode", str(tiny_encoder.folder), str(tmp_path / "texts"), "--normalize"]) == 0
    got = np.array([json.loads(line) for line in capsys.readouterr().out.splitlines()], np.float32)
    np.testing.assert_array_equal(got, encode(tiny_encoder.model, ["a cat", "b"], normalize=True))


def test_errors_of_the_command(tiny_encoder: TinyEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "long").write_text("a" * 100)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    folder, out = str(tiny_encoder.folder), str(tmp_path / "out.npy")
    for arguments, message in (
        ([str(tmp_path / "none")], "none cannot be read as text"),
        ([str(tmp_path / "binary")], "binary cannot be read as text"),
        ([str(tmp_path / "long"), "-o", out], "text 0 has 102 tokens"),
        ([str(tmp_path / "long"), "-o", str(tmp_path / "no" / "out.npy")], "its folder does not exist"),
        ([str(tmp_path / "long"), "-o", str(tmp_path)], "it is a folder"),
    ):
        assert main(["encode", folder, *arguments]) == 1
        assert message in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["binary", "long"]
