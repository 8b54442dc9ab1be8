"""Rounding without torch, and tensors read in parts: numpy has no bfloat16, so its bits are checked against an independent rule."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from core.checkpoints.blocks import NotFiniteError, changed_blocks
from core.checkpoints.lora import Change
from core.checkpoints.tensors import DiskTensor, convert, is_finite, narrow, widen


def nearest_bfloat16(value: float) -> int:
    """By exact fractions: the nearer of the two neighbours, on a tie the one with the even last bit."""
    low = int(np.float32(value).view(np.uint32)) >> 16
    candidates = [low, low + 1]
    exact = [Fraction(float(np.uint32(bits << 16).view(np.float32))) for bits in candidates]
    distances = [abs(Fraction(value) - candidate) for candidate in exact]
    if distances[0] == distances[1]:
        return candidates[low & 1]
    return candidates[distances.index(min(distances))]


def test_bfloat16_rounds_to_nearest_even() -> None:
    random = np.random.default_rng(0)
    values = np.concatenate([
        random.standard_normal(500).astype(np.float32),
        (random.integers(0, 2**15, 500).astype(np.uint32) << 16 | 0x8000).view(np.float32),  # ties
        np.array([0.0, -0.0, 1e-40, -1e-40, 1.0, 65504.0, 3.0e38], np.float32),
    ])  # fmt: skip
    values = values[np.isfinite(values)]
    assert narrow(values, "BF16").tolist() == [
        nearest_bfloat16(float(value)) if value or not np.signbit(value) else 0x8000 for value in values
    ]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_widening_and_narrowing_again_gives_the_same_bits(dtype: str) -> None:
    random = np.random.default_rng(1)
    bits = random.integers(0, 2**16, 2**14).astype(np.uint16)
    values = (
        bits if dtype == "BF16" else bits.view(np.float16) if dtype == "F16" else random.standard_normal(99, np.float32)
    )
    values = values[np.isfinite(widen(values, dtype))]
    assert np.array_equal(narrow(widen(values, dtype), dtype), values)


def test_not_finite_is_seen_in_every_type_and_kept() -> None:
    odd = np.array([1.0, np.nan, np.inf, -np.inf], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for dtype in ("F32", "F16", "BF16"):
            bits = narrow(odd, dtype)
            assert is_finite(bits[:1], dtype)
            assert not any(is_finite(bits[n : n + 1], dtype) for n in (1, 2, 3))
        assert not is_finite(narrow(np.array([3.4e38], np.float32), "BF16"), "BF16")
    assert convert(np.arange(3), "I64", "F32").dtype == np.int64


def stored(tmp_path: Path, values: np.ndarray, dtype: str) -> DiskTensor:
    file = tmp_path / f"{dtype}_{len(list(tmp_path.iterdir()))}.bin"
    file.write_bytes(narrow(values, dtype).tobytes())
    return DiskTensor(file, dtype, values.shape, 0)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(300, 700), (7, 1), (65537,), (1, 70001), ()])
def test_blocks_add_in_float32_and_round_once(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    base = stored(tmp_path, np.asarray(random.standard_normal(shape), np.float32), dtype)
    added = stored(tmp_path, np.asarray(random.standard_normal(shape), np.float32), "F32")
    found = np.concatenate([bits.copy() for _, bits in changed_blocks(base, Change(additions=[(added, 0.5)]))])
    expected = narrow(widen(base.read(), dtype) + added.read() * np.float32(0.5), dtype)
    assert np.array_equal(found.reshape(shape), expected)


@pytest.mark.parametrize(("dtype", "value"), [("F32", np.nan), ("BF16", np.inf), ("F16", 1e5), ("BF16", np.nan)])
def test_blocks_stop_at_what_is_not_finite(dtype: str, value: float, tmp_path: Path) -> None:
    added = np.zeros((40, 3000), np.float32)
    added[39, 2999] = value
    base = stored(tmp_path, np.ones((40, 3000), np.float32), dtype)
    change = Change(additions=[(stored(tmp_path, added, "F32"), 1.0)])
    with pytest.raises(NotFiniteError), np.errstate(all="ignore"):
        list(changed_blocks(base, change))
