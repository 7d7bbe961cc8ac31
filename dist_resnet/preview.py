"""What --print-config adds to the configuration: the plan, where the dataset's size is known."""

import json

from dist_resnet.errors import UserError
from dist_resnet.launcher import environment_world_size
from dist_resnet.paths import user_path
from dist_resnet.plan import explain, make_plan
from dist_resnet.schema import Config

_BUILTIN_SIZES = {"cifar10": 50_000, "cifar100": 50_000}


def preview(config: Config) -> str:
    """The derived plan as comments of a YAML file; trains and prepares nothing."""
    images = _train_images(config)
    if images is None:
        return "# plan: not known before the dataset is prepared"
    plan = make_plan(config, images - config.data.val_split, environment_world_size())
    lines = [*explain(config, plan), *(f"{key}: {value}" for key, value in plan.as_dict().items())]
    return "\n".join(f"# {line}" for line in lines)


def _train_images(config: Config) -> int | None:
    path = user_path(config.data.root) / config.data.dataset / "dataset.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["num_train"])
    except FileNotFoundError:
        return _BUILTIN_SIZES.get(config.data.dataset)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a dataset's description: {error}") from None
