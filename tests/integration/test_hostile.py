"""Hostile configuration and command lines: one line, the right exit code, never a traceback.

Most rows call a command's `main` in this process, as its `run_command` does; the last ones are
whole processes. Data and images have a table of their own.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from dist_resnet import train
from dist_resnet.base.errors import DistResnetError
from dist_resnet.data.dataset import Dataset
from dist_resnet.sweep import __main__ as sweep
from tests.helpers.jobs import ROOT

Main = Callable[[Sequence[str]], int]


class Row(NamedTuple):
    """Arguments, of which {f} stands for the test's folder, and what the one line holds."""

    arguments: str | list[str]
    line: str
    code: int = 2


# Keys and values as they are mistyped.
WORDS = [
    Row("optim.lrr=1", "did you mean optim.lr?"),
    Row("lr=1", "did you mean optim.lr?"),
    Row("optim.lr", "optim.lr=VALUE"),
    Row("optim.lr=", "optim.lr=: must be of type float"),
    Row("optim.lr=1e", "optim.lr=1e"),
    Row("optim.lr=0,1", "optim.lr=0,1"),
    Row("optim.lr=1:30", "optim.lr=1:30"),
    Row("optim.lr=nan", "optim.lr=nan"),
    Row("optim.lr=inf", "optim.lr=inf"),
    Row("optim.lr=-1", "above 0"),
    Row("optim.lr=null", "must be of type float"),
    Row("optim.lr=true", "must be of type float"),
    Row("optim.lr=[0.1]", "must be of type float"),
    Row("optim={}", ""),
    Row("optim=3", "optim is a section"),
    Row("optim={lr: 3", "cannot be read"),
    Row("optim={lr: {a: 1}}", "optim.lr.a"),
    Row("seed=12:30", "must be of type int"),
    Row("seed=1e3", "must be of type int"),
    Row("seed=-1", "0 to 2^63"),
    Row("seed=9223372036854775808", "0 to 2^63"),
    Row(["seed=" + 5000 * "9"], "must be of type int"),
    Row("train.epochs=0", "1 to"),
    Row("train.epochs=999999999999", "1 to"),
    Row(["train.epochs=1000000", "data.batch_size_per_replica=1"], "at most 50,000,000"),
    Row("data.root={f}/file", "file"),
    Row("data.root={f}", "tiny"),
    Row("run.dir=/dev/null", "cannot be written"),
    Row(["run.name=" + 64 * "\U0001f600"], "too long"),
    Row("train.max_steps=0", "at least 1"),
    Row("augment.flip=maybe", "must be true, false or alternating"),
    Row("augment.flip=2", "must be true, false or alternating"),
    Row("model.name=resnet18", "must be one of"),
    Row("model.name=", "must be one of"),
    Row("model.widths=16", "such as"),
    Row("model.widths=[16,32]", "three numbers"),
    Row("model.widths=[16,[32],64]", "must be of type list[int]"),
    Row("model.widths=[0,1,2]", "three numbers"),
    Row("wandb.mode=off", "did you mean"),
    Row("wandb.project=a/b", "no / "),
    Row(["wandb.project=a\n"], "plain text"),
    Row(["wandb.tags=['']"], "1 to 64"),
    Row("wandb.tags=a", "must be of type list[str]"),
    Row(["wandb.group=" + 2000 * "x"], "at most 128"),
    Row("wandb.group=${oc.env:HOME}", "interpolation"),
    Row("wandb.group=???", "plain text"),
    Row(["run.name=\udce9"], "plain text"),
    Row(["run.name=a\nb"], "plain text"),
    Row(["run.name=\x1b[31mred"], "plain text"),
    Row("run.name=a/b", "no / "),
    Row("run.name=..", "no first dot"),
    Row(["run.name="], "1 to 64"),
    Row(["run.name=" + 65 * "n"], "1 to 64"),
    Row(["data.root=" + 5000 * "d"], "too long"),
    Row(["run.dir=" + 5000 * "d"], "too long"),
    Row("data.dataset=../x", "a name, not a path"),
    Row(["data.dataset=" + 300 * "d"], "too long"),
    Row("parallel.replicas=0", "auto or at least 1"),
    Row("parallel.replicas=1.5", "auto or at least 1"),
    Row("parallel.threads=99999999", "0 to 4096"),
    Row("parallel.timeout_seconds=99999999999", "1 to"),
    Row("precision.dtype=fp16", "fp16"),
    Row("train.step_mode=graph", "graph"),
    Row("data.batch_size_per_replica=4096", "the training set has 53"),
    Row("data.val_split=53", "53 images"),
    Row("data.val_split=10000000000000000000000", "data.val_split"),
    Row("schedule.warmup_epochs=5", "below train.epochs"),
    Row("schedule.milestones=[2,1]", "rising"),
    Row("run.resume=none.pt", "none.pt: cannot be read"),
    Row("run.resume={f}", "cannot be read"),
    Row("run.extend=true", "holds no run to extend"),
    Row("--epochs=3", "key=value"),
    Row("=3", "key=value"),
    Row("", "no such configuration file"),
    Row("{f}", "no such configuration file"),
    Row("{f}/none.yaml", "no such configuration file"),
    Row("lr=0.1/none.yaml", "no such configuration file"),
    Row("{f}/lr=0.1/none.YML", "no such configuration file"),
    Row("{f}/a=b", "", 0),
    Row([5000 * "x" + ".yaml"], "no such configuration file"),
    Row("{f}/file/run.yaml", "no such configuration file"),
    Row("run.dir={f}/file", "cannot be written"),
    Row("run.dir=/proc/none", "cannot be written"),
    Row("optim.lr=1e30", "diverged", 3),
]

# A few lines that stand for billions of values.
ALIASES = b"a: &a [1]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join(9 * [b"*%c" % (97 + n)])) for n in range(12)
)

# What stands in a file.
FILES = [
    (b"\x00", "not a readable YAML file"),
    (b"\xff\xfes\x00", "not a readable YAML file"),
    (b"caf\xe9: 1", "not a readable YAML file"),
    (b"seed: [1", "not a readable YAML file"),
    (b"seed: 1\nseed: 2", "twice"),
    (b"- seed", "key: value pairs"),
    (b"seed", "key: value pairs"),
    (b"a: &a {b: *a}", "not a readable YAML file"),
    (b"seed: !!python/object/apply:os.system [ls]", "must be of type int"),
    (b"seed: {a: 1}", "seed.a"),
    (b"optim: 3", "is a section"),
    (b"optim:\n\tlr: 1", "not a readable YAML file"),
    (b"? {a: 1}\n: 1", "no text"),
    (b"1: 2", "unknown key"),
    (b"~: 2", "unknown key"),
    (b"optim: {lr: [1, 2]}", "must be of type float"),
    (b"wandb: {tags: {a: 1}}", "wandb.tags.a"),
    (b"run: {name: \"a\\0b\"}", "plain text"),
    (b"x: " + 5000 * b"[", "not a readable YAML file"),
    (ALIASES, "too large"),
    (b"<<: 3", "needs a mapping"),
    (b"seed: 1 # " + 100_000 * b"x" + b"\nseedd: 2", "did you mean seed?"),
]  # fmt: skip

SWEEPS = [
    ("", "must hold a sweep"),
    ("method: random", "method=random"),
    ("method: grid\nmetric: 3", "metric"),
    ("method: grid\nmetric: {name: x, goal: best}", "metric"),
    ("method: grid\nmetric: {goal: maximize}", "metric: needs name"),
    ("{head}\nparameters: 3", "must name parameters"),
    ("{head}\nparameters: {seed: {values: 3}}", "needs values"),
    ("{head}\nparameters: {seed: {values: []}}", "needs values"),
    ("{head}\nparameters: {seed: {values: [1, 1]}}", "are one training"),
    ("{head}\nparameters: {seed: {values: [1, x]}}", "seed=x"),
    ("{head}\nparameters: {run.name: {values: [a]}}", "names its runs"),
    ("{head}\nparameters: {optim: {parameters: {}}}", "must name parameters"),
    ("{head}\nparameters: {wandb.tags: {values: [[a], [a]]}}", "are one training"),
    ("{head}\nparameters: [", "not a readable YAML file"),
]
HEAD = (
    "method: grid\nmetric: {name: val/top1, goal: maximize}\n"
    'command: ["${interpreter}", "-m", dist_resnet.train, "${args_no_hyphens}"]'
)

ENVIRONMENTS = [
    ({"RANK": "x"}, "RANK=x"),
    ({"RANK": "-1"}, "RANK=-1"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
    ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK=1.5"),
    ({"LOCAL_WORLD_SIZE": " "}, ""),
    ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ({"RANK": "1"}, "RANK=1: must be below WORLD_SIZE=1"),
    ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5: must be below WORLD_SIZE=2"),
    ({"RANK": "", "WORLD_SIZE": ""}, ""),
    ({"TORCHELASTIC_RESTART_COUNT": "?"}, "TORCHELASTIC_RESTART_COUNT=?"),
]


@pytest.fixture
def common(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A training that would run: three steps on 53 images."""
    monkeypatch.setattr("dist_resnet.base.signals.install", lambda: None)  # they would stay
    monkeypatch.setattr("dist_resnet.base.signals.defer", lambda: None)
    (tmp_path / "file").write_text("")
    (tmp_path / "a=b").write_text("seed: 1")
    monkeypatch.chdir(tmp_path)
    return [
        f"data.root={tiny.folder.parent}", f"data.dataset={tiny.folder.name}", "run.dir=runs",
        "model.widths=[2,2,2]", "train.epochs=2", "train.max_steps=3", "wandb.mode=disabled",
        "parallel.device=cpu", "parallel.threads=1", "log.every_steps=1", "run.name=job",
        "data.batch_size_per_replica=8",
    ]  # fmt: skip


def _told(main: Main, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and the line of the error."""
    try:
        return main(arguments), ""
    except DistResnetError as error:
        return error.exit_code, str(error)


def _check(found: tuple[int, str], line: str, code: int = 2) -> None:
    assert found[0] == (code if line else 0), found
    assert line in found[1]
    assert found[1].isprintable()
    assert len(found[1]) < 700


@pytest.mark.parametrize(
    "row", WORDS, ids=lambda row: str(row.arguments)[:40].encode("ascii", "replace").decode()
)
def test_words(row: Row, common: list[str], tmp_path: Path) -> None:
    words = [row.arguments] if isinstance(row.arguments, str) else row.arguments
    words = [word.replace("{f}", str(tmp_path)) for word in words]
    _check(_told(train.main, [*common, *words]), row.line, row.code)


@pytest.mark.parametrize("number", range(len(FILES)))
def test_files(number: int, common: list[str], tmp_path: Path) -> None:
    content, line = FILES[number]
    (tmp_path / "a.yaml").write_bytes(content)
    _check(_told(train.main, [str(tmp_path / "a.yaml")]), line)


@pytest.mark.parametrize(("content", "line"), SWEEPS)
def test_sweeps(content: str, line: str, common: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(content.replace("{head}", HEAD))
    _check(_told(sweep.main, [str(tmp_path / "a.yaml"), "--", *common[:-2]]), line)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("environment", "line"), ENVIRONMENTS)
def test_environments(
    environment: dict[str, str], line: str, common: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    _check(_told(train.main, common), line)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", "{"), ("status.json", "[1]"), ("status.json", '{"step": "x"}'),
        ("metrics.jsonl", "{\nnull\n[1]\n{}\n"), ("plan.json", "x"), ("config.yaml", "\x00"),
        (".job", "\x00"), ("wandb/run_id", "\x00"), (".refused", "{"), ("summary.json", "[]"),
    ],
)  # fmt: skip
def test_what_lies_in_a_run_folder(
    name: str, content: str, common: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "runs" / "job" / name
    path.parent.mkdir(parents=True)
    (tmp_path / "runs" / "job" / ".lock").touch()  # else it is somebody else's folder
    path.write_text(content)
    _check(_told(train.main, common), "")
    assert json.loads((tmp_path / "runs" / "job" / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize(
    "name", ["status.json", "config.yaml", "metrics.jsonl", "wandb", "checkpoints", ".lock"]
)
def test_a_folder_where_a_file_is_wanted_or_the_reverse(
    name: str, common: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "runs" / "job" / name
    path.parent.mkdir(parents=True)
    path.write_text("") if "." not in name else path.mkdir()
    code, line = _told(train.main, common)
    assert code in (0, 2), line
    assert line.isprintable()


# Whole processes: what the rows above cannot show of streams, signals and exit codes.
PROCESSES = [
    (["dist_resnet.train", "optim.lrr=1"], {}, 2, "did you mean optim.lr?"),
    (["dist_resnet.train", b"run.name=caf\xe9"], {}, 2, "plain text"),
    (["dist_resnet.train", "seed=x"], {"LOCAL_RANK": "x"}, 2, "seed=x"),
    (["dist_resnet.train", "--print-config"], {"RANK": "x"}, 2, "RANK=x"),
    (["dist_resnet.sweep", "--retry-failed"], {}, 2, "--help"),
    (["dist_resnet.evaluate", "runs" + 300 * "x"], {}, 2, "File name too long"),
    (["dist_resnet.predict", ".", 300 * "x"], {}, 2, "holds no checkpoint"),
    (["dist_resnet.train", "wandb.group=Versuch-ä", "data.root=none", "data.dataset=nöne"],
     {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}, 2, "n\\xf6ne"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "environment", "code", "line"), PROCESSES)
def test_processes(
    arguments: list[str | bytes], environment: dict[str, str], code: int, line: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=tmp_path, capture_output=True, timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    text = done.stderr.decode(errors="replace")
    assert done.returncode == code, text
    assert "Traceback" not in text
    assert len(re.findall("^dist_resnet: ", text, re.MULTILINE)) == 1
    assert line in text.splitlines()[-1]
