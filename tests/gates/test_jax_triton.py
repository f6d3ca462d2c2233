"""The jax-triton kernel: who may call it, what it says where jax-triton is missing, and its machine code for an H200.

Compiling it needs jax-triton and a triton newer than PyTorch's, so in a folder of their own, named in PYTHONPATH.
"""

import re

import jax.numpy as jnp
import pytest
from cuda_compile import compile_for_h200
from kernel_calls import array, packed
from toy_kernels import low_rank_in_a_loop

from pallas_kernels import jax_triton, prefer, project
from pallas_kernels.jax_triton import matrix_vector as call
from pallas_kernels.jax_triton import missing
from pallas_kernels.jax_triton.implementation import refuses, unavailable
from pallas_kernels.target import H200, Target, assume_target

needs_jax_triton = pytest.mark.skipif(missing() is not None, reason=str(missing()))
X, WEIGHTS = array(1, 1, 64), packed(64, (32, 16), (24, None))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "_implementations", list(project._implementations))
    jax_triton.register()


def test_it_is_there_only_when_asked_for() -> None:
    assert jax_triton.NAME not in project.names


def test_registered_it_serves_only_calls_that_name_or_prefer_it(
    registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pallas_kernels.jax_triton.implementation.missing", lambda: None)
    with assume_target(H200):
        assert project.choose(X, WEIGHTS)[0].name != jax_triton.NAME
        assert project.choose(X, WEIGHTS, implementation=jax_triton.NAME)[0].name == jax_triton.NAME
        with prefer(jax_triton.NAME):
            assert project.choose(X, WEIGHTS)[0].name == jax_triton.NAME
    with pytest.raises(ValueError, match="already"):
        jax_triton.register()


def test_without_jax_triton_it_says_how_to_get_it(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with assume_target(H200), pytest.raises(ValueError, match=re.escape("flashsvd-jax[jax-triton]")):
        project(X, WEIGHTS, implementation=jax_triton.NAME)
    with pytest.raises(ValueError, match="not installed"):
        call(jnp.ones((1, 8)), jnp.ones((4, 8)))


def test_an_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.6.0")
    assert missing() == "jax-triton needs triton 3.7 or newer, not 3.6.0"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.10.1")
    assert missing() is None


def test_what_it_refuses() -> None:
    assert refuses(X, WEIGHTS) is None
    assert "5 rows" in str(refuses(array(5, 1, 64), WEIGHTS))
    assert "float32" in str(refuses(array(1, 1, 64, dtype=jnp.float32), WEIGHTS))
    assert "(16, 60)" in str(refuses(array(1, 1, 60), packed(60, (32, 16))))
    assert "not cpu" in str(unavailable(Target("cpu")))
    assert "interpreter" in str(unavailable(Target("cuda", interpret=True)))


@needs_jax_triton
@pytest.mark.parametrize(
    "shape", [(1, 4096, 4096), (2, 409, 11008), (3, 4097, 1032), (4, 1024, 4096), (1, 33, 8)], ids=str
)
def test_its_machine_code(shape: tuple[int, int, int]) -> None:
    batch, n, k = shape
    compiled = compile_for_h200(call, array(batch, k), array(n, k))
    assert [thunk.kind for thunk in compiled.walk()] == ["kCustomCall"]
    (used,) = compiled.resources.values()
    assert (used.spill_stores, used.spill_loads) == (0, 0)
    assert used.registers <= 128
    (ptx,) = compiled.ptx.values()
    weight_loads = re.findall(r"ld\.global\S*evict_first\S*", ptx)
    assert weight_loads and all(".v4.b32" in load for load in weight_loads), "16 bytes a thread"


@needs_jax_triton
def test_a_low_rank_pair_in_a_loop_is_one_command_buffer() -> None:
    compiled = compile_for_h200(
        low_rank_in_a_loop, array(1, 512), array(64, 512), array(512, 64), array(dtype=jnp.int32)
    )
    assert [thunk.kind for thunk in compiled.loop_body()] == ["kCommandBuffer"]
    assert [thunk.kind for thunk in compiled.walk()].count("kCustomCall") == 6
