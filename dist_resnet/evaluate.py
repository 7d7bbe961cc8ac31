"""Evaluate a checkpoint: python -m dist_resnet.evaluate CHECKPOINT_OR_RUN [--json FILE] [key=value]

Also FILE.safetensors: an exported one as its checkpoint; of another, key=value must tell the net
and the normalisation: model.name, model.init_map.

Uses the checkpoint's own configuration; key=value changes it (data.root, data.dataset,
eval.flip_tta, precision.dtype ...). Under torchrun the images are shared among the ranks, and the
figures are the same as with one.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_resnet.base.cli import Parser, run_command
from dist_resnet.base.errors import EXIT_DONE, UserError
from dist_resnet.base.files import as_json, check_writable, write_for_user
from dist_resnet.base.home import ensure_home
from dist_resnet.base.launcher import environment_rank
from dist_resnet.base.paths import user_path
from dist_resnet.base.tables import columns
from dist_resnet.training.api import as_in_a_new_process, callable_module

if TYPE_CHECKING:
    from dist_resnet.config.schema import Config
    from dist_resnet.models.matching import Start
    from dist_resnet.training.evaluation import Evaluation
    from dist_resnet.training.session import Session


def main(arguments: Sequence[str]) -> int:
    """Parse, evaluate, print; the exit code."""
    path, output, pairs = _parse(arguments)
    if output is not None and environment_rank() == 0:
        check_writable(output)
    figures = evaluate_checkpoint(path, pairs)
    if environment_rank() == 0:
        if output is not None:  # first: `| head` may close the pipe that the table goes to
            write_for_user(output, as_json(figures, indent=2) + "\n")
        print(_table(figures))
    return EXIT_DONE


def evaluate_checkpoint(path: Path, pairs: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
    """Figures of one checkpoint on one prepared dataset, the same on every rank.

    Args:
        path: a checkpoint, a run folder (its newest one), or a safetensors file.
        pairs: key=value, or mappings of keys, over the checkpoint's configuration.

    Raises:
        UserError: on all ranks alike.
    """
    from dist_resnet.augment import Normalisation
    from dist_resnet.config.load import stored_config
    from dist_resnet.distributed.group import broadcast_object, start, stop
    from dist_resnet.models.matching import Start
    from dist_resnet.runs.weights import read_weights, trained_model
    from dist_resnet.training.session import open_session

    file, saved = read_weights(path)
    if isinstance(saved, Start):
        return _evaluate_file(saved, pairs)
    config = stored_config(saved.config, pairs)
    own = stored_config(saved.config)
    for key, mine, theirs in (
        ("data.normalisation", own.data.normalisation, config.data.normalisation),
        ("model.init", own.model.init, config.model.init),
    ):
        if mine != theirs:
            raise UserError(f"{key}: is the model's own; leave it out")
    _check_split(own, config)
    world = start(config.parallel.device, config.parallel.timeout_seconds)
    try:
        # A run that still trains may have saved another one between the ranks' reads.
        file, saved = broadcast_object((file, saved))
        session = open_session(config, world)
        model = trained_model(saved, config).to(world.device)
        if tuple(session.dataset.classes) != tuple(saved.classes):
            raise UserError(
                f"{session.dataset.folder}: its classes are not those the model was trained on"
            )
        if session.image_size != tuple(saved.image_size):
            raise UserError(f"{session.dataset.folder}: its images are not of the model's size")
        if config.data.val_split and session.dataset.fingerprint != saved.fingerprint:
            raise UserError(
                f"{session.dataset.folder}: other images than the run's, which held out some; "
                "data.val_split=0 evaluates the test set"
            )
        width = session.dataset.width
        statistics = Normalisation.of(saved.mean, saved.std, width, world.device)
        result = session.evaluator(statistics)(model)
    finally:
        stop()
    return {"checkpoint": str(file), "step": saved.state.step} | _figures(session, result)


def _check_split(own: "Config", wanted: "Config") -> None:
    """Images that are called held out were not trained on."""
    mine, theirs = own.data.val_split, wanted.data.val_split
    if theirs not in (0, mine):
        held = f"held out {mine:,} images: give {mine} or 0" if mine else "held out none; give 0"
        raise UserError(f"data.val_split={theirs}: the run {held}")
    if theirs and wanted.seed != own.seed:
        raise UserError(f"seed={wanted.seed}: chooses other held-out images; leave it out")


def _evaluate_file(weights: "Start", pairs: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
    """As `evaluate_checkpoint`, of weights alone: all that they do not tell is configured."""
    from dist_resnet.config.load import stored_config
    from dist_resnet.distributed.group import broadcast_object, on_every_rank, start, stop
    from dist_resnet.training.session import open_session
    from dist_resnet.training.starting import normalisation_of, started_model

    config = stored_config({}, [*pairs, {"model": {"init": weights.file}}])
    world = start(config.parallel.device, config.parallel.timeout_seconds)
    try:
        session = open_session(config, world)
        weights = broadcast_object(weights)  # may have been replaced between the ranks' reads
        classes = len(session.dataset.classes)
        model = on_every_rank(lambda: started_model(config, classes, weights)).to(world.device)
        result = session.evaluator(normalisation_of(weights, model, session))(model)
    finally:
        stop()
    return {"weights": weights.file} | _figures(session, result)


def _figures(session: "Session", result: "Evaluation") -> dict[str, Any]:
    figures: dict[str, Any] = {
        "dataset": session.dataset.name,
        "eval_set": session.eval_set,
        "correct": result.correct,
        "images": result.images,
        **result.figures(session.dataset.classes),
    }
    scores = zip(session.dataset.classes, result.class_scores(), strict=True)
    figures["classes"] = {name: asdict(score) for name, score in scores}
    figures["confusion"] = result.confusion.tolist()
    return figures


def evaluate(path: str | Path, *pairs: str, **settings: Any) -> dict[str, Any]:
    """Figures of a run's newest checkpoint, or of one checkpoint, on its test set.

    Args:
        path: a run folder, a checkpoint or a safetensors file.
        pairs, settings: "key=value" texts, and keys such as eval={"flip_tta": True}, over the
            checkpoint's own configuration.

    Returns:
        `correct` and `images` (counts), `val/top1`, `val/loss` (nats), `confusion` (K lists of K
        counts: rows are true classes) and the others that the command's --json has.

    Raises:
        UserError: no valid checkpoint, or a data set that does not fit it.
    """
    ensure_home()
    with as_in_a_new_process():
        return evaluate_checkpoint(user_path(str(path)), [*pairs, settings])


def _parse(arguments: Sequence[str]) -> tuple[Path, Path | None, list[str]]:
    parser = Parser("python -m dist_resnet.evaluate", __doc__)
    parser.add_argument("words", nargs="+", metavar="CHECKPOINT_OR_RUN, key=value")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write all figures to FILE")
    asked = parser.parse_intermixed_args(arguments)
    pairs = [word for word in asked.words if "=" in word and not user_path(word).exists()]
    paths = [word for word in asked.words if word not in pairs]
    if len(paths) != 1:
        raise UserError("name one checkpoint or run folder, then key=value pairs; see --help")
    return user_path(paths[0]), asked.json, pairs


def _table(figures: dict[str, Any]) -> str:
    lines = []
    for key, value in figures.items():
        if key not in ("classes", "confusion"):
            shown = f"{value:.6f}" if isinstance(value, float) else str(value)
            lines.append(f"{key:32} {shown}")
    keys = ("precision", "recall", "f1")
    head = ["class", *keys, "images"]
    scores = [
        [name, *(f"{score[key]:.4f}" for key in keys), str(score["images"])]
        for name, score in figures["classes"].items()
    ]
    return "\n".join([*lines, *columns([head, *scores], right=range(1, len(head)))])


callable_module(__name__, evaluate)

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
