"""Random numbers: SplitMix64's published outputs, a second implementation, and statistics.

Every statistical test has fixed seeds: it passes always or never. A p-value below 1e-4 fails.
"""

import hashlib
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats

from dist_resnet.base.randomness import (
    Stream,
    below,
    epoch_order,
    named_lanes,
    permutation,
    sample_lanes,
    splitmix64,
    step_keys,
    stream_key,
    whole_below,
)

ALPHA = 1e-4
MASK = (1 << 64) - 1


def _reference(state: int, count: int) -> list[int]:
    """Vigna's splitmix64.c, in Python's integers: the state advances, then is mixed."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def _unsigned(bits: torch.Tensor) -> list[int]:
    return [value & MASK for value in bits.flatten().tolist()]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def test_published_vectors() -> None:
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64, seed 1234567
    expected = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip
    assert _unsigned(splitmix64(torch.tensor(1234567), torch.arange(5))) == expected
    assert _reference(1234567, 5) == expected


@pytest.mark.parametrize("state", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0xDEADBEEFCAFEF00D])
def test_second_implementation(state: int) -> None:
    found = splitmix64(torch.tensor(_signed(state)), torch.arange(1000))
    assert _unsigned(found) == _reference(state, 1000)


def test_the_chain_of_keys_by_hand() -> None:
    seed, step, sample, lane = 77, 12, 345, 6

    def output(state: int, index: int) -> int:
        return _reference(state, index + 1)[index]

    expected = output(output(output(output(seed, int(Stream.STEP)), step), sample), lane) >> 32
    draws = sample_lanes(step_keys(seed, 20)[step], torch.tensor([3, sample]), 9)
    assert draws[1, lane] == expected


def test_keys_differ_between_seeds_streams_and_steps() -> None:
    keys = [int(stream_key(seed, stream)) for seed in range(200) for stream in Stream]
    assert len(set(keys)) == len(keys)
    steps = step_keys(0, 100_000)
    assert len(steps.unique()) == 100_000
    assert torch.equal(step_keys(0, 10), steps[:10])  # not a function of the run's length
    assert not set(step_keys(1, 1000).tolist()) & set(steps.tolist())


def test_draws_of_a_sample_depend_on_nothing_else() -> None:
    key = step_keys(5, 8)[7]
    samples = torch.tensor([4, 900, 17, 4])
    on_every_rank = sample_lanes(key, samples, 12)
    for row, sample in enumerate(samples):
        assert torch.equal(on_every_rank[row], sample_lanes(key, sample.view(1), 12)[0])
    assert torch.equal(on_every_rank[:, :5], sample_lanes(key, samples, 5))


def test_draws_are_uniform() -> None:
    draws = sample_lanes(step_keys(1, 1)[0], torch.arange(25_000), 8).flatten()
    assert int(draws.min()) >= 0
    assert int(draws.max()) < 1 << 32
    for shift in (0, 8, 16, 24):  # every byte
        counts = torch.bincount((draws >> shift) & 255, minlength=256).numpy()
        assert stats.chisquare(counts).pvalue > ALPHA
    bits = (draws.unsqueeze(1) >> torch.arange(32)) & 1
    z = (bits.double().mean(dim=0) - 0.5).abs() * 2 * len(draws) ** 0.5
    assert float(z.max()) < 4.5


def _pairs(what: str) -> tuple[torch.Tensor, torch.Tensor]:
    keys = step_keys(2, 201)
    if what == "samples":
        draws = torch.stack([sample_lanes(key, torch.arange(201), 1)[:, 0] for key in keys])
        return draws[:, :-1], draws[:, 1:]
    if what == "steps":
        draws = torch.stack([sample_lanes(key, torch.arange(201), 1)[:, 0] for key in keys])
        return draws[:-1], draws[1:]
    if what == "lanes":
        draws = sample_lanes(keys[0], torch.arange(201), 201)
        return draws[:, :-1], draws[:, 1:]
    if what == "step and sample":  # (t, s + 1) and (t + 1, s) must not meet either
        draws = torch.stack([sample_lanes(key, torch.arange(201), 1)[:, 0] for key in keys])
        return draws[:-1, 1:], draws[1:, :-1]
    draws = torch.stack([sample_lanes(step_keys(s, 1)[0], torch.arange(201), 1)[:, 0]
                         for s in range(201)])  # fmt: skip
    return draws[:-1], draws[1:]


@pytest.mark.parametrize("what", ["samples", "steps", "lanes", "step and sample", "seeds"])
def test_neighbours_are_independent(what: str) -> None:
    first, second = (part.flatten() for part in _pairs(what))
    cells = below(first, 16) * 16 + below(second, 16)
    counts = torch.bincount(cells, minlength=256).numpy()
    assert stats.chisquare(counts).pvalue > ALPHA
    correlation = np.corrcoef(first.numpy(), second.numpy())[0, 1]
    assert abs(correlation) < 4 / len(first) ** 0.5


@pytest.mark.parametrize("bound", [1, 2, 9, 10, 32, 65536])
def test_below_is_in_range_and_even(bound: int) -> None:
    edges = torch.tensor([0, (1 << 32) - 1])
    assert below(edges, bound).tolist() == [0, bound - 1]
    draws = sample_lanes(step_keys(4, 1)[0], torch.arange(40_000), 1)[:, 0]
    exact = [value * bound // 2**32 for value in draws[:500].tolist()]
    assert below(draws, bound)[:500].tolist() == exact
    if 1 < bound < 100:
        counts = torch.bincount(below(draws, bound), minlength=bound).numpy()
        assert stats.chisquare(counts).pvalue > ALPHA


@pytest.mark.parametrize("size", [0, 1, 2, 3, 53, 50_000])
def test_permutations_are_permutations(size: int) -> None:
    order = epoch_order(3, 2, size)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(size))


def test_permutations_of_four_are_equally_likely() -> None:
    keys = step_keys(6, 24_000)
    found = Counter(tuple(permutation(key, 4).tolist()) for key in keys)
    counts = [found[order] for order in permutations(range(4))]
    assert sum(counts) == 24_000
    assert stats.chisquare(counts).pvalue > ALPHA


def test_a_large_permutation_mixes() -> None:
    order = epoch_order(0, 0, 50_000).numpy()
    assert abs(stats.spearmanr(order, np.arange(50_000)).statistic) < 4 / 50_000**0.5
    # A uniform one has, on average, one fixed point, and one pair of old neighbours each way.
    assert (order == np.arange(50_000)).sum() < 8
    assert (np.abs(np.diff(order)) == 1).sum() < 12


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = [epoch_order(seed, epoch, 1000) for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert int((one == other).sum()) < 10
    assert torch.equal(orders[4], epoch_order(1, 1, 1000))


def test_no_global_generator_is_read_or_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = epoch_order(9, 9, 100)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first, epoch_order(9, 9, 100))


def _mixed(state: int, index: int) -> int:
    return _reference((state + index * 0x9E3779B97F4A7C15) & MASK, 1)[0]


@pytest.mark.parametrize("index", [0, 7, 2**63 - 1, 2**63, 2**64 - 1, 0xDEADBEEFCAFEF00D])
def test_an_index_may_be_any_number_of_64_bits(index: int) -> None:
    key = stream_key(5, Stream.STEP)
    (state,) = _unsigned(key)
    assert _unsigned(splitmix64(key, index)) == [_mixed(state, index)]
    assert torch.equal(splitmix64(key, index), splitmix64(key, torch.tensor(_signed(index))))


def test_a_named_stream_in_pythons_integers() -> None:
    key = step_keys(2, 4)[3]
    (state,) = _unsigned(key)
    first = int.from_bytes(hashlib.sha256(b"augment.erasing").digest()[:8], "big")
    found = named_lanes(key, "augment.erasing", torch.tensor([3, 41_000]), 5)
    for row, sample in zip(found.tolist(), (3, 41_000), strict=True):
        root = _mixed(_mixed(state, first), sample)
        assert row == [(_mixed(root, lane) >> 40) / 2**24 for lane in range(5)]


def test_whole_numbers_below_a_bound() -> None:
    edges = torch.tensor([0.0, 0.5, 1 - 2.0**-24])
    for bound in (1, 14, 31, 33, 4097):
        assert whole_below(edges, bound).tolist() == [0, bound // 2, bound - 1]
        # The last draws that are below a whole number.
        last = [((number << 24) - 1) // bound for number in range(1, bound + 1)]
        found = whole_below(torch.tensor(last) * 2.0**-24, bound)
        assert found.tolist() == list(range(bound))
    bounds = torch.tensor([3, 1, 8])
    assert whole_below(edges, bounds).tolist() == [0, 0, 7]
