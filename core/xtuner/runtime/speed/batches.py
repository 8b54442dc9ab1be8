"""Micro-batches as XTuner's loader gives them, made into one flat sequence of tokens with the samples' bounds.

Also the collate function that keeps the bounds of packed samples, which XTuner's own drops for batches larger than 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from core.xtuner.runtime.speed.attention import Segments

IGNORED: Final = -100


def collate(instances: Sequence[Mapping[str, Any]], pad_index: int = 0) -> dict[str, Any]:
    """Rows of a packed or plain dataset → XTuner's `{"data", "data_samples"}`, with `segments` (sample lengths of each row)."""
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in instances]
    labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in instances]
    segments = [_row_segments(row, len(row_ids)) for row, row_ids in zip(instances, ids, strict=True)]
    positions = [torch.cat([torch.arange(length) for length in row]) for row in segments]
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in ids], batch_first=True)
    return {
        "data": {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_index),
            "attention_mask": mask,
            "position_ids": pad_sequence(positions, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "segments": segments,
        },
        "data_samples": None,
    }


def _row_segments(row: Mapping[str, Any], length: int) -> list[int]:
    bounds = row.get("cumulative_len")
    if bounds is None:
        return [length]
    return [stop - start for start, stop in pairwise(bounds) if stop > start]


def without_bounds(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What XTuner's own collate function would have made of the same rows: for a model that computes as before."""
    data = {name: value for name, value in batch["data"].items() if name != "segments"}
    rows, width = data["input_ids"].shape
    data["position_ids"] = torch.arange(width)[None].repeat(rows, 1)
    return {**batch, "data": data}


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward and backward pass reads. All tensors are on the device; sizes are known on the host."""

    input_ids: Tensor
    """(tokens) int64"""
    positions: Tensor
    """(tokens) int64"""
    segments: Segments
    rows: Tensor
    """(predictions) int64: the tokens that predict a label"""
    targets: Tensor
    """(predictions) int64"""
    owners: Tensor
    """(predictions) int64: the micro-batch of each prediction"""
    shares: Tensor
    """(predictions) fp32: 1 / predictions of the micro-batch"""
    micro_batches: int
    longest_position: int


def flatten(micro_batches: Sequence[Mapping[str, Any]], device: torch.device, *, by_sample: bool = True) -> Pass:
    """Join micro-batches without padding. `by_sample`: attention stays inside each packed sample, else inside each row.

    A label is predicted by the token before it in the same segment, and weighs 1 / (labels in its micro-batch): the mean of a
    micro-batch, as the stock loss takes it.
    """
    columns: dict[str, list[Tensor]] = {
        name: [] for name in ("ids", "positions", "rows", "targets", "owners", "shares")
    }
    lengths: list[int] = []
    offset = 0
    for number, batch in enumerate(micro_batches):
        first_row = len(columns["rows"])
        for ids, labels, positions, row_lengths in _rows(batch, by_sample):
            predicts = torch.zeros(len(ids), dtype=torch.bool)
            predicts[:-1] = labels[1:] != IGNORED
            ends = torch.cumsum(torch.tensor(row_lengths), 0) - 1
            predicts[ends] = False
            rows = predicts.nonzero()[:, 0]
            columns["ids"].append(ids)
            columns["positions"].append(positions)
            columns["rows"].append(rows + offset)
            columns["targets"].append(labels[rows + 1])
            columns["owners"].append(torch.full_like(rows, number))
            lengths += row_lengths
            offset += len(ids)
        predicted = sum(len(rows) for rows in columns["rows"][first_row:])
        columns["shares"].append(torch.full((predicted,), 1.0 / max(1, predicted)))
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    longest = int(joined["positions"].max())
    moved = {name: _move(tensor, device) for name, tensor in joined.items()}
    return Pass(
        input_ids=moved["ids"],
        positions=moved["positions"],
        segments=Segments.of(lengths, device),
        rows=moved["rows"],
        targets=moved["targets"],
        owners=moved["owners"],
        shares=moved["shares"],
        micro_batches=len(micro_batches),
        longest_position=longest,
    )


def _rows(batch: Mapping[str, Any], by_sample: bool) -> Any:
    """Each row's tokens, labels, positions and segment lengths, padding taken away."""
    count, width = batch["input_ids"].shape
    mask = batch.get("attention_mask")
    segments = batch.get("segments") or _segments_of(batch.get("cumulative_len"))
    for index in range(count):
        keep = torch.ones(width, dtype=torch.bool) if mask is None else mask[index].bool().cpu()
        ids, labels = batch["input_ids"][index].cpu()[keep], batch["labels"][index].cpu()[keep]
        if by_sample and segments is not None:
            positions, lengths = batch["position_ids"][index].cpu()[keep], list(segments[index])
        else:
            positions, lengths = torch.arange(len(ids)), [len(ids)]
        if len(ids):
            yield ids, labels, positions, lengths


def _segments_of(bounds: Sequence[Tensor] | None) -> list[list[int]] | None:
    """The same from XTuner's own varlen collate function."""
    return None if bounds is None else [row.diff().tolist() for row in bounds]


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
