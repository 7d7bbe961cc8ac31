"""Which samples a rank visits, in which order, from any step on."""

import numpy as np

from dist_resnet.base.randomness import Stream, epoch_order, permutation, stream_key
from dist_resnet.config.plan import Plan


def split_indices(seed: int, num_train: int, val_split: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out indices, int64, each rising: a function of the seed.

    Returns:
        (num_train - val_split,) and (val_split,).
    """
    order = permutation(stream_key(seed, Stream.VAL_SPLIT), num_train).numpy()
    return np.sort(order[val_split:]), np.sort(order[:val_split])


def rank_order(
    seed: int, epoch: int, first_step: int, indices: np.ndarray, plan: Plan, rank: int
) -> np.ndarray:
    """Samples of one rank from step `first_step` of an epoch to its end.

    Every global batch is a run of the epoch's order, every replica's batch a run of that, so the
    batches do not depend on how the replicas are spread over ranks. Only the last images of the
    order, too few for a global batch, are left out.

    Args:
        first_step: from 0, within the epoch.
        indices: int64, the samples to train on.

    Returns:
        int64 of shape (steps left, replicas per rank * batch).
    """
    order = indices[epoch_order(seed, epoch, len(indices)).numpy()]
    used = order[: plan.steps_per_epoch * plan.global_batch_size]
    batches = used.reshape(plan.steps_per_epoch, plan.world_size, -1)
    return np.ascontiguousarray(batches[first_step:, rank])


def eval_batches(indices: np.ndarray, size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """This rank's evaluation batches: every `world_size`-th of the batches of one process.

    The same batches whatever the number of ranks, so an image's logits cannot depend on it; nothing
    padded, nothing left out.
    """
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    return batches[rank::world_size]
