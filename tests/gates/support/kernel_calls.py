"""The calls of ops that the gates lower and compile for an H200, at the shapes that decoding has: a list to add to.

Every implementation of an op that is not XLA's own (a name that begins with "xla") must be listed, or a test fails.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from decoder_cases import DecoderCase

from pallas_kernels import LayerNorm, Norm, PackedProjection, Projection, Visible, hardware_rank, ops, pack
from pallas_kernels.triton.blocks import MATVEC_BATCH

THIRD_OF_REGISTERS = 168
"""What a thread starts with where three warpgroups have all registers of a multiprocessor, before they share them out anew."""

Member = tuple[int, int | None]
"""d_out, and the rank or None."""


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call of one implementation of an op, and what its kernels may take.

    Attributes:
      label: names the test.
      op, implementation: as registered.
      args, arrays: shapes of the positional and of the named arrays, as pytrees.
      options: static arguments.
      max_registers: of a thread; above 128, fewer than four blocks of 128 threads fit a multiprocessor with any of them.
      max_shared_memory: of a block, in bytes; an H200 has 227 KiB for all blocks of a multiprocessor.
      max_code: bytes of machine code. What runs once a layer is read anew each time where it is more than the cache for
        instructions holds.
    """

    label: str
    op: str
    implementation: str
    args: tuple[Any, ...]
    arrays: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_registers: int = 128
    max_shared_memory: int = 227 * 1024
    max_code: int = 256 * 1024

    def function(self) -> partial[Any]:
        """What to lower, with `args` and `arrays` as its two arguments."""
        return partial(_call, self.op, self.implementation, dict(self.options))


def _call(op: str, implementation: str, options: dict[str, Any], args: tuple[Any, ...], arrays: dict[str, Any]) -> Any:
    return ops()[op](*args, implementation=implementation, **arrays, **options)


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """The shape of an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def packed(d_in: int, *members: Member, dtype: Any = jnp.bfloat16) -> PackedProjection:
    """The shapes of projections packed as a model on a GPU holds them, ranks padded."""

    def projection(d_out: int, rank: int | None) -> Projection:
        if rank is None:
            return Projection(weight=array(d_out, d_in, dtype=dtype))  # pyright: ignore[reportArgumentType]
        return Projection(down=array(rank, d_in, dtype=dtype), up=array(d_out, rank, dtype=dtype))  # pyright: ignore

    return jax.eval_shape(partial(pack, pad_rank=hardware_rank), [projection(*member) for member in members])


def _project(label: str, rows: int, d_in: int, *members: Member, **options: Any) -> KernelCall:
    """A call of `project` with a norm before it unless ``options`` say otherwise."""
    arrays: dict[str, Any] = {"norm": Norm(array(d_in), 1e-5)} if options.pop("norm", True) else {}  # pyright: ignore
    if options.pop("residual", False):
        arrays["residual"] = array(rows, 1, members[0][0])
    args = (array(rows, 1, d_in), packed(d_in, *members))
    call = KernelCall(f"project-{label}-{rows}", "project", "triton", args, arrays, options)
    return call if rows <= MATVEC_BATCH else dataclasses.replace(call, max_registers=192)  # sums of tensor cores


def _attend(
    label: str, rows: int, heads: int, kv_heads: int, head_dim: int = 128, slots: int = 8192, **options: Any
) -> KernelCall:
    new = [array(rows, 1, count * head_dim) for count in (heads, kv_heads, kv_heads)]
    cache = [array(rows, kv_heads, slots, head_dim)] * 2
    tables = [array(rows, 1, head_dim // 2, dtype=jnp.float32)] * 2
    positions = [array(rows, dtype=jnp.int32)] * 2
    args = (*new, *cache, *tables, *positions)
    return KernelCall(f"attend-{label}-{rows}", "attend_cached", "triton", args, options=options, max_registers=192)


def _decode(label: str, case: DecoderCase, implementation: str = "persistent", code: int = 192) -> KernelCall:
    """A call of `decode_layers`. One block a multiprocessor has all registers. ``code`` is KiB that its kernel may have."""
    args = jax.eval_shape(case.arguments)
    name = f"decode-{implementation}-{label}-{len(case.starts)}"
    return KernelCall(name, "decode_layers", implementation, args, max_registers=255, max_code=1024 * code)


def _own_heads(width: int, heads: int, head_dim: int, rank: int) -> PackedProjection:
    """The shapes of queries, keys and values whose heads have factors of their own."""
    down, up = array(heads * rank, width), array(heads, head_dim, rank)
    member = Projection(down=down, up=up, bias=array(heads * head_dim))  # pyright: ignore[reportArgumentType]
    return jax.eval_shape(partial(pack, pad_rank=hardware_rank), [member] * 3)


def _visible(batch: int, *, tokens: int = 0, **fields: Any) -> Visible:
    """Of sequences padded on the right, or on either side if ``tokens`` says how long they are."""
    real = array(batch, tokens, dtype=jnp.bool) if tokens else None
    return Visible(array(batch, dtype=jnp.int32), real, **fields)  # pyright: ignore[reportArgumentType]


def _flash(
    label: str, heads: int, kv_heads: int, head_dim: int, tokens: int, softcap: float | None = None,
    implementation: str = "triton", **fields: Any,
) -> KernelCall:  # fmt: skip
    args = (*(array(2, count, tokens, head_dim) for count in (heads, kv_heads, kv_heads)), _visible(2, **fields))
    registers = 255 if implementation == "triton" else THIRD_OF_REGISTERS
    return KernelCall(
        f"flash-{label}", "attend", implementation, args, {}, {"softcap": softcap}, max_registers=registers
    )


def _stream(label: str, rank: int, tables: bool = False, **fields: Any) -> KernelCall:
    args = (array(8, 512, 768), _own_heads(768, 12, 64, rank), _visible(8, causal=False, **fields))
    angles = array(8, 512, 32, dtype=jnp.float32)
    arrays = {"tables": (angles, angles) if tables else None}
    return KernelCall(f"stream-{label}", "attend_padded", "stream", args, arrays, {"head_dim": 64}, max_registers=192)


def _feed_forward(label: str, inner: int, ranks: tuple[int, ...], down_rank: int, batch: int = 8) -> KernelCall:
    args = (array(batch, 512, 768), packed(768, *[(inner, rank) for rank in ranks]), packed(inner, (768, down_rank)))
    options = {"activation": "gelu"}
    return KernelCall(f"feed-forward-{label}", "feed_forward", "stream", args, {}, options, max_registers=255)


def _hopper_feed_forward(
    label: str, inner: int, ranks: tuple[int, ...], down_rank: int, width: int = 768, bias: bool = True
) -> KernelCall:
    """With biases as BERT has them, or none and something to add as in ModernBERT."""
    x, pairs = (
        array(64, 512, width),
        [packed(width, *[(inner, rank) for rank in ranks]), packed(inner, (width, down_rank))],
    )
    if len(set(ranks)) < len(ranks):  # as of one projection that is cut in two
        rank = pairs[0].widths[0]
        first = array(rank, width)
        pairs[0] = dataclasses.replace(pairs[0], first=first, starts=(0,) * len(ranks))
    if bias:
        pairs = [dataclasses.replace(pair, biases=tuple(array(n) for n in pair.d_outs)) for pair in pairs]
    name, options = f"hopper-feed-forward-{label}", {"activation": "gelu"}
    arrays = {} if bias else {"residual": x}
    return KernelCall(name, "feed_forward", "hopper", (x, *pairs), arrays, options, max_registers=THIRD_OF_REGISTERS)


def _norms() -> list[KernelCall]:
    x, root = array(512, 4096), Norm(array(4096), 1e-5)  # pyright: ignore[reportArgumentType]
    layer = LayerNorm(array(768), array(768), 1e-12)  # pyright: ignore[reportArgumentType]
    return [
        KernelCall("rms-norm", "rms_norm", "triton", (x, root)),
        KernelCall("layer-norm", "layer_norm", "triton", (array(512, 768), layer)),
        KernelCall("add-norm", "add_norm", "triton", (x, x, root)),
        KernelCall("add-norm-alone", "add_norm", "triton", (*[array(512, 768)] * 2, layer), {}, {"keep_sum": False}),
    ]


def _hopper(label: str, rows: int, d_out: int, rank: int, gate: str | None) -> KernelCall:
    args = (array(1, rows, 4096), packed(4096, *[(d_out, rank)] * (1 if gate is None else 2)))
    return KernelCall(
        f"hopper-{label}-{rows}", "project", "hopper", args, options={"gate": gate}, max_registers=THIRD_OF_REGISTERS
    )


def _heads(
    label: str, batch: int, kv_heads: int, ranks: tuple[int, int, int], implementation: str = "hopper"
) -> KernelCall:
    counts = (4096, *[kv_heads * 128] * 2)
    tokens = 512 if implementation == "hopper" else 16
    tables = [array(batch, tokens, 64, dtype=jnp.float32)] * 2
    args = (array(batch, tokens, 4096), packed(4096, *zip(counts, ranks, strict=True)), *tables)
    name = f"heads-{label}-{batch * tokens}"
    return KernelCall(
        name, "project_heads", implementation, args, options={"head_dim": 128}, max_registers=THIRD_OF_REGISTERS
    )


def _encoder(tokens: int = 16) -> list[KernelCall]:
    """The ops of an encoder of BERT-base's width, with few enough tokens for the kernels of single products."""
    x, qkv = array(1, tokens, 768), packed(768, *[(768, 200)] * 3)
    attend = (x, qkv, _visible(1, tokens=tokens, causal=False))
    feed = (x, packed(768, (3072, 304)), packed(3072, (768, 304)))
    return [
        KernelCall(
            f"attend-padded-{tokens}", "attend_padded", "products", attend, options={"head_dim": 64}, max_registers=192
        ),
        KernelCall(
            f"feed-forward-{tokens}",
            "feed_forward",
            "products",
            feed,
            options={"activation": "gelu"},
            max_registers=192,
        ),
    ]


replace = dataclasses.replace
LLAMA_7B = DecoderCase(2, 4096, 11008, 32, 32, (1024, 1492), starts=(0,), slots=8192, vocab=32000)
LLAMA_8B = DecoderCase(2, 4096, 14336, 32, 8, (None, 1592), starts=(0,), slots=8192, vocab=128256)
DENSE_AMONG_LOW_RANK = ("0.q", "0.down", "1.gate", "1.o")

# Ranks are those of ratio 0.5: 1024 and 1488 in Llama-2-7B; 1024, 409 and 1592 in Llama-3.1-8B.
KERNEL_CALLS: list[KernelCall] = [
    _project("qkv", 1, 4096, (4096, 1024), (4096, 1024), (4096, 1024)),
    _project("qkv-dense", 1, 4096, (4096, None), (1024, None), (1024, None)),
    _project("o", 1, 4096, (4096, 1024), norm=False, residual=True),
    _project("gate-up-dense", 1, 4096, (14336, None), (14336, None), gate="silu"),
    _project("head", 1, 4096, (128256, None), dtype=jnp.float32),
    _attend("mha", 1, 32, 32),
    _attend("gqa", 1, 32, 8),
    *(
        call
        for rows in (1, 2, 4, 8, 32)
        for call in (
            _project("qkv-mixed", rows, 4096, (4096, 1024), (1024, 409), (1024, None)),
            _project("gate-up", rows, 4096, (11008, 1492), (11008, 1492), gate="silu"),
            _project("down", rows, 11008, (4096, 1492), norm=False, residual=True),
        )
    ),
    _project("head", 8, 4096, (128256, None), dtype=jnp.float32),
    _attend("gqa", 8, 32, 8),
    _attend("head-256-bounded", 1, 16, 8, head_dim=256, softcap=50.0),
    _attend("head-64", 1, 14, 2, head_dim=64),
    _decode("7b", replace(LLAMA_7B, starts=(0,)), code=128),
    _decode("7b", replace(LLAMA_7B, starts=(0,) * 4), code=140),
    _decode("7b-dense", replace(LLAMA_7B, ranks=(None, None)), code=97),
    _decode("7b-absorbed", replace(LLAMA_7B, ranks=(832, 1200), starts=(0,), absorbed=True), code=140),
    _decode("8b-ranks-that-differ", replace(LLAMA_8B, ranks=(1024, 1592), varied=True, starts=(0,) * 8)),
    _decode("8b-dense-attention", replace(LLAMA_8B, qk_norm=True, biases=True, window=4096)),
    _decode(
        "heads-of-64", DecoderCase(2, 896, 4864, 14, 2, (None, 400), starts=(0,), slots=8192, biases=True, head_dim=64)
    ),
    _decode("heads-of-32", DecoderCase(2, 256, 704, 8, 4, (72, 120), starts=(0, 0), slots=128, head_dim=32)),
    _decode("7b-some-dense", replace(LLAMA_7B, dense=DENSE_AMONG_LOW_RANK)),
    _decode(
        "8b-some-dense-everything-biased",
        replace(
            LLAMA_8B,
            ranks=(1024, 1592),
            dense=DENSE_AMONG_LOW_RANK,
            varied=True,
            biases=True,
            more_biases=True,
            gate="gelu",
            starts=(0,) * 4,
        ),
        code=196,
    ),
    _decode("7b", LLAMA_7B, "products"),
    *_encoder(),
    _flash("7b", 32, 32, 128, 2048, padding="ignored"),
    _flash("8b-after-others", 32, 8, 128, 512, start=array(dtype=jnp.int32)),
    _flash("window", 16, 4, 96, 512, window=128),
    _flash("heads-of-256", 8, 4, 256, 512),
    _flash("heads-of-256-bounded", 8, 4, 256, 512, softcap=50.0),
    _flash("bert", 12, 12, 64, 512, causal=False),
    _flash("hopper-7b", 32, 32, 128, 2048, implementation="hopper", padding="ignored"),
    _flash(
        "hopper-8b-after-others",
        32,
        8,
        128,
        512,
        implementation="hopper",
        padding="ignored",
        start=array(dtype=jnp.int32),
    ),
    _flash("hopper-heads-of-64", 12, 12, 64, 512, implementation="hopper", padding="ignored"),
    _stream("32", 29),
    _stream("48-padded-left", 44, tokens=512),
    _stream("modernbert", 44, tables=True, window=65),
    _feed_forward("bert", 3072, (307,), 307, batch=64),
    _feed_forward("bert-programs-that-share-tokens", 3072, (307,), 307),
    _feed_forward("bert-narrow", 3072, (192,), 192),
    _feed_forward("modernbert", 1152, (240, 240), 240),
    *_norms(),
    _hopper_feed_forward("bert", 3072, (307,), 307),
    _hopper_feed_forward("minilm", 1536, (192,), 192, width=384),
    _hopper_feed_forward("gate-that-shares-latents", 1152, (240, 240), 240, bias=False),
    _hopper_feed_forward("gated", 1152, (240, 184), 184, bias=False),
    _hopper("gated", 512, 11008, 1492, "silu"),
    _hopper("gated", 4096, 11008, 1492, "silu"),
    _hopper("gated-8b", 512, 14336, 1911, "gelu_tanh"),
    _hopper("up", 512, 4096, 1492, None),
    _hopper("up", 4096, 4096, 1024, None),
    _heads("7b", 1, 32, (1024, 1024, 1024)),
    _heads("7b", 8, 32, (1024, 1024, 1024)),
    _heads("8b-ranks-that-differ", 2, 8, (1228, 491, 491)),
    _heads("separate", 1, 8, (1024, 409, 409), "separate"),
]
