"""Writes curves as a TensorBoard event file, without TensorBoard. Knows the two formats and nothing else.

Records: length (uint64), masked CRC-32C of it, data, masked CRC-32C of the data (tensorflow/core/lib/io/record_writer.h). Data: an
Event of tensorflow/core/util/event.proto with wall_time = 1 (double), step = 2 (int64), file_version = 3, summary = 5 → value = 1 →
tag = 1, simple_value = 2 (float).
"""

import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from core.errors import MachineError
from core.runs.curves import downsample
from core.runs.metrics import Metrics

_TAGS: Final = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "step_seconds": "time/step",
    "data_seconds": "time/data",
}
_MAX_POINTS: Final = 20_000
"""A curve; TensorBoard itself shows a thousand."""
_POLYNOMIAL: Final = 0x82F63B78


def write_events(metrics: Metrics, target: Path, validation: Sequence[tuple[int, float]] = ()) -> Path:
    """Write all curves of `metrics`, and the validation losses by iteration, to `target`. Raises MachineError on a full disk."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb") as stream:
            stream.write(record(_event(0.0, 0, b"\x1a" + _sized(b"brain.Event:2"))))
            for event in (*_events(metrics), *_validation_events(metrics, validation)):
                stream.write(record(event))
    except OSError as error:
        if target.is_file():
            target.unlink()
        raise MachineError("files.cannot_write", path=str(target), reason=error.strerror or str(error)) from error
    return target


def record(data: bytes) -> bytes:
    """One record of the file."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc(length)), data, struct.pack("<I", masked_crc(data))))


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted as record_writer.h does it, so that a CRC of a CRC is no trap."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _events(metrics: Metrics) -> Iterator[bytes]:
    for name, tag in _TAGS.items():
        values = metrics[name]
        for row in downsample(values, _MAX_POINTS).tolist():
            yield _scalar(tag, float(metrics["at"][row]), int(metrics["iteration"][row]), values[row])


def _validation_events(metrics: Metrics, validation: Sequence[tuple[int, float]]) -> Iterator[bytes]:
    for iteration, loss in validation:
        at = float(np.interp(iteration, metrics["iteration"], metrics["at"])) if len(metrics) else math.nan
        yield _scalar("validation/loss", at, iteration, loss)


def _scalar(tag: str, at: float, step: int, number: float) -> bytes:
    value = b"\x0a" + _sized(tag.encode()) + b"\x15" + struct.pack("<f", number)
    summary = b"\x2a" + _sized(b"\x0a" + _sized(value))
    return _event(0.0 if math.isnan(at) else at, step, summary)


def _event(wall_time: float, step: int, rest: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step) + rest


def _sized(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _table() -> tuple[int, ...]:
    """CRC-32C of each byte (Castagnoli; RFC 3720, appendix B.4)."""
    crcs = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crcs = np.where(crcs & 1, (crcs >> 1) ^ np.uint32(_POLYNOMIAL), crcs >> 1).astype(np.uint32)
    return tuple(crcs.tolist())


_TABLE: Final = _table()
