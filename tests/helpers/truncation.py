"""Weights and inputs to truncate, and truncation written down with numpy."""

import numpy as np


def draw_weight(d_out: int, d_in: int) -> np.ndarray:
    return np.random.default_rng(d_out).normal(size=(d_out, d_in))


def draw_inputs(kind: str, d_in: int) -> np.ndarray:
    """Inputs [tokens, d_in] whose second moment is as the kind says."""
    rng = np.random.default_rng(7)
    tokens = 10 if kind == "few" else 200
    x = rng.normal(size=(tokens, d_in)) @ rng.normal(size=(d_in, d_in))
    if kind == "near-singular":
        x *= 10.0 ** -np.linspace(0, 6, d_in)
    elif kind == "singular":
        x[:, d_in // 2 :] = x[:, : d_in - d_in // 2]
    elif kind == "outliers":
        x[:, 3] *= 1e4
    elif kind == "dead":
        x[:, ::3] = 0
    return x


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Eckart and Young: the nearest matrix of a rank."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]
