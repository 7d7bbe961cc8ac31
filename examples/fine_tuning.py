"""Fine-tuning: a net trained on one data set starts the training on another.

python -m examples.fine_tuning
"""

import sys

import dist_resnet

NET = {"model": {"widths": [16, 16, 32]}, "wandb": {"mode": "disabled"}}


def main(runs: str = "runs") -> None:
    """Train on digits, then tune all but the first layers on circles and squares."""
    place = f"run.dir={runs}"
    dist_resnet.train(NET, place, "run.name=first", "data.dataset=digits", "train.epochs=4")
    summary = dist_resnet.train(
        NET,
        place,
        "run.name=tuned",
        f"model.init={runs}/first",
        optim={"freeze": ["stem.*", "stages.0.*"], "lr": 0.02},
        data={"dataset": "shapes", "source": "examples.own_data:shapes"},
        train={"epochs": 2},
    )
    print(f"{summary['val/top1']:.1%} of the test images are recognised")


if __name__ == "__main__":
    main(*sys.argv[1:])
