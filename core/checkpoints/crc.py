"""CRC-32 of a whole from the CRC-32s of its parts, so that the parts can be written in any order and by several threads.

A CRC is the remainder of a polynomial over GF(2), so putting bytes behind others multiplies by a power of x (as zlib's `crc32_combine`
does; polynomial of ISO 3309, bits reversed).
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

_POLYNOMIAL: Final = 0xEDB88320
_ONE: Final = 1 << 31
_ALL: Final = 0xFFFFFFFF


def combine(first: int, second: int, second_bytes: int) -> int:
    """CRC of two byte strings put end to end, from the CRC of each."""
    return _times(_power(second_bytes), first) ^ second


def of_zeros(count_bytes: int) -> int:
    """CRC of so many zero bytes."""
    return _times(_power(count_bytes), _ALL) ^ _ALL


def of_parts(parts: Iterable[tuple[int, int, int]], size_bytes: int) -> int:
    """CRC of `size_bytes` bytes from (offset, bytes, CRC) of the parts that are in it; between and behind them are zeros."""
    whole, end = 0, 0
    for offset, count, crc in sorted(parts):
        if offset < end or offset + count > size_bytes:
            raise ValueError(f"parts overlap or leave their room at {offset}")
        whole = combine(combine(whole, of_zeros(offset - end), offset - end), crc, count)
        end = offset + count
    return combine(whole, of_zeros(size_bytes - end), size_bytes - end)


@lru_cache(maxsize=4096)
def _power(count_bytes: int) -> int:
    """x to the number of bits, modulo the polynomial."""
    result, exponent, square = _ONE, count_bytes * 8, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _times(square, result)
        square = _times(square, square)
        exponent >>= 1
    return result


def _times(first: int, second: int) -> int:
    """Product of two polynomials modulo the polynomial; the highest bit is the constant term."""
    product = 0
    for bit in range(31, -1, -1):
        if first >> bit & 1:
            product ^= second
        second = second >> 1 ^ (_POLYNOMIAL if second & 1 else 0)
    return product
