"""Kernels for NVIDIA GPUs from Ampere to Hopper, as Pallas-Triton tile programs."""

from pallas_kernels.attention import attend_cached
from pallas_kernels.products import project
from pallas_kernels.registry import Implementation
from pallas_kernels.triton import attention, products
from pallas_kernels.triton.call import unavailable

project.register(Implementation("triton", products.project, products.refuses, unavailable))
attend_cached.register(Implementation("triton", attention.attend_cached, attention.refuses, unavailable))
