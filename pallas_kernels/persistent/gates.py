"""Activations of gates, emitted: of one float a thread."""

import math
from collections.abc import Callable

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value


def silu(value: Value) -> Value:
    """x / (1 + exp(-x)); the constants are -log2(e) and 1."""
    exponential = "mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.f32 t, t; add.f32 t, t, 0f3F800000; "
    code = "{ .reg .f32 t; " + exponential + "rcp.approx.f32 t, t; mul.f32 $0, $1, t; }"
    return w.ptx(code, value, results=[w.float_type()])[0]


def gelu_tanh(value: Value) -> Value:
    """x (1 + tanh(u)) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3): as x / (1 + exp(-2 u)), which cancels nowhere."""
    square = w.mul_f(value, value)
    cubic = w.mul_f(value, w.add_f(w.mul_f(square, w.number(0.044715)), w.number(1.0)))
    exponential = w.power_of_two(w.mul_f(cubic, w.number(-2 * math.sqrt(2 / math.pi) * math.log2(math.e))))
    return w.mul_f(value, w.reciprocal(w.add_f(exponential, w.number(1.0))))


def gelu(value: Value) -> Value:
    """x (1 + erf(x / sqrt(2))) / 2: half the complement of erf(|x| / sqrt(2)), from which either side of zero follows without
    cancelling, is a polynomial in t = 1 / (1 + p |x| / sqrt(2)) times exp(-x^2 / 2) (Abramowitz and Stegun, 7.1.26)."""
    size = w.max_f(value, w.sub_f(w.number(0.0), value))
    t = w.reciprocal(w.add_f(w.mul_f(size, w.number(ERF_P / math.sqrt(2))), w.number(1.0)))
    tail = w.number(0.0)
    for coefficient in reversed(ERF_COEFFICIENTS):
        tail = w.mul_f(t, w.add_f(tail, w.number(coefficient / 2)))
    tail = w.mul_f(tail, w.power_of_two(w.mul_f(w.mul_f(value, value), w.number(-0.5 * math.log2(math.e)))))
    return w.mul_f(value, w.select(w.positive(value), w.sub_f(w.number(1.0), tail), tail))


ERF_P, ERF_COEFFICIENTS = 0.3275911, (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)

ACTIVATIONS: dict[str, Callable[[Value], Value]] = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}
