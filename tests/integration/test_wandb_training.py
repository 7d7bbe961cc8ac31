"""What a real training on two ranks leaves with W&B: every curve, picture and file in its place."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import Outcome, differences, run_job
from tests.helpers.wandb_child import Child
from tests.helpers.wandb_readback import Recorded, read_run
from tests.helpers.wandb_stub import WandbStub

pytest.importorskip("wandb")
ROOT = Path(__file__).parents[2]
PICTURES = ("data/train_batch", "val/confusion_image", "val/worst")


@dataclass(frozen=True)
class Trained:
    """A finished training and what W&B recorded of it, offline."""

    folder: Path
    outcome: Outcome
    files: Path
    record: Recorded


def _train(data: Dataset, folder: Path, name: str, *pairs: str, ranks: int = 2) -> Outcome:
    settings = [
        f"data.root={data.folder.parent}", f"data.dataset={data.folder.name}",
        "data.batch_size_per_replica=4", "model.widths=[8,8,8]", "data.loader=resident",
        "train.epochs=2", "eval.flip_tta=true", "log.every_steps=2", "parallel.device=cpu",
        "parallel.threads=1",
        f"run.dir={folder}", f"run.name={name}", *pairs,
    ]  # fmt: skip
    return run_job(ranks, settings, folder)


@pytest.fixture(scope="module")
def trained(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_OF_MINE", "canary")
        pairs = ("wandb.media_every_epochs=1", "wandb.artifacts=true", "wandb.group=g")
        outcome = _train(tiny, folder, "offline", "wandb.mode=offline", *pairs, "wandb.tags=[a,b]")
    assert outcome.code == 0, outcome.output
    (files,) = (folder / "offline" / "wandb").glob("offline-run-*")
    return Trained(folder / "offline", outcome, files, read_run(files))


def _logged(record: Recorded) -> set[str]:
    return {key for row in record.history for key in row if not key.startswith("_")}


def test_every_panel_has_data_and_every_metric_a_panel(trained: Trained) -> None:
    from dist_resnet.dashboard import SECTIONS

    logged = _logged(trained.record)
    panels = [panel for section in SECTIONS.values() for panel in section]
    metrics = {metric for panel in panels for metric in panel.metrics}
    axes = {"step", "epoch", "seconds"}
    unseen = {key for key in logged - axes if not any(fnmatchcase(key, m) for m in metrics)}
    assert unseen == set(), "logged, and in no panel of dist_resnet.dashboard"
    empty = {m for m in metrics if not any(fnmatchcase(key, m) for key in logged)}
    absent = {"perf/gpu_memory_mb", "perf/gpu_utilisation", "val/top5"}
    assert empty == absent, "in a panel, and never logged"
    assert {p.only_with for p in panels if set(p.metrics) & empty} == {
        "a GPU",
        "more than five classes",
    }


def test_every_curve_is_over_the_step(trained: Trained) -> None:
    axes = trained.record.step_metrics
    for key in _logged(trained.record) - {"step", "epoch", "seconds", "data/train_batch"}:
        assert axes.get(f"{key.split('/')[0]}/*") == "step", key
    assert all("step" in row for row in trained.record.history)
    # W&B's own count has no gap: what a checkpoint stores as its position stays true.
    steps = [row["_step"] for row in trained.record.history]
    assert steps == list(range(len(steps)))


def test_the_run_says_what_it_was(trained: Trained) -> None:
    config, run = trained.record.config, trained.record.run
    assert (run["run_group"], run["job_type"], run["tags"]) == ("g", "train", ["a", "b"])
    assert config["model"]["widths"] == [8, 8, 8]
    assert config["plan"]["world_size"] == 2
    assert {"torch", "wandb", "python"} <= config["versions"].keys()
    assert len(config["dataset"]) == 64
    assert "git_commit" in config
    assert trained.record.exit_code == 0
    # Of torchrun and all ranks, not of rank 0 alone.
    assert "proc.memory.rssMB" in trained.record.system


def test_nothing_of_this_machine_leaves_it(trained: Trained) -> None:
    files = [path for path in trained.files.rglob("*") if path.is_file()]
    # wandb's logs stay here: `wandb sync` sends the record and files/.
    sent = [path.read_bytes() for path in files if path.parent.name != "logs"]
    assert len(sent) > 5
    assert not any(b"canary" in data for data in sent)
    host = socket.gethostname().encode()
    assert len(host) < 4 or not any(host in data for data in sent)


def test_no_pictures_where_none_are_wanted(tiny: Dataset, tmp_path: Path) -> None:
    pairs = "wandb.mode=offline", "wandb.media_every_epochs=0"
    outcome = _train(tiny, tmp_path, "plain", *pairs, ranks=1)
    assert outcome.code == 0, outcome.output
    (files,) = (tmp_path / "plain" / "wandb").glob("offline-run-*")
    assert "val/top1" in (logged := _logged(read_run(files)))
    assert logged.isdisjoint(PICTURES)


def test_pictures_at_their_cadence(trained: Trained) -> None:
    rows = trained.record.history
    shown = {key: [row[key] for row in rows if key in row] for key in PICTURES}
    assert {key: len(found) for key, found in shown.items()} == {
        "data/train_batch": 1, "val/confusion_image": 2, "val/worst": 2,
    }  # fmt: skip
    for found in shown.values():
        for entry in found:
            assert entry["caption"].startswith("step ")
            with Image.open(trained.files / "files" / entry["path"]) as picture:
                assert picture.size == (entry["width"], entry["height"])
    with_chart = [row["step"] for row in rows if "val/confusion_matrix_table" in row]
    assert with_chart == [trained.record.config["plan"]["total_steps"]]


def test_what_is_kept_and_told(trained: Trained) -> None:
    kept = trained.record.artifacts
    (best,) = (trained.folder / "checkpoints").glob("best-*.pt")
    assert kept["model"] == [best.name]
    assert kept["dataset"] == ["dataset.json"]
    assert trained.record.alerts == ["finished"]


def test_weights_do_not_depend_on_wandb(trained: Trained, tiny: Dataset, tmp_path: Path) -> None:
    outcome = _train(tiny, tmp_path, "disabled", "wandb.mode=disabled")
    assert outcome.code == 0, outcome.output
    assert not list((tmp_path / "disabled" / "wandb").glob("*run-*"))
    assert differences(trained.folder, tmp_path / "disabled") == []


def test_sent_later_with_its_pictures_and_files(trained: Trained, tmp_path: Path) -> None:
    with WandbStub() as server:
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", str(trained.files)],
            env=Child(tmp_path).environment(server.env()),
            check=True,
            timeout=240,
            capture_output=True,
        )
        (run_id,) = server.runs
        assert server.unknown == []
        assert len(server.history(run_id)) == len(trained.record.history)
        assert [alert["title"] for alert in server.runs[run_id].alerts] == ["finished"]
        states = {artifact["state"] for artifact in server.artifacts.values()}
        assert (len(server.artifacts), states) == (3, {"COMMITTED"})
        names = " ".join(server.files)
        assert all(
            word in names for word in ("train_batch_", "worst_", "confusion_image_", "best-")
        )


def test_the_dashboard_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra `dashboard` is not installed")
    with WandbStub() as server:
        done = subprocess.run(
            [sys.executable, "-m", "dist_resnet.dashboard", "--entity", "tester"],
            env=Child(tmp_path).environment(
                server.env() | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
            ),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        (view,) = server.views
        assert "tester/dist_resnet" in done.stdout
        for words in ("train/loss", "metricRegex", "val/confusion_matrix_table", "val/worst"):
            assert words in view["spec"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "--entity NAME"), (["--entty", "x"], "--entty"), (["--name"], "--name: expected")],
)
def test_the_dashboard_command_refuses(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from dist_resnet.base.errors import UserError
    from dist_resnet.dashboard import main

    with pytest.raises(UserError, match=words):
        main(arguments)
    assert main(["--dry-run"]) == 0
    assert '"val/worst"' in capsys.readouterr().out


def test_dry_run_needs_neither_wandb_nor_its_extra(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['wandb'] = sys.modules['wandb_workspaces'] = None;"
        "from dist_resnet.dashboard import main; main(['--dry-run']);"
        "assert 'torch' not in sys.modules; main(['--entity', 'x'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "online"}, cwd=tmp_path,
    )  # fmt: skip
    assert '"Learning"' in done.stdout
    assert "pip install 'dist-resnet[dashboard]'" in done.stderr.splitlines()[-1]


def test_leet_shows_the_run(trained: Trained, tmp_path: Path) -> None:
    """The terminal's own view of the same files, under a pseudo-terminal of 160 x 50."""
    seen = _in_a_terminal(
        [sys.executable, "-m", "wandb", "leet", str(trained.files)],
        Child(tmp_path).environment({"TERM": "xterm-256color"}),
        (b"train/loss", b"val/top1"),
    )
    if len(seen) < 1000:  # not even a frame
        pytest.skip(f"wandb leet does not start here: {seen[-200:]!r}")
    assert b"train/loss" in seen
    assert b"val/top1" in seen


def _in_a_terminal(command: list[str], env: dict[str, Any], words: tuple[bytes, ...]) -> bytes:
    """What `command` shows until all `words` have come, 25 s at most; then it is ended."""
    import fcntl
    import pty
    import select
    import struct
    import termios
    import time

    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
    job = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
    )
    os.close(theirs)
    seen, end = b"", time.monotonic() + 25
    try:
        while time.monotonic() < end and not all(word in seen for word in words):
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    seen += os.read(ours, 65536)
                except OSError:  # its end of the terminal is closed
                    break
        os.write(ours, b"q")
        job.wait(240)
    except (OSError, subprocess.TimeoutExpired):
        pass
    finally:
        job.kill()
        job.wait()
        os.close(ours)
    return seen


@pytest.mark.parametrize("switch", ["WANDB_MODE=offline", "WANDB_DISABLED=true"])
def test_the_dashboard_is_not_sent_where_wandb_is_switched_off(
    switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_resnet import dashboard
    from dist_resnet.base.errors import UserError

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv(*switch.split("="))
    monkeypatch.setattr(dashboard, "save", lambda *words: pytest.fail("sent"))
    with pytest.raises(UserError, match=switch):
        dashboard.main(["--entity", "tester"])
    assert dashboard.main(["--dry-run"]) == 0
