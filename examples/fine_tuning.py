"""Fine-tuning: a net trained on one data set starts the training on another.

python examples/fine_tuning.py
"""

import sys

import dist_resnet
from examples.own_data import shapes

COMMON = {"wandb": {"mode": "disabled"}, "model": {"widths": [16, 16, 32]}}


def main(*pairs: str) -> None:
    """Train on digits, then tune all but the first layers on circles and squares."""
    dist_resnet.train(
        COMMON, "data.dataset=digits", "train.epochs=4", "run.name=digits-first", *pairs
    )
    summary = dist_resnet.train(
        COMMON,
        {"data": {"dataset": "shapes", "source": f"{shapes.__module__}:{shapes.__name__}"}},
        {"model": {"init": "runs/digits-first"}, "optim": {"freeze": ["stem.*", "stages.0.*"]}},
        "train.epochs=2",
        "run.name=shapes-tuned",
        *pairs,
    )
    print(f"{summary['val/top1']:.1%} of the test images are recognised")


if __name__ == "__main__":
    main(*sys.argv[1:])
