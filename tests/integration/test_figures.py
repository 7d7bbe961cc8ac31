"""A run's figures are those of its weights, wherever it was stopped and however it goes on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dist_resnet
from dist_resnet import export, predict
from dist_resnet.base.errors import Preempted, UserError
from dist_resnet.config.load import load_config
from dist_resnet.data.dataset import Dataset
from dist_resnet.distributed import group
from dist_resnet.evaluate import evaluate_checkpoint
from dist_resnet.models.build import build_model
from dist_resnet.runs.checkpoint import Checkpoint
from dist_resnet.runs.weights import read_weights
from dist_resnet.step.train_step import TrainStep
from dist_resnet.tracking.tracker import Trackers
from dist_resnet.training import run
from dist_resnet.training.evaluation import Evaluation, Evaluator
from dist_resnet.training.loop import Trainer
from dist_resnet.training.outputs import RunWriter
from tests.helpers import nets
from tests.helpers.jobs import metric_rows
from tests.helpers.own_runs import Runs

FIGURES = ("step", "epoch", "val/top1", "val/loss", "gap/top1", "train/top1", "weights_sha256")


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: summary[name] for name in FIGURES}


def _rows(run: Path, first: int = 0) -> list[dict[str, Any]]:
    """Without times, a step's training row first."""
    rows = [
        {k: v for k, v in row.items() if k != "seconds" and not k.startswith("perf/")}
        for row in metric_rows(run)
        if row["step"] > first
    ]
    return sorted(rows, key=lambda row: (row["step"], "val/top1" in row))


def _stopped(runs: Runs, step: int, keys: list[str]) -> None:
    """A training for which SIGTERM's mark is set in front of this step."""
    plain = TrainStep.__call__

    with pytest.MonkeyPatch.context() as patch:

        def stopping(self: TrainStep, batch: Any) -> None:
            if self.state.step == step - 1:
                patch.setattr("dist_resnet.base.signals.received", lambda: True)
            plain(self, batch)

        patch.setattr(TrainStep, "__call__", stopping)
        with pytest.raises(Preempted):
            runs(*keys)


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize(("step", "epochs"), [(8, 1), (12, 3), (12, 1)])
def test_stopped_at_what_becomes_its_end(runs: Runs, step: int, epochs: int, every: int) -> None:
    """In mid-epoch, or where an epoch ends that is evaluated, or is not."""
    keys = ["train.step_mode=eager", f"eval.every_epochs={epochs}", f"log.every_steps={every}"]
    _stopped(runs, step, keys)
    assert runs(*keys, f"train.max_steps={step}") == 0
    summary, rows = runs.json("summary.json"), _rows(runs.path)
    figures = evaluate_checkpoint(runs.path, [])
    assert figures["step"] == summary["step"] == step
    assert figures["val/top1"] == summary["val/top1"]
    assert summary["images_per_second"] is None  # of no step
    assert figures["val/loss"] == pytest.approx(summary["val/loss"], abs=1e-9)
    shutil.rmtree(runs.path)
    assert runs(*keys, f"train.max_steps={step}") == 0
    assert _figures(runs.json("summary.json")) == _figures(summary)
    assert _rows(runs.path) == rows


def test_a_longer_run_has_the_figures_of_one_that_was_as_long_at_once(runs: Runs) -> None:
    keys = ["train.step_mode=eager", "log.every_steps=5"]
    assert runs(*keys, "train.max_steps=8") == 0
    assert runs(*keys, "train.max_steps=17") == 0
    longer, rows = runs.json("summary.json"), _rows(runs.path, 8)
    shutil.rmtree(runs.path)
    assert runs(*keys, "train.max_steps=17") == 0
    assert _figures(runs.json("summary.json")) == _figures(longer)
    assert _rows(runs.path, 8) == rows


def test_another_runs_checkpoint_stays_out_of_a_runs_folder(runs: Runs) -> None:
    """It would be told as complete with the other's figures, or become a mixture of two."""
    assert runs("seed=1", "run.name=other", "train.max_steps=4") == 0
    other = next((runs.path.with_name("other") / "checkpoints").glob("step-*.pt"))
    assert runs("train.max_steps=8") == 0
    for steps in (12, 8, 4):
        command = ["seed=1", f"run.resume={other}", f"train.max_steps={steps}"]
        line = runs.refused(*command)
        assert "holds another run already (seed: 0 -> 1)" in line
        assert "run.overwrite=true" in line
    assert runs("train.max_steps=4", "run.overwrite=true") == 0  # at the other's step
    assert runs(*command, "run.overwrite=true") == 0
    whole = json.loads((other.parent.parent / "summary.json").read_text())
    assert _figures(runs.json("summary.json")) == _figures(whole)
    assert runs(*command) == 0  # its own by now
    assert runs.json("summary.json")["weights_sha256"] == whole["weights_sha256"]


def test_killed_between_the_last_evaluation_and_its_checkpoint(runs: Runs) -> None:
    """Of a run that was stopped where it ends now: the evaluation is the best one all the same."""
    keys = ["train.step_mode=eager", "log.every_steps=5"]
    _stopped(runs, 8, keys)
    keys.append("train.max_steps=8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunWriter, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runs(*keys)
    assert runs(*keys) == 0
    summary, rows = runs.json("summary.json"), _rows(runs.path)
    assert len([row for row in rows if "val/top1" in row and row["step"] == 8]) == 1
    tops = {row["step"]: row["val/top1"] for row in rows if "val/top1" in row}
    assert summary["best/val/top1"] == max(tops.values())
    best = next((runs.path / "checkpoints").glob("best-*"))
    assert int(best.name.split("-")[1]) == max(tops, key=lambda step: (tops[step], -step))


def test_a_fork_that_ends_where_it_begins_is_one_afterwards(runs: Runs) -> None:
    keys = ["train.step_mode=eager", "log.every_steps=5"]
    _stopped(runs, 12, keys)
    for command in (["run.extend=true"], [], ["run.extend=true"]):
        assert runs(*keys, "train.epochs=2", *command) == 0
        assert runs.json("summary.json")["step"] == 12
        assert len(runs.json("plan.json")["forks"]) == 1
    assert len(list((runs.path / "checkpoints").glob("step-00000012-*.pt"))) == 1


def test_taken_back_to_its_own_checkpoint_a_run_has_that_ones_figures(runs: Runs) -> None:
    keys = ["train.step_mode=eager", "checkpoint.every_steps=4"]
    assert runs(*keys, "train.max_steps=8") == 0
    (middle,) = (runs.path / "checkpoints").glob("step-00000004-*.pt")
    assert runs(*keys, f"run.resume={middle}", "train.max_steps=4") == 0
    summary, figures = runs.json("summary.json"), evaluate_checkpoint(runs.path, [])
    assert summary["step"] == figures["step"] == 4
    assert summary["val/top1"] == figures["val/top1"]


def test_only_what_was_held_out_is_evaluated_as_held_out(runs: Runs) -> None:
    assert runs("data.val_split=12", "train.max_steps=4") == 0
    found = evaluate_checkpoint(runs.path, [])
    assert (found["eval_set"], found["images"]) == ("held-out training images", 12)
    assert evaluate_checkpoint(runs.path, ["data.val_split=0"])["eval_set"] == "test set"
    for pair, words in (("data.val_split=20", "12 or 0"), ("seed=3", "leave it out")):
        with pytest.raises(UserError, match=words):
            evaluate_checkpoint(runs.path, [pair])
    assert evaluate_checkpoint(runs.path, ["seed=3", "data.val_split=0"])["images"] > 12
    shutil.rmtree(runs.path)
    assert runs("train.max_steps=4") == 0
    with pytest.raises(UserError, match=r"data\.val_split=12: the run held out none"):
        evaluate_checkpoint(runs.path, ["data.val_split=12"])


def test_held_out_images_are_of_the_runs_own_data(runs: Runs, digits: Dataset) -> None:
    keys = [f"data.root={digits.folder.parent}", f"data.dataset={digits.folder.name}"]
    assert runs("data.val_split=12", "train.max_steps=2", *keys) == 0
    copy = runs.path.with_name("copy")
    shutil.copytree(digits.folder, copy)
    about = json.loads((copy / "dataset.json").read_text())
    about["fingerprint"] = "0" * len(about["fingerprint"])
    (copy / "dataset.json").write_text(json.dumps(about))
    elsewhere = [f"data.root={copy.parent}", "data.dataset=copy"]
    with pytest.raises(UserError, match="other images than the run's"):
        evaluate_checkpoint(runs.path, elsewhere)
    found = evaluate_checkpoint(runs.path, [*elsewhere, "data.val_split=0"])
    assert found["eval_set"] == "test set"


def test_a_net_that_draws_when_it_is_built_is_built_alike_everywhere(runs: Runs) -> None:
    """Of the run's seed, whatever the command's."""
    assert runs("model.name=tests.helpers.nets:Projected", "seed=3", "train.max_steps=6") == 0
    summary = runs.json("summary.json")
    for pairs in ([], ["seed=5"]):
        found = evaluate_checkpoint(runs.path, pairs)
        assert found["val/loss"] == pytest.approx(summary["val/loss"], abs=1e-9)
    config = load_config([str(runs.path / "config.yaml")])
    built = [build_model(config.model, 5, seed).get_buffer("seen") for seed in (3, 0)]
    seen = dist_resnet.load(runs.path).network.get_buffer("seen")
    assert torch.equal(seen, built[0])
    assert not torch.equal(seen, built[1])


def test_a_part_left_in_evaluation_mode_trains_from_the_first_step(runs: Runs) -> None:
    """Else the first evaluation would change what the weights become."""
    net = ["model.name=tests.helpers.nets:Resting", "train.step_mode=eager"]
    assert runs(*net, "eval.every_epochs=1", "run.name=often") == 0
    assert runs(*net, "eval.every_epochs=3") == 0
    often = json.loads((runs.path.with_name("often") / "summary.json").read_text())
    assert often["weights_sha256"] == runs.json("summary.json")["weights_sha256"]
    model = dist_resnet.load(runs.path).network
    assert bool(model.get_buffer("norm.running_mean").abs().max() > 0)


def test_draws_that_begin_late_are_the_same_after_a_stop(runs: Runs) -> None:
    net = ["model.name=tests.helpers.nets:LateDraws", "train.step_mode=eager"]
    assert runs(*net, "run.name=whole") == 0
    assert runs(*net, "train.max_steps=9") == 0
    torch.manual_seed(12345)
    assert runs(*net) == 0
    whole = json.loads((runs.path.with_name("whole") / "summary.json").read_text())
    assert whole["weights_sha256"] == runs.json("summary.json")["weights_sha256"]


def test_a_net_for_the_other_layout_is_used_in_it(runs: Runs) -> None:
    """By load, and by a student."""
    keys = ["model.name=tests.helpers.nets:Rows", "precision.channels_last=false"]
    assert runs(*keys, "run.name=rows", "train.max_steps=4") == 0
    rows = runs.path.with_name("rows")
    pixels = torch.rand(2, 12, 12, 3).permute(0, 3, 1, 2)
    assert dist_resnet.load(rows)(pixels).shape[0] == 2
    teacher = "distill.teachers=" + json.dumps([str(rows)])
    assert runs("train.max_steps=2", "train.step_mode=eager", teacher) == 0


def test_an_exported_net_of_ones_own_keeps_its_normalisation(runs: Runs, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    net = "model.name=tests.helpers.nets:Grouped"
    own = "data.normalisation=[[0.1,0.5,0.9],[0.02,0.02,0.02]]"
    assert runs(net, own, "precision.dtype=fp32", "train.step_mode=eager", "train.max_steps=6") == 0
    wanted = evaluate_checkpoint(runs.path, [])
    where = ["--format", "safetensors", "--output", str(tmp_path / "out")]
    assert export.main([str(runs.path), *where]) == 0
    data = [pair for pair in runs.common if pair.startswith(("data.", "parallel."))]
    file = tmp_path / "out" / "model.safetensors"
    found = evaluate_checkpoint(file, [net, *data, "precision.dtype=fp32"])
    assert found["correct"] == wanted["correct"]
    assert found["val/loss"] == pytest.approx(wanted["val/loss"], rel=1e-5)


def test_a_teacher_that_does_not_fit_costs_no_run(runs: Runs, digits: Dataset) -> None:
    other = [f"data.root={digits.folder.parent}", f"data.dataset={digits.folder.name}"]
    assert runs(*other, "run.name=other", "train.max_steps=2") == 0
    assert runs("train.max_steps=4") == 0
    teacher = "distill.teachers=" + json.dumps([str(runs.path.with_name("other"))])
    assert "knows other classes" in runs.refused("run.overwrite=true", teacher)


def test_an_evaluation_that_is_no_number_is_told_and_is_not_the_best(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Evaluator._logits

    def broken(self: Evaluator, model: Any) -> Any:
        for number, labels, logits, mirrored in plain(self, model):
            yield number, labels, torch.full_like(logits, torch.nan), mirrored

    monkeypatch.setattr(Evaluator, "_logits", broken)
    assert runs("train.max_steps=4") == 0
    text = (runs.path / "summary.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    summary = json.loads(text, parse_constant=refuse)
    assert summary["val/loss"] is None
    assert summary["best/val/top1"] is None
    assert "val/loss is not finite" in capsys.readouterr().err
    assert not list((runs.path / "checkpoints").glob("best-*"))


def test_a_fork_may_bring_code_and_arguments_that_it_names(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fork_aug.py").write_text("def darker(images, draws):\n    return images * 0.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    adam = ["optim.name=torch.optim:AdamW", "optim.lr=0.001"]
    assert runs(*adam, "train.max_steps=4") == 0
    more = [*adam, "optim.args={amsgrad: true}", "augment.extra=[fork_aug:darker]"]
    assert runs(*more, "run.extend=true", "train.max_steps=8") == 0
    assert runs(*more, "train.max_steps=10") == 0
    changed = [line.split(":")[0] for line in runs.json("plan.json")["forks"][0]["changed"]]
    assert changed == ["augment.extra", "optim.args.amsgrad", "the optimizer's state"]


def test_a_reader_is_told_of_held_out_images_that_were_trained_on(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a teacher, or by starting weights: the figures on them flatter."""
    for name, keys in (("all", []), ("some", ["data.val_split=12"])):
        assert runs(*keys, f"run.name={name}", "train.max_steps=2", "train.step_mode=eager") == 0
    every, some = (str(runs.path.with_name(name)) for name in ("all", "some"))
    for start, held_out, seed, told in (
        (every, 12, 0, True),
        (every, 0, 0, False),
        (some, 12, 0, False),
        (some, 5, 0, False),
        (some, 13, 0, True),
        (some, 12, 1, True),
    ):
        keys = [f"model.init={start}", "distill.teachers=" + json.dumps([start])]
        capsys.readouterr()
        more = [f"data.val_split={held_out}", f"seed={seed}", "run.overwrite=true"]
        assert runs(*keys, *more, "train.max_steps=1") == 0
        lines = capsys.readouterr().out.splitlines()
        for key in ("model.init", "distill.teachers"):
            line = "may have been trained on images that are held out here"
            assert (f"{key}={start}: {line}" in lines) == told


def test_that_is_remembered_and_asks_for_no_file_again(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["train.step_mode=eager", "data.val_split=12"]
    assert runs("train.step_mode=eager", "run.name=first", "train.max_steps=1") == 0
    first = runs.path.with_name("first")
    began = f"model.init={first}"
    assert runs(*keys, began, "train.max_steps=1") == 0
    shutil.rmtree(first)
    assert runs(*keys, began, "train.max_steps=2") == 0
    capsys.readouterr()
    assert runs(*keys, f"model.init={runs.path}", "run.name=third", "train.max_steps=1") == 0
    told = f"model.init={runs.path}: may have been trained on images that are held out here"
    assert told in capsys.readouterr().out


def test_all_ranks_evaluate_the_first_ones_checkpoint(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that still trains may save between their reads."""
    assert runs("checkpoint.every_steps=4", "train.max_steps=8") == 0
    (middle,) = (runs.path / "checkpoints").glob("step-00000004-*.pt")
    wanted = evaluate_checkpoint(middle, [])
    of_rank_zero, plain = read_weights(middle), group.broadcast_object

    def broadcast(value: Any) -> Any:
        both = isinstance(value, tuple) and isinstance(value[1], Checkpoint)
        return plain(of_rank_zero if both else value)

    monkeypatch.setattr(group, "broadcast_object", broadcast)
    assert evaluate_checkpoint(runs.path, []) == wanted


@pytest.mark.parametrize("where", ["Stopwatch", "write_summary"])
def test_what_fails_around_the_steps_closes_the_record(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    closed: list[int] = []
    plain = Trackers.close

    def close(self: Trackers, exit_code: int, summary: Any) -> None:
        closed.append(exit_code)
        plain(self, exit_code, summary)

    def fail(*given: Any) -> None:
        raise UserError("no room")

    monkeypatch.setattr(Trackers, "close", close)
    monkeypatch.setattr(run, where, fail)
    with pytest.raises(UserError, match="no room"):
        runs("train.max_steps=1")
    assert closed == [2]
    status = runs.json("status.json")
    assert (status["state"], status["reason"], status["exit_code"]) == ("failed", "no room", 2)


def test_what_a_net_raises_in_use_is_one_line(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tests.helpers.nets:Plain"
    assert runs(f"model.name={name}", "run.name=own", "train.max_steps=2") == 0
    own = runs.path.with_name("own")
    Image.new("RGB", (12, 12)).save(tmp_path / "image.png")

    def forward(self: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        raise ValueError("no luck\nwith this")

    monkeypatch.setattr(nets.Plain, "forward", forward)
    raised = r"raised ValueError: no luck with this \(.*test_figures\.py:\d+\)$"
    with pytest.raises(UserError, match=f"^model.name={name}: {raised}"):
        evaluate_checkpoint(own, [])
    with pytest.raises(UserError, match=f"^model={own}: {raised}"):
        predict.main([str(own), str(tmp_path / "image.png")])
    with pytest.raises(UserError, match=f"^distill.teachers={own}: {raised}"):
        runs("train.step_mode=eager", "distill.teachers=" + json.dumps([str(own)]))


@pytest.mark.parametrize("pause", [15, 18, 21, 24])
def test_a_pause_changes_nothing_of_an_early_end(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, pause: int
) -> None:
    """At an epoch's end at a low rate, within one, and where the run ends early."""
    plain = Trainer._evaluate

    def falling(self: Trainer, done: int, at_end: bool) -> Evaluation:
        found = plain(self, done, at_end)
        return replace(found, correct=found.images if done <= 18 else 0)

    monkeypatch.setattr(Trainer, "_evaluate", falling)
    keys = ["train.early_stop=true", "train.epochs=6", "train.step_mode=eager"]
    keys += ["schedule.name=step", "schedule.milestones=[1,2]"]
    ends = []
    for name, limit in (("whole", []), ("job", [f"train.max_steps={pause}"])):
        if limit:
            assert runs(*keys, f"run.name={name}", *limit) == 0
        assert runs(*keys, f"run.name={name}") == 0
        summary = json.loads((runs.path.with_name(name) / "summary.json").read_text())
        ends.append((summary["step"], summary["weights_sha256"], summary["stopped_early"]))
    assert ends[0] == ends[1]
    assert ends[0][::2] == (24, True)
