"""Put this project's workspace on W&B: python -m dist_resnet.dashboard --entity NAME [options]

Every run of the project shows in it. Needs the extra `dashboard` (wandb-workspaces).
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dist_resnet.base.cli import Parser, run_command
from dist_resnet.base.errors import EXIT_DONE, UserError, one_line
from dist_resnet.config.schema import WandbConfig
from dist_resnet.tracking.wandb_reach import wanted_mode


@dataclass(frozen=True)
class Panel:
    """One panel. A test holds all of them against what a training logs."""

    title: str
    metrics: tuple[str, ...]
    """Keys; one that ends in * stands for all that begin so."""
    kind: Literal["lines", "pictures", "confusion"] = "lines"
    log_y: bool = False
    only_with: str = ""
    """What a run must have for this panel to hold data; empty: nothing."""


SECTIONS = {
    "Learning": (
        Panel("Loss", ("train/loss", "val/loss"), log_y=True),
        Panel("Top-1", ("train/top1", "val/top1")),
        Panel("Top-5", ("val/top5",), only_with="more than five classes"),
        Panel("Top-1, each class weighing the same", ("val/balanced",)),
        Panel(
            "Means over the classes",
            ("val/precision_macro", "val/recall_macro", "val/f1_macro"),
        ),
        Panel("Top-1 with mirror images", ("val/top1_tta",), only_with="eval.flip_tta=true"),
        Panel("Generalisation gap: train minus val", ("gap/top1",)),
    ),
    "Optimisation": (
        Panel("Learning rate", ("train/lr",)),
        Panel("Gradient norm", ("train/grad_norm",), log_y=True),
    ),
    "Speed": (
        Panel("Images per second", ("perf/images_per_second",)),
        Panel("Milliseconds a step", ("perf/step_ms",), log_y=True),
        Panel("Share of time waiting for data", ("perf/data_wait_fraction",)),
        Panel("GPU memory in MiB", ("perf/gpu_memory_mb",), only_with="a GPU"),
        Panel("GPU utilisation", ("perf/gpu_utilisation",), only_with="a GPU"),
    ),
    "Classes": (
        Panel("Top-1 by class", ("val/per_class/*",)),
        Panel("Confusion at the end", ("val/confusion_matrix_table",), "confusion"),
        Panel("Confusion", ("val/confusion_image",), "pictures"),
    ),
    "Samples": (
        Panel("First batch, augmented", ("data/train_batch",), "pictures"),
        Panel("Worst mistakes", ("val/worst",), "pictures"),
        Panel("Images evaluated", ("val/images",)),
    ),
}
"""Panels by the heading under which they stand."""


def as_json() -> str:
    """The workspace as data."""
    sections = [{"name": name, "panels": list(map(asdict, of))} for name, of in SECTIONS.items()]
    return json.dumps({"x_axis": "step", "sections": sections}, indent=2)


def main(arguments: Sequence[str]) -> int:
    """Parse, then print or save; the exit code."""
    parser = Parser("python -m dist_resnet.dashboard", __doc__)
    parser.add_argument("--entity", metavar="NAME", help="W&B user or team")
    for option, of, default in (
        ("--project", "W&B project", WandbConfig.project),
        ("--name", "name of the workspace", "dist_resnet"),
    ):
        about = f"{of}; default: {default}"
        parser.add_argument(option, metavar="NAME", default=default, help=about)
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print the workspace as JSON and send nothing; needs neither network nor account",
    )  # fmt: skip
    asked = parser.parse_args(arguments)
    if asked.dry_run:
        print(as_json())
        return EXIT_DONE
    if not (asked.entity and asked.project and asked.name):
        raise UserError("--entity NAME: name the W&B user or team whose project it is")
    mode, told = wanted_mode("auto")
    if mode in ("offline", "disabled"):
        raise UserError(f"W&B is switched off: {told}; undo that, or --dry-run")
    print(save(asked.entity, asked.project, asked.name))
    return EXIT_DONE


def save(entity: str, project: str, name: str) -> str:
    """Save the workspace on the server that wandb is configured for; its address.

    Raises:
        UserError: wandb-workspaces is missing, or the server or the account refuses.
    """
    try:
        import wandb_workspaces.workspaces as workspaces
        from wandb_workspaces.reports import v2 as reports
    except ImportError:
        raise UserError(
            "wandb-workspaces is not installed: pip install 'dist-resnet[dashboard]', "
            "or --dry-run to see the panels"
        ) from None
    workspace = workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(
                name=heading, panels=[_panel(reports, panel) for panel in panels], is_open=True
            )
            for heading, panels in SECTIONS.items()
        ],
        settings=workspaces.WorkspaceSettings(x_axis="step"),
    )
    try:
        workspace.save()
    except Exception as error:  # of requests, of GraphQL, of wandb itself: each has its own
        raise UserError(f"{entity}/{project}: not saved: {one_line(error)}") from None
    return str(workspace.url)


def _panel(reports: Any, panel: Panel) -> Any:
    if panel.kind == "pictures":
        return reports.MediaBrowser(title=panel.title, media_keys=list(panel.metrics))
    if panel.kind == "confusion":
        fields = ("Actual", "Predicted", "nPredictions")
        return reports.CustomChart(
            query={"summaryTable": {"tableKey": panel.metrics[0]}},
            chart_name="wandb/confusion_matrix/v1",
            chart_fields={field: field for field in fields},
            chart_strings={"title": panel.title},
        )
    shown: dict[str, Any] = {"y": list(panel.metrics)}
    if any(metric.endswith("*") for metric in panel.metrics):
        patterns = [re.escape(metric.removesuffix("*")) for metric in panel.metrics]
        shown = {"metric_regex": f"^({'|'.join(patterns)}).*"}
    return reports.LinePlot(title=panel.title, x="step", log_y=panel.log_y, **shown)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
