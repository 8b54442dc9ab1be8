"""Packing, iterations and warm-up."""

import pytest

from core.data.arithmetic import map_num_proc, pack, percentile, plan_iterations, suggest_max_length


def test_known_loss_by_packing_with_many_processes():
    """64 rows with 4928 tokens: 4864 kept by one process, 4096 by 32 (measured with XTuner 0.2.0)."""
    lengths = [77] * 64
    assert pack(lengths, 64, 1).kept_tokens == 64 * (64 * 64 // 64)
    alone, many = pack(lengths, 128, 1), pack(lengths, 128, 32)
    assert alone.kept_tokens + alone.lost_tokens == 4928
    assert alone.kept_tokens == 4864
    assert many.kept_tokens == 4096
    assert many.lost_share == pytest.approx(0.169, abs=0.001)


def test_rows_longer_than_max_length_are_cut_before_packing():
    assert pack([500, 10], 100).samples == 1
    assert pack([500, 100], 100).kept_tokens == 200


def test_few_tokens_make_one_short_sample():
    assert pack([10, 20], 100) == pack([30], 100)
    assert pack([10], 100).samples == 1
    assert pack([], 100).samples == 0


def test_rest_of_a_batch_of_a_thousand_is_carried_on():
    assert pack([3] * 2000, 1000).samples == 6


def test_iterations_for_ranks_batches_and_accumulation():
    plan = plan_iterations(100, batch_size=4, accumulative_counts=4, max_epochs=3, world_size=2, warmup_ratio=0.03)
    assert (plan.iterations_per_epoch, plan.iterations, plan.optimizer_steps, plan.warmup_iterations) == (13, 39, 10, 1)
    assert plan.is_warmup_possible
    assert (
        plan_iterations(
            100, batch_size=4, accumulative_counts=4, max_epochs=3, world_size=2, has_deepspeed=True
        ).optimizer_steps
        == 9
    )


def test_warm_up_of_a_small_set_is_impossible():
    assert not plan_iterations(33, batch_size=1, max_epochs=1, warmup_ratio=0.03).is_warmup_possible
    assert plan_iterations(34, batch_size=1, max_epochs=1, warmup_ratio=0.03).is_warmup_possible


@pytest.mark.parametrize(("rows", "cpus", "expected"), [(10, 8, 1), (1000, 8, 2), (5500, 8, 6), (100_000, 8, 8)])
def test_map_num_proc(rows: int, cpus: int, expected: int):
    assert map_num_proc(rows, cpus) == expected


def test_percentiles_and_suggested_length():
    lengths = list(range(1, 101))
    assert (percentile(lengths, 50), percentile(lengths, 99), percentile([], 50)) == (50, 99, 0)
    assert suggest_max_length(lengths) == 128
    assert suggest_max_length([900] * 100) == 1024
    assert suggest_max_length([9000] * 100, limit=4096) == 4096


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="max_length"):
        pack([1], 0)
    with pytest.raises(ValueError, match="batch_size"):
        plan_iterations(10, batch_size=0)
