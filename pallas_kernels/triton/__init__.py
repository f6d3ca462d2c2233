"""Kernels for NVIDIA GPUs from Ampere to Blackwell, as Pallas-Triton tile programs."""

from pallas_kernels.attention import attend, attend_cached
from pallas_kernels.feed_forward import feed_forward as feed_forward_op
from pallas_kernels.norm import add_norm, layer_norm, rms_norm
from pallas_kernels.padded_attention import attend_padded
from pallas_kernels.products import project
from pallas_kernels.registry import Implementation
from pallas_kernels.triton import attention, feed_forward, flash, norms, products, streaming
from pallas_kernels.triton.call import unavailable

project.register(Implementation("triton", products.project, products.refuses, unavailable))
attend_cached.register(Implementation("triton", attention.attend_cached, attention.refuses, unavailable))
attend_padded.register(
    Implementation("stream", streaming.attend_padded, streaming.refuses, unavailable, slower=streaming.slower)
)
feed_forward_op.register(
    Implementation("stream", feed_forward.feed_forward, feed_forward.refuses, unavailable, slower=feed_forward.slower)
)
attend.register(Implementation("triton", flash.attend, flash.refuses, unavailable))
for _op in (rms_norm, layer_norm):
    _op.register(Implementation("triton", norms.run, norms.refuses, unavailable))
add_norm.register(Implementation("triton", norms.run_sum, norms.refuses_sum, unavailable))
