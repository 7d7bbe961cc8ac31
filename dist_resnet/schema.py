"""Every configuration key: its type, its default and, as the string below it, its meaning.

The defaults are the recipe: ResNet-20 on CIFAR-10, batch 32 per replica, SGD with a cosine from 0.05.
All values are immutable; whatever follows from them is computed in `plan.py`, never written back.
"""

from dataclasses import dataclass, field
from typing import Literal


def _require(condition: bool, key: str, value: object, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value}: must be {wanted}")


@dataclass(frozen=True)
class RunConfig:
    dir: str = "runs"
    """Folder that holds the run folders."""
    name: str | None = None
    """Name of the run folder; null: <model>-<dataset>-s<seed>-<hash of the configuration>."""
    resume: str = "auto"
    """auto: continue from the newest valid checkpoint; never: start anew; PATH: from that file."""
    overwrite: bool = False
    """Delete what the run folder holds and start again."""

    def __post_init__(self) -> None:
        name_ok = self.name is None or (
            0 < len(self.name) <= 64 and not set(self.name) & set('/\\#?%:"') and self.name[0] != "."
        )
        _require(name_ok, "run.name", self.name, "1 to 64 characters, without / \\ # ? % : or a first dot")
        _require(self.resume != "", "run.resume", self.resume, "auto, never or a checkpoint's path")


@dataclass(frozen=True)
class DataConfig:
    dataset: str = "cifar10"
    """Name of a prepared dataset below data.root; cifar10, cifar100 and digits are prepared when missing."""
    root: str = "data"
    """Folder that holds the prepared datasets."""
    loader: Literal["ffcv", "resident"] = "ffcv"
    """ffcv: stream from the .beton file; resident: the whole set in the device's memory."""
    batch_size_per_replica: int = 32
    """Images in one replica's batch, over which its BatchNorm statistics are taken."""
    val_split: int = 0
    """Training images held out, fixed by the seed, and evaluated in place of the test set; 0: none."""

    def __post_init__(self) -> None:
        key, size = "data.batch_size_per_replica", self.batch_size_per_replica
        _require(size >= 1, key, size, "at least 1")
        _require(self.val_split >= 0, "data.val_split", self.val_split, "at least 0")
        plain = self.dataset not in ("", ".", "..") and "/" not in self.dataset
        _require(plain, "data.dataset", self.dataset, "a name, not a path")


@dataclass(frozen=True)
class AugmentConfig:
    crop_padding: int = 4
    """Zero padding, in pixels, before the random crop; 0: no crop."""
    flip: bool = True
    """Flip each image horizontally with probability 1/2."""
    mixup_alpha: float = 0.2
    """Parameter of the Beta distribution of mixup's weight (Zhang et al. 2017); 0: no mixup."""
    cutout: int = 0
    """Side, in pixels, of the square set to the mean (DeVries and Taylor 2017); 0: none."""

    def __post_init__(self) -> None:
        _require(0 <= self.crop_padding <= 64, "augment.crop_padding", self.crop_padding, "0 to 64")
        _require(0 <= self.mixup_alpha <= 100, "augment.mixup_alpha", self.mixup_alpha, "0 to 100")
        _require(self.cutout >= 0, "augment.cutout", self.cutout, "at least 0")


@dataclass(frozen=True)
class ModelConfig:
    name: Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "m6"] = "resnet20"
    """resnetN: He et al. 2015, section 4.2; m6: six residual blocks at 32/64/128 filters."""
    widths: list[int] = field(default_factory=lambda: [16, 32, 64])
    """Filters of the three stages; m6 reads the default as its own 32/64/128."""
    shortcut: Literal["projection", "pad"] = "projection"
    """projection: 1x1 convolution and BatchNorm; pad: zero padding, without parameters."""
    dropout: float = 0.3
    """Probability of dropping a feature before the dense layer; 0: none."""

    def __post_init__(self) -> None:
        good = len(self.widths) == 3 and all(1 <= width <= 4096 for width in self.widths)
        _require(good, "model.widths", self.widths, "three numbers of filters, such as [16,32,64]")
        grows = good and self.widths[0] <= self.widths[1] <= self.widths[2]
        _require(self.shortcut == "projection" or grows, "model.widths", self.widths,
                 "non-decreasing with model.shortcut=pad")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "at least 0 and below 1")


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 0.05
    """Learning rate at optim.reference_batch_size; optim.lr_scaling turns it into the peak rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of convolution and dense weights; BatchNorm and biases have none."""
    nesterov: bool = False
    """Nesterov momentum."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the rate follows the global batch: not at all, in proportion (Goyal et al. 2017), by its root."""
    reference_batch_size: int = 32
    """Global batch size at which optim.lr holds."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes (Szegedy et al. 2016); 0: none."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < float("inf"), "optim.lr", self.lr, "above 0")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "at least 0 and below 1")
        _require(0 <= self.weight_decay < 1, "optim.weight_decay", self.weight_decay, "0 to 1")
        _require(not self.nesterov or self.momentum > 0, "optim.nesterov", "true",
                 "false where optim.momentum=0")
        size = self.reference_batch_size
        _require(size >= 1, "optim.reference_batch_size", size, "at least 1")
        smoothing = self.label_smoothing
        _require(0 <= smoothing < 1, "optim.label_smoothing", smoothing, "at least 0 and below 1")


@dataclass(frozen=True)
class ScheduleConfig:
    name: Literal["cosine", "step", "onecycle"] = "cosine"
    """cosine: to zero; step: a tenth at each milestone; onecycle: up and down in straight lines."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from zero; for onecycle, of the rise (0: 30% of the run)."""
    milestones: list[int] = field(default_factory=lambda: [80, 120])
    """Epochs after which schedule.name=step divides the rate by ten."""

    def __post_init__(self) -> None:
        warmup, marks = self.warmup_epochs, self.milestones
        _require(warmup >= 0, "schedule.warmup_epochs", warmup, "at least 0")
        rising = all(mark > 0 for mark in marks) and sorted(set(marks)) == list(marks)
        _require(rising, "schedule.milestones", marks, "rising epochs, such as [80,120]")


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 150
    """Passes over the training set."""
    max_steps: int | None = None
    """Stop after this many steps; the schedule is still that of train.epochs; null: no limit."""
    ema_decay: float = 0.0
    """Decay per step of the moving average of the weights that is evaluated; 0: none."""
    step_mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """How a step runs: eager, torch.compile, or captured whole in a CUDA graph; auto chooses and says so."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "train.epochs", self.epochs, "at least 1")
        steps_ok = self.max_steps is None or self.max_steps >= 1
        _require(steps_ok, "train.max_steps", self.max_steps, "at least 1, or null")
        _require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "at least 0 and below 1")


@dataclass(frozen=True)
class PrecisionConfig:
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of activations under autocast; auto: bf16 where the hardware has it, else fp32."""
    channels_last: bool = True
    """NHWC memory layout."""
    deterministic: bool = False
    """Only deterministic CUDA kernels: bitwise repeatable on GPUs, slower. On CPUs runs always are."""


@dataclass(frozen=True)
class ParallelConfig:
    replicas: int | str = "auto"
    """Replicas of the recipe; auto: one per rank at the start of the run, then kept; else a multiple of the ranks."""
    reduction: Literal["fast", "exact"] = "fast"
    """fast: one all-reduce; exact: gradients summed in replica order, bit for bit on any number of ranks."""
    timeout_seconds: int = 120
    """Longest wait for another rank; a rank without progress for so long ends the job with its stack."""
    threads: int = 0
    """CPU threads of a rank; 0: cores / local ranks, and 1 with parallel.reduction=exact."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""

    def __post_init__(self) -> None:
        value = self.replicas
        good = value == "auto" or (isinstance(value, int) and value >= 1)
        _require(good, "parallel.replicas", value, "auto or at least 1")
        timeout = self.timeout_seconds
        _require(timeout >= 1, "parallel.timeout_seconds", timeout, "at least 1")
        _require(self.threads >= 0, "parallel.threads", self.threads, "at least 0")


@dataclass(frozen=True)
class EvalConfig:
    every_epochs: int = 1
    """Evaluate after so many epochs, and always at the end."""
    flip_tta: bool = False
    """Also report val/top1_tta: the mean of the logits of each image and its mirror image."""

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 1, "eval.every_epochs", self.every_epochs, "at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    every_epochs: int = 1
    """Save after so many epochs, and always at the end; 0: only at the end."""
    every_steps: int = 0
    """Save also after so many steps; 0: not."""
    keep: int = 3
    """How many of the newest checkpoints are kept, beside the best."""

    def __post_init__(self) -> None:
        for key in ("every_epochs", "every_steps"):
            value = getattr(self, key)
            _require(value >= 0, f"checkpoint.{key}", value, "at least 0")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 50
    """Steps between two rows of training metrics: the only moments at which the host waits."""

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, "log.every_steps", self.every_steps, "at least 1")


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with a key and a reachable server, else offline; never a prompt."""
    project: str = "dist_resnet"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null: the account's own."""
    group: str | None = None
    """Group of runs, such as the seeds of one experiment."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""


@dataclass(frozen=True)
class Config:
    seed: int = 0
    """Together with the step and the sample, what every random choice is computed from."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        warmup, epochs = self.schedule.warmup_epochs, self.train.epochs
        _require(warmup < epochs, "schedule.warmup_epochs", warmup,
                 f"below train.epochs ({epochs})")


# Keys that do not alter the weights of any step: they may change when a run is continued.
FREE_SECTIONS = ("run", "eval", "checkpoint", "log", "wandb")
FREE_KEYS = frozenset({
    "data.root", "data.loader", "parallel.timeout_seconds", "parallel.threads", "train.max_steps",
    "train.step_mode",
})


def changes_trajectory(key: str) -> bool:
    """Whether `key`, dotted, decides what the weights are after a given number of steps."""
    return key.split(".")[0] not in FREE_SECTIONS and key not in FREE_KEYS
