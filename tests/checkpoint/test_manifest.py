"""The manifest's text: what is written is read back, and what is malformed is named."""

import dataclasses
import json
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from flashsvd_jax.checkpoint.manifest import Manifest, SourceFile
from flashsvd_jax.errors import CheckpointError
from flashsvd_jax.factorization import Factorization

WHERE = "some/factorization.json"
MANIFEST = Manifest(
    family="svdllm",
    dtype="float16",
    factorization=Factorization.of(
        {"a.q_proj": 3, "b.q_proj": 3}, {"b.q_proj.down": "a.q_proj.down"}, {"a.q_proj": 2, "b.q_proj": 2}
    ),
    params=100,
    params_dense=200,
    base_model="someone/some-model",
    sources=(SourceFile("pytorch_model.bin", 12, "0f" * 32),),
    notes=("rope_theta of the source class ignored", "Größe"),
)
FIELDS = json.loads(MANIFEST.to_json())
FUZZ = hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def read(fields: Any) -> Manifest:
    return Manifest.from_json(json.dumps(fields), WHERE)


def test_round_trip() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), WHERE) == MANIFEST


def test_groups_are_written_only_where_there_are_some() -> None:
    plain = dataclasses.replace(MANIFEST, factorization=dataclasses.replace(MANIFEST.factorization, groups=()))
    assert "groups" not in json.loads(plain.to_json())
    assert read(json.loads(plain.to_json())) == plain


def test_optional_fields_may_be_absent() -> None:
    fields = {name: value for name, value in FIELDS.items() if name not in ("base_model", "sources", "notes")}
    assert read(fields) == dataclasses.replace(MANIFEST, base_model=None, sources=(), notes=())


@pytest.mark.parametrize("name", ["format_version", "family", "dtype", "params", "params_dense", "ranks", "shared"])
def test_missing_field_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^some/factorization\.json: {name} is missing$"):
        read({key: value for key, value in FIELDS.items() if key != name})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format_version": 2}, "format_version is 2, but this version of flashsvd_jax reads only 1"),
        ({"format_version": True}, "format_version must be a whole number, not True"),
        ({"family": 3}, "family must be text, not 3"),
        ({"base_model": 3}, "base_model must be text, not 3"),
        ({"dtype": "int4"}, "dtype must be one of bfloat16, float16, float32, not 'int4'"),
        ({"params": -1}, "params must not be negative, it is -1"),
        ({"params_dense": 1.5}, "params_dense must be a whole number, not 1.5"),
        ({"ranks": [3]}, r"ranks must be an object, not \[3\]"),
        ({"ranks": {"a": 0}}, r"ranks\['a'\] must be a positive whole number, not 0"),
        ({"ranks": {"a": True}}, r"ranks\['a'\] must be a positive whole number, not True"),
        ({"ranks": {"a": "3"}}, r"ranks\['a'\] must be a positive whole number, not '3'"),
        ({"ranks": {"a": 3.0}}, r"ranks\['a'\] must be a positive whole number, not 3.0"),
        ({"shared": {"a": 1}}, r"shared\['a'\] must be the name of an array, not 1"),
        ({"groups": []}, r"groups must be an object, not \[\]"),
        ({"groups": {"a": 0}}, r"groups\['a'\] must be a positive whole number, not 0"),
        ({"sources": {}}, r"sources must be a list, not \{\}"),
        ({"sources": ["x"]}, r"sources\[0\] must be an object, not 'x'"),
        ({"sources": [{"name": "x", "bytes": 1}]}, r"sources\[0\]: sha256 is missing"),
        (
            {"sources": [{"name": "x", "bytes": 1, "sha256": "zz"}]},
            r"sources\[0\]: sha256 must be 64 hexadecimal digits",
        ),
        ({"sources": [{**FIELDS["sources"][0], "url": "x"}]}, r"sources\[0\]: unknown fields: url"),
        ({"notes": ["x", 1]}, r"notes\[1\] must be text, not 1"),
        ({"rank": {}}, "unknown fields: rank"),
    ],
)
def test_malformed_field_is_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^some/factorization\.json: {problem}"):
        read({**FIELDS, **changes})


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 200_000, '{"params": ' + "9" * 5000 + "}"])
def test_text_that_is_no_json_object(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"^some/factorization\.json "):
        Manifest.from_json(text, WHERE)


@hypothesis.given(name=st.sampled_from(sorted(FIELDS)), value=json_values)
@FUZZ
def test_any_value_is_read_or_refused(name: str, value: Any) -> None:
    try:
        manifest = read({**FIELDS, name: value})
    except CheckpointError as error:
        assert WHERE in str(error) and name in str(error)
    else:
        assert Manifest.from_json(manifest.to_json(), WHERE) == manifest


@hypothesis.given(start=st.integers(0, 600), length=st.integers(1, 40), text=st.text(max_size=8))
@FUZZ
def test_any_damage_is_read_or_refused(start: int, length: int, text: str) -> None:
    original = MANIFEST.to_json()
    try:
        manifest = Manifest.from_json(original[:start] + text + original[start + length :], WHERE)
    except CheckpointError as error:
        assert WHERE in str(error)
    else:
        assert Manifest.from_json(manifest.to_json(), WHERE) == manifest
