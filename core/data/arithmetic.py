"""The arithmetic of a training run: packing, iterations, optimizer steps, warm-up. Pure numbers, standard library only.

Sources: XTuner 0.2.0 `dataset/huggingface.py` and `dataset/utils.py` (Packer), `engine/runner/loops.py` (TrainLoop); mmengine 0.10
`DefaultSampler`, `OptimWrapper.should_update`, `_ParamScheduler.build_iter_from_epoch`.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_MAP_BATCH: Final = 1000
"""Rows that `datasets.map(batched=True)` hands to the packer at a time."""


@dataclass(frozen=True, slots=True)
class Packing:
    """What packing makes of tokenised rows."""

    samples: int
    kept_tokens: int
    lost_tokens: int
    """Tokens in the last, incomplete piece of each map process: XTuner drops them."""

    @property
    def lost_share(self) -> float:
        total = self.kept_tokens + self.lost_tokens
        return self.lost_tokens / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a run is."""

    samples: int
    """Of the data set after packing."""
    iterations_per_epoch: int
    """Micro-steps of each rank."""
    iterations: int
    optimizer_steps: int
    warmup_iterations: int
    """0 with a warm-up ratio above 0 makes XTuner stop with "end should be larger than begin"."""

    @property
    def is_warmup_possible(self) -> bool:
        return self.warmup_iterations > 0


def map_num_proc(rows: int, cpus: int | None = None) -> int:
    """Processes for `map_num_proc`: one per 1000 rows, at most one a CPU. XTuner's 32 drops up to 17 % of a small set's tokens."""
    return max(1, min(cpus or os.cpu_count() or 1, rows // _MAP_BATCH + 1))


def pack(lengths: Sequence[int], max_length: int, num_proc: int = 1) -> Packing:
    """What XTuner's Packer makes of rows of these token counts, longer ones cut to `max_length`.

    Exact for one process in whatever order the rows come, as long as every 1000 rows fill one sample; with several processes the
    order (XTuner shuffles before it packs) moves the result by a sample or two. Raises ValueError for max_length < 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    cut = [min(length, max_length) for length in lengths]
    samples = kept = 0
    for shard in _shards(cut, num_proc):
        residual = 0
        for start in range(0, len(shard), _MAP_BATCH):
            residual += sum(shard[start : start + _MAP_BATCH])
            if residual >= max_length:
                samples += residual // max_length
                kept += residual - residual % max_length
                residual %= max_length
            elif residual > 0:
                samples, kept, residual = samples + 1, kept + residual, 0
    return Packing(samples, kept, sum(cut) - kept)


def plan_iterations(
    samples: int,
    *,
    batch_size: int,
    accumulative_counts: int = 1,
    max_epochs: float = 1,
    world_size: int = 1,
    warmup_ratio: float = 0.0,
    has_deepspeed: bool = False,
) -> Plan:
    """Iterations and optimizer steps for `samples` (after packing) on `world_size` ranks with `batch_size` samples each.

    The sampler fills the last round up, so that each rank gets as many samples; the loader keeps a last incomplete batch. Without
    DeepSpeed the last iteration updates the weights even if the accumulation is incomplete; DeepSpeed leaves the rest out.
    Raises ValueError for numbers below 1.
    """
    if min(batch_size, accumulative_counts, world_size) < 1 or max_epochs <= 0 or samples < 0:
        raise ValueError("batch_size, accumulative_counts and world_size must be at least 1, max_epochs above 0")
    per_epoch = math.ceil(math.ceil(samples / world_size) / batch_size)
    iterations = int(max_epochs * per_epoch)
    steps = iterations // accumulative_counts if has_deepspeed else math.ceil(iterations / accumulative_counts)
    return Plan(samples, per_epoch, iterations, steps, int(warmup_ratio * max_epochs * per_epoch))


def percentile(sorted_values: Sequence[int], percent: float) -> int:
    """The smallest value that at least `percent` % of the (sorted) values do not exceed; 0 of none."""
    if not sorted_values:
        return 0
    return int(sorted_values[max(0, math.ceil(len(sorted_values) * percent / 100) - 1)])


def suggest_max_length(sorted_lengths: Sequence[int], limit: int | None = None) -> int:
    """The smallest power of two (from 128) that cuts no more than 1 % of the rows, within the model's context `limit`."""
    needed = percentile(sorted_lengths, 99)
    suggested = 128
    while suggested < needed:
        suggested *= 2
    return min(suggested, limit) if limit else suggested


def _shards(values: list[int], count: int) -> list[list[int]]:
    """Contiguous parts as `Dataset.shard(contiguous=True)` cuts them: the first ones one longer where it does not divide."""
    count = max(1, min(count, len(values)))
    size, more = divmod(len(values), count)
    bounds = [index * size + min(index, more) for index in range(count + 1)]
    return [values[bounds[index] : bounds[index + 1]] for index in range(count)]
