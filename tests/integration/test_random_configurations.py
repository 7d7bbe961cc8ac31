"""Random configurations by the schema: no traceback, and --print-config says what a run does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_resnet.base.errors import Diverged, UserError
from dist_resnet.config.keys import describe_keys
from dist_resnet.config.load import load_config, stored_config, to_dict, to_yaml
from dist_resnet.config.plan import rates
from dist_resnet.config.schema import Config
from dist_resnet.data.dataset import Dataset
from dist_resnet.train import main

KINDS = {key: kind for key, kind, *_ in describe_keys()}
TEXT = st.text(max_size=12) | st.sampled_from(["007", "on", "null", "1e3", "a #b", "[", "${x}"])
NUMBER = st.integers(-3, 300) | st.sampled_from([2**31, 2**63, 10**30])
# More often than not something that may be meant.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": NUMBER | TEXT,
    "float": st.floats(0, 1) | st.floats() | NUMBER | TEXT,
    "bool": st.sampled_from(["true", "false", "yes", "off", "1", "maybe", "null"]),
    "list[int]": st.lists(NUMBER, max_size=4) | TEXT,
    "list[str]": st.lists(TEXT, max_size=3).map(json.dumps) | TEXT,
}


def _value(kind: str) -> st.SearchStrategy[Any]:
    kind = kind.removesuffix(" | null")
    if "'" in kind:
        return st.sampled_from([part.strip(" '") for part in kind.split("|")]) | TEXT
    return VALUES.get(kind, TEXT)


@st.composite
def _pairs(draw: st.DrawFn) -> list[str]:
    keys = draw(st.lists(st.sampled_from(sorted(KINDS)), max_size=5, unique=True))
    return [f"{key}={draw(_value(KINDS[key]))}" for key in keys]


def _read(words: list[str]) -> Config | None:
    """None: refused, in one line."""
    line = ""
    try:
        return load_config(words)
    except UserError as error:
        line = str(error)
    assert line.isprintable()
    assert len(line) < 500
    return None


@settings(max_examples=200)
@given(_pairs())
def test_a_configuration_is_read_or_refused_in_one_line(pairs: list[str]) -> None:
    config = _read(pairs)
    if config is None:
        return
    # What is printed is the configuration again, to this program and to any reader of YAML.
    assert stored_config(to_dict(config)) == config
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)


@settings(max_examples=300)
@given(st.lists(st.text(max_size=30), max_size=3))
def test_any_words_are_read_or_refused_in_one_line(words: list[str]) -> None:
    _read(words)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(max_size=80) | st.binary(max_size=80) | _pairs().map("\n".join))
def test_any_file_is_read_or_refused_in_one_line(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    data = content if isinstance(content, bytes) else content.replace("=", ": ").encode()
    file.write_bytes(data)
    _read([str(file)])


# Small enough to be run; kinds of machines, time limits and the terminal are left alone.
RUNNABLE = {
    "data.batch_size_per_replica": st.integers(1, 60),
    "data.val_split": st.integers(0, 60),
    "data.loader": st.sampled_from(["ffcv", "resident"]),
    "augment.crop_padding": st.integers(0, 5),
    "augment.padding_mode": st.sampled_from(["zero", "reflect"]),
    "augment.flip": st.sampled_from(["true", "false", "alternating"]),
    "augment.trivial": st.booleans(),
    "augment.jitter": st.sampled_from([0, 0.5]),
    "augment.erasing": st.sampled_from([0, 0.5, 1]),
    "augment.extra": st.sampled_from(["[]", "[jitter, erasing]"]),
    "augment.mix": st.sampled_from(["mixup", "cutmix", "both"]),
    "augment.mixup_alpha": st.sampled_from([0, 0.2, 3]),
    "augment.cutout": st.integers(0, 20),
    "model.shortcut": st.sampled_from(["projection", "pad"]),
    "model.dropout": st.sampled_from([0, 0.5]),
    "model.name": st.sampled_from(["resnet20", "m6"]),
    "optim.name": st.sampled_from(["sgd", "muon"]),
    "optim.lr": st.sampled_from(["1e-3", "0.1", "1e30"]),
    "optim.nesterov": st.booleans(),
    "optim.momentum": st.sampled_from([0, 0.9]),
    "optim.lr_scaling": st.sampled_from(["none", "linear", "sqrt"]),
    "optim.reference_batch_size": st.integers(1, 64),
    "optim.label_smoothing": st.sampled_from([0, 0.1]),
    "schedule.name": st.sampled_from(["cosine", "step", "onecycle"]),
    "schedule.warmup_epochs": st.sampled_from([0, 0.5, 0.99, 2]),
    "schedule.milestones": st.sampled_from(["[]", "[1]", "[1,2]"]),
    "train.epochs": st.integers(1, 3),
    "train.ema_decay": st.sampled_from([0, 0.9]),
    "precision.dtype": st.sampled_from(["auto", "fp32", "bf16"]),
    "precision.channels_last": st.booleans(),
    "parallel.replicas": st.sampled_from(["auto", 1, 2, 3]),
    "parallel.reduction": st.sampled_from(["fast", "exact"]),
    "eval.flip_tta": st.booleans(),
    "eval.every_epochs": st.integers(1, 3),
    "checkpoint.every_steps": st.integers(0, 3),
    "checkpoint.keep": st.integers(1, 2),
    "seed": st.integers(0, 2**63 - 1),
}


@st.composite
def _runnable(draw: st.DrawFn) -> list[str]:
    keys = draw(st.lists(st.sampled_from(sorted(RUNNABLE)), max_size=8, unique=True))
    return [f"{key}={draw(RUNNABLE[key])}" for key in keys]


def _attempt(action: Callable[[], int]) -> str:
    """The line with which it is refused; empty where it is not."""
    line = ""
    try:
        action()
    except Diverged:
        return ""
    except UserError as error:
        line = str(error)
    assert line.isprintable()
    return line


@pytest.mark.slow
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=_runnable())
def test_print_config_says_what_a_run_of_three_steps_does(
    pairs: list[str],
    tiny: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Handlers would stay with this process.
    monkeypatch.setattr("dist_resnet.base.signals.install", lambda: None)
    monkeypatch.setattr("dist_resnet.base.signals.defer", lambda: None)
    folder = tmp_path_factory.mktemp("run")
    words = [
        f"data.root={tiny.folder.parent}", f"data.dataset={tiny.folder.name}", f"run.dir={folder}",
        "run.name=job", "model.widths=[2,2,3]", "train.max_steps=3", "train.step_mode=eager",
        "log.every_steps=1", "wandb.mode=disabled", "parallel.device=cpu", "parallel.threads=1",
        *pairs,
    ]  # fmt: skip
    capsys.readouterr()
    refused = _attempt(lambda: main([*words, "--print-config"]))
    printed = capsys.readouterr().out
    assert not list(folder.iterdir())
    assert bool(_attempt(lambda: main(words))) == bool(refused), refused
    if refused:
        return
    config, plan = yaml.safe_load(printed), json.loads((folder / "job" / "plan.json").read_text())
    for what_it_began_with in ("code", "init", "held_out_seen", "hash"):
        del plan[what_it_began_with]
    told = dict(line[2:].split(": ", 1) for line in printed.splitlines() if line.startswith("# "))
    assert {key: told[key] for key in plan} == {key: str(value) for key, value in plan.items()}
    ran = yaml.safe_load((folder / "job" / "config.yaml").read_text())
    # What was left to the machine is settled, the rest is as printed.
    for section, key in (("parallel", "replicas"), ("precision", "dtype")):
        if config[section][key] == "auto":
            config[section][key] = ran[section][key]
    assert ran == config
    lines = (folder / "job" / "metrics.jsonl").read_text().splitlines()
    logged = [row["train/lr"] for row in map(json.loads, lines) if "train/lr" in row]
    wanted = rates(load_config(words), _Plan(**plan))  # type: ignore[arg-type]
    assert logged == pytest.approx(wanted[: len(logged)])
    status = json.loads((folder / "job" / "status.json").read_text())
    if status["state"] == "done":
        assert len(logged) == status["step"] == plan["total_steps"] <= 3


class _Plan:
    """What `rates` reads of a plan, as plan.json has it."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)
