"""Every configuration key: its type, its default and, as the string below it, its meaning.

The defaults are the recipe: ResNet-20 on CIFAR-10, batch 32 per replica, SGD, cosine from 0.05. All
values are immutable; what follows from them is computed in `plan.py`, never written back; which of
them are possible is said in `checks.py`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


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
    extend: bool = False
    """Go on, also from its end, with another train.epochs or other named keys: a recorded fork."""
    allow_code_change: bool = False
    """Go on though the code of a plug-in has changed since the checkpoint: recorded."""


@dataclass(frozen=True)
class DataConfig:
    dataset: str = "cifar10"
    """A prepared dataset below data.root; cifar10, cifar100 and digits are prepared if missing."""
    root: str = "data"
    """Folder that holds the prepared datasets."""
    loader: Literal["ffcv", "resident"] = "ffcv"
    """ffcv: stream from the .beton file; resident: the whole set in the device's memory."""
    batch_size_per_replica: int = 32
    """Images in one replica's batch, over which its BatchNorm statistics are taken."""
    val_split: int = 0
    """Training images held out by the seed and evaluated in place of the test set; 0: none."""
    source: str | None = None
    """Your own images, module:callable, which the dataset is prepared from if missing."""
    normalisation: list[Any] | str = "dataset"
    """dataset: by the training set's statistics; imagenet; or [[means],[deviations]] in 0..1."""


@dataclass(frozen=True)
class AugmentConfig:
    crop_padding: int = 4
    """Padding, in pixels, before the random crop; 0: no crop."""
    padding_mode: Literal["zero", "reflect"] = "zero"
    """zero: black; reflect: the image mirrored at its edge pixels."""
    flip: bool | str = True
    """true: mirror each image with probability 1/2; alternating: in every other epoch; false."""
    trivial: bool = False
    """TrivialAugment, wide: one random operation an image (Mueller and Hutter 2021)."""
    jitter: float = 0.0
    """Brightness and contrast of each image times 1 - jitter to 1 + jitter; 0: as they are."""
    extra: list[Any] = field(default_factory=list)
    """Further ones, names of built-in ones or module:callable, or {name: ..., args: {...}}."""
    cutout: int = 0
    """Side, in pixels, of the square set to the mean (DeVries and Taylor 2017); 0: none."""
    erasing: float = 0.0
    """Probability of a rectangle of random size set to the mean (Zhong et al. 2017); 0: none."""
    mix: Literal["mixup", "cutmix", "both"] = "mixup"
    """How pairs are mixed; cutmix: a box of the other (Yun et al. 2019); both: by a draw."""
    mixup_alpha: float = 0.2
    """Parameter of the Beta distribution of mixup's weight (Zhang et al. 2017); 0: no mixup."""
    cutmix_alpha: float = 1.0
    """Parameter of the Beta distribution of the share that augment.mix=cutmix keeps."""


@dataclass(frozen=True)
class ModelConfig:
    name: str = "resnet20"
    """resnet20 to resnet110: He et al. 2015; m6: six wide blocks; or your own, module:callable."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of your own model, beside the number of classes."""
    init: str | None = None
    """Starting weights: a run, a checkpoint or a .safetensors file; null: random."""
    init_map: dict[str, Any] | str = "names"
    """How model.init's tensors find theirs: names; order; or {their prefix: ours, ...}."""
    bn_momentum: float | None = None
    """Weight of a batch in BatchNorm's running statistics; null: the net's own, mostly 0.1."""
    widths: list[int] = field(default_factory=lambda: [16, 32, 64])
    """Filters of the three stages; m6 reads the default as its own 32/64/128."""
    shortcut: Literal["projection", "pad"] = "projection"
    """projection: 1x1 convolution and BatchNorm; pad: zero padding, without parameters."""
    dropout: float = 0.3
    """Probability of dropping a feature before the dense layer; 0: none."""


@dataclass(frozen=True)
class OptimConfig:
    name: str = "sgd"
    """sgd; muon (convolutions: Jordan et al. 2024); or your own, such as torch.optim:AdamW."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of your own optimizer, beside the rate and the weight decay."""
    freeze: list[str] = field(default_factory=list)
    """Parameters that stay as they are, by name, * standing for anything: [stem.*,stages.0.*]."""
    muon_lr: float = 0.1
    """Rate of optim.name=muon where SGD's is optim.lr, which it follows: relative to a weight."""
    lr: float = 0.05
    """Learning rate at optim.reference_batch_size; optim.lr_scaling turns it into the peak rate."""
    momentum: float = 0.9
    """Momentum of SGD and of Muon."""
    weight_decay: float = 5e-4
    """Weight decay of parameters of 2 dimensions and more (under Muon not of convolutions)."""
    nesterov: bool = False
    """Nesterov momentum."""
    clip_norm: float = 0.0
    """Largest norm of the gradient, all parameters' together; longer ones are scaled; 0: off."""
    bias_lr_factor: float = 1.0
    """Factor of the rate of every bias: BatchNorm's, convolutions' and dense layers'."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the rate follows the global batch: not, in proportion (Goyal et al. 2017), by root."""
    reference_batch_size: int = 32
    """Global batch size at which optim.lr holds."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes (Szegedy et al. 2016); 0: none."""
    class_weights: list[Any] | str = "none"
    """Of the training loss: none, balanced (the rarer the heavier), or a number a class."""


@dataclass(frozen=True)
class DistillConfig:
    teachers: list[str] = field(default_factory=list)
    """Runs, checkpoints, .safetensors whose mean prediction is learnt too (Hinton et al. 2015)."""
    temperature: float = 4.0
    """Softens the teachers' and the student's predictions in that part of the loss."""
    weight: float = 0.5
    """The teachers' share of the loss; the labels have the rest."""


@dataclass(frozen=True)
class ScheduleConfig:
    name: Literal["cosine", "step", "onecycle"] = "cosine"
    """cosine: to zero; step: a tenth at each milestone; onecycle: up and down in straight lines."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from zero; for onecycle, of the rise (0: 30% of the run)."""
    milestones: list[int] = field(default_factory=lambda: [80, 120])
    """Epochs after which schedule.name=step divides the rate by ten."""


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 150
    """Passes over the training set."""
    max_steps: int | None = None
    """Stop after this many steps; the schedule is still that of train.epochs; null: no limit."""
    early_stop: bool = False
    """End where val/top1 has fallen clearly at a low rate: the diagnosis's rule of a decline."""
    ema_decay: float = 0.0
    """Decay per step of the moving average of the weights that is evaluated; 0: none."""
    step_mode: Literal["auto", "eager", "compile", "fused", "graph"] = "auto"
    """eager, compile, fused (our kernels), graph (one CUDA graph: auto on GPUs); auto: fused."""


@dataclass(frozen=True)
class PrecisionConfig:
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of activations under autocast; auto: bf16, on GPUs without it fp16, else fp32."""
    channels_last: bool = True
    """NHWC memory layout."""
    deterministic: bool = False
    """Only deterministic CUDA kernels: bitwise repeatable, slower. On CPUs runs always are."""


@dataclass(frozen=True)
class ParallelConfig:
    replicas: int | str = "auto"
    """Replicas of the recipe, a multiple of the ranks; auto: one per rank when the run begins."""
    reduction: Literal["fast", "exact"] = "fast"
    """fast: one all-reduce; exact: summed in replica order, bit for bit on any number of ranks."""
    timeout_seconds: int = 120
    """A rank without progress for so long shows its stack and ends the job."""
    threads: int = 0
    """CPU threads of a rank; 0: cores / local ranks, and 1 with parallel.reduction=exact."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""


@dataclass(frozen=True)
class EvalConfig:
    every_epochs: int = 1
    """Evaluate after so many epochs, and always at the end."""
    flip_tta: bool = False
    """Also report val/top1_tta: the mean of the logits of each image and its mirror image."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_epochs: int = 1
    """Save after so many epochs (0: never so), and always at the end and at a best evaluation."""
    every_steps: int = 0
    """Save also after so many steps; 0: not."""
    keep: int = 3
    """How many of the newest checkpoints are kept, beside the best."""


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 50
    """Steps between two rows of training metrics: the only moments at which the host waits."""


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
    media_every_epochs: int = 10
    """Epochs between pictures (confusion matrix, worst mistakes), and at the end; 0: none."""
    artifacts: bool = False
    """Keep the best checkpoint and the dataset's description as artifacts of a finished run."""


@dataclass(frozen=True)
class Config:
    seed: int = 0
    """Together with the step and the sample, what every random choice is computed from."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
