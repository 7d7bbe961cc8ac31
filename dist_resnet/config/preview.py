"""What --print-config adds to the configuration: the plan, where the dataset's size is known."""

import json

from dist_resnet.base.errors import UserError, first_line
from dist_resnet.base.launcher import environment_world_size
from dist_resnet.base.paths import user_path
from dist_resnet.config.builtins import DATASETS
from dist_resnet.config.plan import check_statistics, explain, make_plan
from dist_resnet.config.schema import Config


def preview(config: Config) -> str:
    """The derived plan as comments of a YAML file; trains and prepares nothing."""
    found = _description(config)
    if found is None:
        return "# plan: not known before the dataset is prepared"
    images, height, width = found
    plan = make_plan(config, images - config.data.val_split, environment_world_size())
    check_statistics(config, height, width)
    lines = [*explain(config, plan), *(f"{key}: {value}" for key, value in plan.as_dict().items())]
    return "\n".join(f"# {line}" for line in lines)


def _description(config: Config) -> tuple[int, int, int] | None:
    """Training images, their height and width; None where there is no such dataset yet."""
    path = user_path(config.data.root) / config.data.dataset / "dataset.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return int(facts["num_train"]), int(facts["height"]), int(facts["width"])
    except FileNotFoundError:
        return DATASETS.get(config.data.dataset)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a dataset's description: {first_line(error)}") from None
