"""Two real ranks: the flat all-reduce against torch's DistributedDataParallel, and its cost."""

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_resnet.base.errors import PeerLost, UserError
from dist_resnet.distributed import overlap, shared_sum
from dist_resnet.distributed.group import World
from dist_resnet.distributed.reduction import FastReduction
from dist_resnet.models.resnet import resnet
from dist_resnet.native.build import load
from dist_resnet.native.shared_sum import SharedSum
from dist_resnet.step.train_step import TrainStep
from tests.helpers.ranks import RankFailed, run_ranks
from tests.helpers.training import (
    CLASSES,
    CROSSED,
    PlainLoop,
    batch_of,
    forward,
    part_of,
    plain_optimizer,
    rates,
    small_config,
    take_momentum,
    train_step,
)

STEPS, RANKS = 10, 2
EMA = "train.ema_decay=0.9"


def _ours(
    world: World, *pairs: str, replicas: int = RANKS, batches: Iterable[int] = range(STEPS)
) -> TrainStep:
    step = train_step(small_config(EMA, *pairs), replicas)
    for number in batches:
        step(part_of(batch_of(number, replicas), world.rank, world.size))
    return step


def _clear_batches(replicas: int) -> list[int]:
    """Three in whose first step no value is so near a ReLU's 0 that rounding may move it across."""
    found: list[int] = []
    for number in range(100):
        plain = PlainLoop(small_config())
        plain.step(0, batch_of(number, replicas))
        found += [number] if plain.nearest > CROSSED else []
        if len(found) == 3:
            return found
    raise AssertionError("no such batches")


def _first_steps(
    world: World, batches: list[int], *pairs: str, replicas: int = RANKS
) -> list[dict[str, Any]]:
    """One step from the same weights with each batch."""
    steps = (_ours(world, *pairs, replicas=replicas, batches=[number]) for number in batches)
    return [vars(step.state.snapshot()) for step in steps]


def _collectives(world: World, step: TrainStep, replicas: int = RANKS) -> dict[str, int]:
    """Sums through shared memory, and what torch's profiler sees of c10d, during one step."""
    batch = part_of(batch_of(STEPS, replicas), world.rank, world.size)
    sums = Counter[str]()
    original = SharedSum.__call__

    def counted(share: SharedSum, tensor: Tensor) -> None:
        sums["shared memory"] += 1
        original(share, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedSum, "__call__", counted)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(batch)
    return sums + Counter(e.name for e in profile.events() if e.name.startswith("c10d::"))


def _beside_ddp(world: World, reduction: str) -> tuple[list[float], float, float]:
    """Ours and DDP, each step from our weights: the largest differences of each, and both losses.

    DDP's BatchNorm statistics are left to each rank and averaged after the step: they are linear.
    """
    config = small_config(f"parallel.reduction={reduction}")
    ours = train_step(config, RANKS)
    model = resnet(config.model, CLASSES, config.seed).to(memory_format=torch.channels_last)
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = plain_optimizer(model, config)
    total, apart = 0.0, []
    for number in range(STEPS):
        model.load_state_dict(ours.state.flat.model.state_dict())
        take_momentum(optimizer, model, ours.state)
        optimizer.zero_grad()
        batch = part_of(batch_of(number, RANKS), world.rank, world.size)
        loss, _ = forward(config, wrapped, number, batch)
        loss.backward()
        total += float(loss.detach())
        for group in optimizer.param_groups:
            group["lr"] = rates()[number]
        optimizer.step()
        for buffer in model.buffers():
            dist.all_reduce(buffer)
            buffer /= world.size
        ours(batch)
        found = ours.state.flat.model.state_dict()
        differences = [(found[k] - v).abs().max() for k, v in model.state_dict().items()]
        apart.append(float(torch.stack(differences).max()))
    share = torch.tensor(total, dtype=torch.float64)
    dist.all_reduce(share)
    sums = ours.state.snapshot().totals["sums"]
    return apart, float(sums[0, 0]) / STEPS, float(share) / (STEPS * world.size)


def _is_missing(*arguments: Any) -> None:
    raise OSError("not here")


def _everything(world: World, clear: dict[int, list[int]]) -> dict[str, Any]:
    """All that is asked of two ranks, in one start of them."""
    results: dict[str, Any] = {}
    for reduction in ("fast", "exact"):
        step = _ours(world, f"parallel.reduction={reduction}")
        results[reduction] = vars(step.state.snapshot())
        results[f"{reduction} collectives"] = _collectives(world, step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "LOCAL_WORLD_SIZE", "1")  # as if the other were elsewhere
        step = _ours(world)
        results["apart"] = vars(step.state.snapshot())
        results["apart collectives"] = _collectives(world, step)
    for missing in ("shared_memory", "SharedSum"):
        with pytest.MonkeyPatch.context() as patch:
            if world.rank == (0 if missing == "shared_memory" else 1):
                patch.setattr(shared_sum, missing, _is_missing)
            step = _ours(world)
            results[f"without {missing}"] = vars(step.state.snapshot())
            results[f"without {missing} collectives"] = _collectives(world, step)
    results["four"] = vars(_ours(world, "parallel.reduction=exact", replicas=4).state.snapshot())
    results["2, first steps"] = _first_steps(world, clear[2])
    results["4, first steps"] = _first_steps(world, clear[4], replicas=4)
    results["4 exact, first steps"] = _first_steps(
        world, clear[4], "parallel.reduction=exact", replicas=4
    )
    results["beside ddp"] = {kind: _beside_ddp(world, kind) for kind in ("fast", "exact")}
    return results


def _left_alone(world: World) -> str:
    """What a rank hears whose only peer has ended."""
    replace_by_sum = shared_sum.build_sum(4, torch.float32, world.device)
    if world.rank == 1:
        return ""
    with pytest.raises(PeerLost) as lost:
        replace_by_sum(torch.ones(4))
    return str(lost.value)


@pytest.fixture
def compiled() -> None:
    """Else sockets would be compared with sockets."""
    try:
        load("shared_sum")
    except UserError:
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="module")
def clear() -> dict[int, list[int]]:
    return {replicas: _clear_batches(replicas) for replicas in (2, 4)}


@pytest.fixture(scope="module")
def ranks(clear: dict[int, list[int]]) -> list[dict[str, Any]]:
    return run_ranks(RANKS, _everything, clear)


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


def _momentum(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    kept = state["optimizer"]["parameters"]
    return {name: entries["momentum_buffer"] for name, entries in kept.items()}


def _assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in ("model", "ema"):
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), (part, name)
    kept, others = _momentum(one), _momentum(other)
    assert kept.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in kept.items())
    assert torch.equal(one["totals"]["sums"], other["totals"]["sums"])


def _assert_same_but_for_rounding(
    found: list[dict[str, Any]], expected: list[dict[str, Any]]
) -> None:
    for one, other in zip(found, expected, strict=True):
        assert _distance(one["model"], other["model"]) <= 1e-6
        assert _distance(_momentum(one), _momentum(other)) <= 1e-5


@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_ten_steps_of_ddp(ranks: list[dict[str, Any]], reduction: str) -> None:
    """But for one, in which rounding may move a value to the other side of a ReLU."""
    for result in ranks:
        apart, loss, their_loss = result["beside ddp"][reduction]
        assert sorted(apart)[-2] <= 1e-6
        assert max(apart) <= 1e-3
        assert loss == pytest.approx(their_loss, rel=1e-5)


def test_training_moved_the_weights(ranks: list[dict[str, Any]]) -> None:
    """Or the comparisons above would compare nothing."""
    start = resnet(small_config().model, CLASSES, 0).state_dict()
    for name, tensor in ranks[0]["fast"]["model"].items():
        assert float((tensor - start[name]).abs().max()) > 1e-4, name


@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_all_ranks_hold_the_same_bits(ranks: list[dict[str, Any]], reduction: str) -> None:
    _assert_equal(ranks[0][reduction], ranks[1][reduction])


@pytest.mark.usefixtures("compiled")
def test_one_collective_a_step(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["fast collectives"] == {"shared memory": 1}
        assert result["apart collectives"] == {"c10d::allreduce_": 1}
        assert sum(result["exact collectives"].values()) == 1


@pytest.mark.usefixtures("compiled")
def test_shared_memory_and_sockets_give_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        _assert_equal(result["fast"], result["apart"])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("missing", ["shared_memory", "SharedSum"])
def test_what_one_rank_lacks_none_uses(ranks: list[dict[str, Any]], missing: str) -> None:
    for result in ranks:
        assert result[f"without {missing} collectives"] == {"c10d::allreduce_": 1}
        _assert_equal(result["fast"], result[f"without {missing}"])


@pytest.mark.usefixtures("compiled")
def test_a_lost_peer_is_named() -> None:
    assert run_ranks(RANKS, _left_alone)[0] == (
        "rank 0: lost contact with another: rank 1 has ended"
    )


def test_exact_and_fast_differ_by_rounding_only(ranks: list[dict[str, Any]]) -> None:
    _assert_same_but_for_rounding(ranks[0]["4 exact, first steps"], ranks[0]["4, first steps"])


@pytest.mark.parametrize(("replicas", "key"), [(2, "exact"), (4, "four")])
def test_exact_is_bit_for_bit_that_of_one_rank(
    ranks: list[dict[str, Any]], replicas: int, key: str
) -> None:
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    step = _ours(alone, "parallel.reduction=exact", replicas=replicas)
    _assert_equal(vars(step.state.snapshot()), ranks[0][key])


@pytest.mark.parametrize("replicas", [2, 4])
def test_fast_on_one_rank_differs_by_rounding_only(
    ranks: list[dict[str, Any]], clear: dict[int, list[int]], replicas: int
) -> None:
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    found = _first_steps(alone, clear[replicas], replicas=replicas)
    _assert_same_but_for_rounding(found, ranks[0][f"{replicas}, first steps"])


def _fail(world: World) -> None:
    if world.rank == 1:
        raise ValueError("rank 1 says no")
    dist.barrier()


def test_the_helper_passes_failures_on() -> None:
    with pytest.raises(RankFailed, match="rank 1 says no"):
        run_ranks(2, _fail)


def _in_chunks(world: World) -> dict[str, Any]:
    """Sums during the backward pass, and in one piece, through sockets."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if the other were elsewhere
    results: dict[str, Any] = {"remarks": []}
    for kind, large in (("whole", 2**40), ("chunks", 0)):
        for replicas in (2, 4, 12):  # 12: two passes on a rank, of which the last one sends
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(overlap, "LARGE", large)
                patch.setattr(overlap, "CHUNK", 2000)
                step = _ours(world, replicas=replicas, batches=range(4))
                results[f"{kind}, {replicas}"] = vars(step.state.snapshot())
        results["remarks"].append(step.reduction.remark)
        results[f"{kind} collectives"] = _collectives(world, step, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "LARGE", 0)
        patch.setattr(overlap, "CHUNK", 2000)
        results["again"] = vars(_ours(world, replicas=2, batches=range(4)).state.snapshot())
        results["early"] = _sent_during_backward(world)
        results["twice"] = _in_parts(world)
    return results


def _sent_during_backward(world: World) -> list[int]:
    """Chunks that were on their way when the first layer's gradient arrived, a step each."""
    # In bfloat16, where gradients of a smaller model are collected after the backward pass.
    step, found = train_step(small_config(), 2, torch.bfloat16), []
    assert isinstance(step.reduction, FastReduction)
    sums = step.reduction._chunks
    assert sums is not None
    first = next(step.state.flat.model.parameters())
    first.register_post_accumulate_grad_hook(lambda _: found.append(len(sums._waits)))
    for number in range(2):
        step(part_of(batch_of(number, 2), world.rank, world.size))
    return found


def _in_parts(world: World) -> str:
    """What is said of a layer whose gradient arrives twice in one backward pass."""
    step = train_step(small_config(), 2)
    assert isinstance(step.reduction, FastReduction)
    sums = step.reduction._chunks
    assert sums is not None
    step.reduction.expect_last(step.state.flat.exchange)
    parameter = next(p for p in step.state.flat.parameters if p in sums._of)
    sums._arrived(parameter)
    with pytest.raises(UserError) as caught:
        sums._arrived(parameter)
    return str(caught.value)


@pytest.fixture(scope="module")
def chunks() -> list[dict[str, Any]]:
    return run_ranks(RANKS, _in_chunks)


@pytest.mark.parametrize("replicas", [2, 4, 12])
def test_chunks_during_the_backward_pass_give_the_same_bits(
    chunks: list[dict[str, Any]], replicas: int
) -> None:
    for result in chunks:
        _assert_equal(result[f"chunks, {replicas}"], chunks[0][f"whole, {replicas}"])


def test_chunks_are_sent_while_the_backward_pass_goes_on(chunks: list[dict[str, Any]]) -> None:
    for result in chunks:
        whole, remark = result["remarks"]
        assert whole == ""
        sent = result["chunks collectives"]["c10d::allreduce_"]
        assert remark == f"gradients: 0 MB a step, summed in {sent} chunks during the backward pass"
        assert sent > 5
        assert result["whole collectives"] == {"c10d::allreduce_": 1}
        assert min(result["early"]) >= sent - 3
        _assert_equal(result["again"], result["chunks, 2"])
        assert "use_reentrant=False" in result["twice"]
