"""Counter-based random numbers: a pure function of (seed, stream, step or epoch, sample, lane).

SplitMix64 (Steele, Lea and Flood 2014) in 64-bit integer arithmetic: the same bits on every device,
on any number of ranks and after any restart, because there is no generator state to carry.
"""

import hashlib
from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Stream(IntEnum):
    """Independent uses of one seed."""

    ORDER = 1
    VAL_SPLIT = 2
    STEP = 3
    INIT = 4
    TURN = 5


def _signed(value: int) -> int:
    """The int64 with the same 64 bits, as torch has no arithmetic on unsigned integers."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift; torch's own extends the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def splitmix64(state: Tensor, index: Tensor | int) -> Tensor:
    """Output number `index` (from 0) of the SplitMix64 generator that starts at `state`.

    Args:
        state, index: int64, of shapes that broadcast; a number costs no copy to the device.

    Returns:
        int64 whose 64 bits are the output.
    """
    if isinstance(index, int):
        bits = state + _signed((index + 1) * _GOLDEN)
    else:
        bits = state + (index + 1) * _signed(_GOLDEN)
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_MIX_1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_MIX_2)
    return bits ^ _shift_right(bits, 31)


def stream_key(seed: int, stream: Stream, device: torch.device | str = "cpu") -> Tensor:
    """Key of one stream of one seed: int64, 0-dimensional."""
    state = torch.tensor(_signed(seed), dtype=torch.int64, device=device)
    return splitmix64(state, torch.tensor(int(stream), device=device))


def step_keys(seed: int, steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Keys of steps 0 to `steps` - 1: int64 of shape (steps,)."""
    return splitmix64(stream_key(seed, Stream.STEP, device), torch.arange(steps, device=device))


def sample_lanes(key: Tensor, samples: Tensor, lanes: int) -> Tensor:
    """Uniform integers in [0, 2^32), `lanes` for each sample.

    Args:
        key: int64, 0-dimensional, of one step.
        samples: int64 of shape (N,), indices in the dataset.

    Returns:
        int64 of shape (N, lanes); the draws of a sample depend on nothing else in the batch.
    """
    state = splitmix64(key, samples).unsqueeze(1)
    return _shift_right(splitmix64(state, torch.arange(lanes, device=samples.device)), 32)


def named_key(key: Tensor, name: str) -> Tensor:
    """Key of the stream called `name` below `key`: no other stream knows which others there are."""
    return splitmix64(key, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


def named_lanes(key: Tensor, name: str, samples: Tensor, lanes: int) -> Tensor:
    """As `sample_lanes`, of the stream called `name`, uniform in [0, 1): float32 (N, lanes)."""
    # 24 bits: what a float32 holds exactly.
    return (sample_lanes(named_key(key, name), samples, lanes) >> 8).float() * 2.0**-24


def turn_keys(
    seed: int, steps: int, steps_per_epoch: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Per step what alternates from epoch to epoch is drawn from: int64 (steps,).

    Of one stream of the seed, the same in all steps but for the lowest bit, the epoch's parity.
    """
    epochs = torch.arange(steps, device=device) // steps_per_epoch
    return (stream_key(seed, Stream.TURN, device) & -2) + epochs % 2


def alternate(turn: Tensor, samples: Tensor) -> Tensor:
    """A fair coin of each sample, the other side up in every other epoch: bool (N,).

    Args:
        turn: int64, 0-dimensional, of `turn_keys`.
        samples: int64 (N,), indices in the dataset.
    """
    coin = sample_lanes(turn & -2, samples, 1)[:, 0] < 1 << 31
    return coin ^ (turn & 1 == 1)


def below(draws: Tensor, bound: int) -> Tensor:
    """Integers in [0, bound) from draws in [0, 2^32), equally likely to within bound / 2^32."""
    return (draws * bound) >> 32


def whole_below(uniforms: Tensor, bound: int | Tensor) -> Tensor:
    """Integers in [0, bound) from draws in [0, 1) of 24 bits: int64 of the shape of both."""
    return (uniforms.double() * bound).long()


def permutation(key: Tensor, size: int) -> Tensor:
    """Random order of 0 to `size` - 1: int64 of shape (size,)."""
    return torch.argsort(splitmix64(key, torch.arange(size, device=key.device)), stable=True)


def epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    """Order in which epoch `epoch` (from 0) visits `size` samples: int64 of shape (size,)."""
    return permutation(splitmix64(stream_key(seed, Stream.ORDER), torch.tensor(epoch)), size)
