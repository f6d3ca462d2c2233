"""Operations of low-rank inference: what they compute, and the ways to compute them. Knows nothing of models."""

from pallas_kernels import cudnn as _cudnn
from pallas_kernels import hopper as _hopper
from pallas_kernels import persistent as _persistent  # noqa: F401  (these register their implementations)
from pallas_kernels import triton as _triton  # noqa: F401
from pallas_kernels.activations import ACTIVATIONS
from pallas_kernels.attention import (
    Visible,
    attend,
    attend_cached,
    keeps_scores,
    rotate,
    rotated_heads,
    soft_cap,
    split_heads,
    write_slots,
)
from pallas_kernels.decode import Carried, Decoded, DecoderLayer, after_attention, begin_decoding, decode_layers
from pallas_kernels.feed_forward import feed_forward, feed_forward_by
from pallas_kernels.heads import project_heads, project_heads_by
from pallas_kernels.norm import LayerNorm, Norm, add_norm, layer_norm, normed, rms_norm
from pallas_kernels.padded_attention import attend_padded, attend_padded_by
from pallas_kernels.persistent.layers import gains_by_absorbing
from pallas_kernels.persistent.stalls import stall_reason
from pallas_kernels.products import adds_as_it_writes, project
from pallas_kernels.projection import PackedProjection, Projection, hardware_rank, pack
from pallas_kernels.registry import (
    MOST_KINDS,
    Implementation,
    Op,
    add_choices,
    implementation_names,
    layer_kinds,
    of_kinds,
    ops,
    prefer,
    record,
)
from pallas_kernels.rounding import power_of_two
from pallas_kernels.target import Target, assume_target, target

# After Triton's kernels, so that they are tried before them: what is registered last comes first.
_hopper.register()
_cudnn.register()

__flashsvd__ = True  # marks this project's own packages; see flashsvd_jax._siblings

__all__ = [
    "ACTIVATIONS",
    "MOST_KINDS",
    "Carried",
    "Decoded",
    "DecoderLayer",
    "Implementation",
    "LayerNorm",
    "Norm",
    "Op",
    "PackedProjection",
    "Projection",
    "Target",
    "Visible",
    "add_choices",
    "add_norm",
    "adds_as_it_writes",
    "after_attention",
    "assume_target",
    "attend",
    "attend_cached",
    "attend_padded",
    "attend_padded_by",
    "begin_decoding",
    "decode_layers",
    "feed_forward",
    "feed_forward_by",
    "gains_by_absorbing",
    "hardware_rank",
    "implementation_names",
    "keeps_scores",
    "layer_kinds",
    "layer_norm",
    "normed",
    "of_kinds",
    "ops",
    "pack",
    "power_of_two",
    "prefer",
    "project",
    "project_heads",
    "project_heads_by",
    "record",
    "rms_norm",
    "rotate",
    "rotated_heads",
    "soft_cap",
    "split_heads",
    "stall_reason",
    "target",
    "write_slots",
]
