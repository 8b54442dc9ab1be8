"""llama.cpp's Q4_K and Q6_K with numpy: 256 weights share a scale, 16 or 32 of them a finer one. The `gguf` package can only read these.

Layouts as in ggml-common.h (`block_q4_K`, `block_q6_K`). The scale of 32 weights in Q4_K is the best of a few tried by least squares.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_TRIES: Final = (0.0, -0.9, -0.5, 0.4)
"""Added to the 15 steps of a range: a slightly narrower or wider range often rounds better."""


def quantize_q6_k(values: Floats) -> NDArray[np.uint8]:
    """Rows of a multiple of 256 float32 → rows of 210 bytes each 256: W ≈ d · scale · (q − 32), scales of 16 weights in 8 bits."""
    parts = values.reshape(-1, 16, 16)
    largest = np.take_along_axis(parts, np.abs(parts).argmax(axis=2, keepdims=True), axis=2)[..., 0]
    scales = largest / -32
    top = np.take_along_axis(scales, np.abs(scales).argmax(axis=1, keepdims=True), axis=1)
    d = (top / -128).astype(np.float16)
    wide = d.astype(np.float32)
    steps = np.clip(np.rint(scales * _inverse(wide)), -128, 127)
    q = (np.clip(np.rint(parts * _inverse(wide * steps)[..., None]), -32, 31) + 32).astype(np.uint8)
    low, high = (q & 15).reshape(-1, 2, 4, 32), (q >> 4).reshape(-1, 2, 4, 32)
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2).reshape(-1, 128)
    qh = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    blocks = np.concatenate([ql, qh, steps.astype(np.int8).view(np.uint8), d.view(np.uint8)], axis=1)
    return blocks.reshape(values.shape[0], -1)


def quantize_q4_k(values: Floats) -> NDArray[np.uint8]:
    """Rows of a multiple of 256 float32 → rows of 144 bytes each 256: W ≈ d · scale · q − dmin · min, both of 32 weights in 6 bits."""
    parts = values.reshape(-1, 8, 32)
    scales, mins = _fit(parts)
    d = (scales.max(axis=1, keepdims=True) / 63).astype(np.float16)
    dmin = (mins.max(axis=1, keepdims=True) / 63).astype(np.float16)
    wide, wide_min = d.astype(np.float32), dmin.astype(np.float32)
    steps = np.clip(np.rint(scales * _inverse(wide)), 0, 63)
    offsets = np.clip(np.rint(mins * _inverse(wide_min)), 0, 63)
    q = np.rint((parts + (wide_min * offsets)[..., None]) * _inverse(wide * steps)[..., None])
    q = np.clip(q, 0, 15).astype(np.uint8).reshape(-1, 4, 2, 32)
    packed = (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)
    halves = np.concatenate([d, dmin], axis=1).view(np.uint8)
    blocks = np.concatenate([halves, _pack_scales(steps.astype(np.uint8), offsets.astype(np.uint8)), packed], axis=1)
    return blocks.reshape(values.shape[0], -1)


def _fit(parts: Floats) -> tuple[Floats, Floats]:
    """Scale and minimum (≥ 0, to be taken away) of each group of 32."""
    low = np.minimum(parts.min(axis=2), 0)
    span = parts.max(axis=2) - low
    best_scale, best_min, best_error = span / 15, -low, np.full(span.shape, np.inf, dtype=np.float32)
    weight = np.abs(parts) + np.sqrt(np.square(parts).mean(axis=2, keepdims=True))
    total, mean = weight.sum(axis=2), (weight * parts).sum(axis=2)
    for extra in _TRIES:
        q = np.clip(np.rint((parts - low[..., None]) * ((15 + extra) * _inverse(span))[..., None]), 0, 15)
        weighted = weight * q
        first, second, cross = weighted.sum(axis=2), (weighted * q).sum(axis=2), (weighted * parts).sum(axis=2)
        determinant = total * second - first * first
        scale = (total * cross - mean * first) * _inverse(determinant)
        minimum = np.maximum(0, (first * cross - second * mean) * _inverse(determinant))
        # Where the minimum was held at 0, the scale alone is fitted anew.
        scale = np.where(minimum > 0, scale, cross * _inverse(second))
        error = (weight * np.square(scale[..., None] * q - minimum[..., None] - parts)).sum(axis=2)
        is_better = (error < best_error) & (scale > 0)
        best_scale, best_min = np.where(is_better, scale, best_scale), np.where(is_better, minimum, best_min)
        best_error = np.where(is_better, error, best_error)
    return best_scale, best_min


def _pack_scales(steps: NDArray[np.uint8], offsets: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Eight scales and eight minima of 6 bits in 12 bytes: the upper two bits of the last four lie with the first four."""
    return np.concatenate(
        [
            steps[:, :4] | (steps[:, 4:] >> 4) << 6,
            offsets[:, :4] | (offsets[:, 4:] >> 4) << 6,
            (steps[:, 4:] & 15) | (offsets[:, 4:] & 15) << 4,
        ],
        axis=1,
    )


def _inverse(values: Floats) -> Floats:
    """1/x, and 0 for 0."""
    inverse: Floats = np.divide(1, values, out=np.zeros_like(values), where=values != 0)
    return inverse
