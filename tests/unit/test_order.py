"""Which samples, in which order, for which rank: nothing twice, nothing lost, nothing that depends
on the machine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dist_resnet.config.plan import Plan, make_plan
from dist_resnet.config.schema import Config, DataConfig, ParallelConfig
from dist_resnet.data.order import eval_batches, rank_order, split_indices

WORLDS = (1, 2, 3, 4, 7)


def _plan(images: int, ranks: int, replicas: int | str = "auto", batch: int = 32) -> Plan:
    config = Config(
        parallel=ParallelConfig(replicas=replicas), data=DataConfig(batch_size_per_replica=batch)
    )
    return make_plan(config, images, ranks)


def _epoch(plan: Plan, indices: np.ndarray, seed: int = 0, epoch: int = 0) -> np.ndarray:
    """(steps, global batch): every rank's part side by side."""
    parts = [rank_order(seed, epoch, 0, indices, plan, rank) for rank in range(plan.world_size)]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("images", [1437, 50_000, 224])
def test_no_index_twice_and_only_the_incomplete_last_batch_missing(ranks: int, images: int) -> None:
    plan, indices = _plan(images, ranks), np.arange(images)
    for epoch in range(3):
        seen = _epoch(plan, indices, epoch=epoch).flatten()
        assert len(np.unique(seen)) == len(seen)
        assert len(seen) == images // (32 * ranks) * 32 * ranks
        assert set(seen.tolist()) <= set(range(images))


def test_what_is_left_out_differs_from_epoch_to_epoch() -> None:
    plan, indices = _plan(1437, 4), np.arange(1437)
    missing = [
        frozenset(range(1437)) - set(_epoch(plan, indices, epoch=e).flatten().tolist())
        for e in range(30)
    ]
    assert {len(m) for m in missing} == {1437 % 128}
    counts = np.bincount([i for m in missing for i in m], minlength=1437)
    assert counts.max() < 12  # 0.6 expected each


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_batches_do_not_depend_on_the_spread_of_replicas(ranks: int) -> None:
    indices = np.random.default_rng(0).permutation(5000)[:4000]
    alone, spread = (_plan(4000, size, replicas=12) for size in (1, ranks))
    first, second = (_epoch(plan, indices, seed=3, epoch=5) for plan in (alone, spread))
    assert np.array_equal(first, second)
    # And every replica's batch is the same run of it, on whichever rank it is.
    per_rank = 12 // ranks
    for replica in range(12):
        rank, position = divmod(replica, per_rank)
        mine = rank_order(3, 5, 0, indices, spread, rank)
        part = mine[:, position * 32 : (position + 1) * 32]
        assert np.array_equal(part, first[:, replica * 32 : (replica + 1) * 32])


@pytest.mark.parametrize("ranks", WORLDS)
def test_starting_at_any_step_gives_the_rest(ranks: int) -> None:
    plan, indices = _plan(1437, ranks), np.arange(1437)
    for rank in {0, ranks - 1}:
        whole = rank_order(1, 2, 0, indices, plan, rank)
        assert whole.shape == (plan.steps_per_epoch, 32)
        for step in range(plan.steps_per_epoch + 1):
            assert np.array_equal(rank_order(1, 2, step, indices, plan, rank), whole[step:])


def test_order_is_a_function_of_seed_and_epoch() -> None:
    plan, indices = _plan(1437, 1), np.arange(1437)
    orders = {
        (seed, epoch): _epoch(plan, indices, seed, epoch).tobytes()
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == 16
    assert orders[2, 3] == _epoch(plan, indices, 2, 3).tobytes()


def test_order_is_shuffled() -> None:
    """Labels of a set sorted by class: every batch sees the classes as chance would have it."""
    labels = np.repeat(np.arange(10), 5000)
    batches = labels[_epoch(_plan(50_000, 1), np.arange(50_000))]
    found = [stats.chisquare(np.bincount(row, minlength=10)).statistic for row in batches]
    assert float(np.mean(found)) == pytest.approx(9, rel=0.05)  # degrees of freedom
    assert len(np.unique(batches, axis=0)) == len(batches)


def test_only_the_given_indices_are_used() -> None:
    indices = np.array([3, 1_000_000, 17, 5, 99, 12, 8])
    found = _epoch(_plan(7, 1, batch=2), indices)
    assert found.shape == (3, 2)
    assert set(found.flatten()) < set(indices)


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize(("images", "size"), [(10_000, 500), (29, 4), (3, 500), (360, 7), (7, 1)])
def test_every_image_is_evaluated_exactly_once(ranks: int, images: int, size: int) -> None:
    indices = np.random.default_rng(1).permutation(images)
    mine = [eval_batches(indices, size, rank, ranks) for rank in range(ranks)]
    seen = [i for batches in mine for batch in batches for i in batch.tolist()]
    assert sorted(seen) == list(range(images))
    # The batches of one process, dealt out in turn: an image's neighbours never change.
    alone = eval_batches(indices, size, 0, 1)
    for rank, batches in enumerate(mine):
        for turn, batch in enumerate(batches):
            assert np.array_equal(batch, alone[rank + turn * ranks])
    counts = [len(batches) for batches in mine]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("total", "held_out"), [(50_000, 5000), (1437, 1), (10, 9), (10, 0)])
def test_validation_split_is_disjoint_and_complete(total: int, held_out: int) -> None:
    kept, out = split_indices(7, total, held_out)
    assert (len(kept), len(out)) == (total - held_out, held_out)
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(total))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(out) > 0).all()
    again = split_indices(7, total, held_out)
    assert np.array_equal(again[0], kept)
    assert np.array_equal(again[1], out)


def test_validation_split_depends_on_the_seed_and_is_spread_evenly() -> None:
    splits = [split_indices(seed, 50_000, 5000)[1] for seed in range(3)]
    for i, one in enumerate(splits):
        for other in splits[:i]:
            shared = len(np.intersect1d(one, other))
            assert shared == pytest.approx(500, abs=100)  # a tenth of a tenth
    counts = np.bincount(splits[0] // 5000, minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-4


@given(
    ranks=st.integers(1, 8),
    each=st.integers(1, 3),
    batch=st.integers(1, 9),
    images=st.integers(1, 300),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 200),
)
def test_any_plan_uses_no_index_twice(
    ranks: int, each: int, batch: int, images: int, seed: int, epoch: int
) -> None:
    size = ranks * each * batch
    if images < size:
        return
    plan = _plan(images, ranks, ranks * each, batch)
    seen = _epoch(plan, np.arange(images), seed, epoch).flatten()
    assert len(set(seen.tolist())) == len(seen) == images - images % size
