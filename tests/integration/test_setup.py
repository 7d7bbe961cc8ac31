"""`launch/setup.sh` and the Makefile around it, with a stand-in for Python and pip: what is done
once, what is done anew, and what is refused in one line."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Answers what setup.sh asks of an interpreter; `-m venv` copies it into .venv, pip leaves a line.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
    *version_info*) echo "${STAND_IN_VERSION:-3.11}" ;;
    *_base_executable*) echo "$STAND_IN" ;;
    *base_prefix*) echo False ;;
    *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/pip ;;
    *"-m pip"*)
        echo "$*" >>pip-calls
        if [ -e pip-kill ]; then kill -9 $PPID; fi
        sleep 0.2
        if [ -e pip-fails ]; then exit 1; fi ;;
esac
"""


class Checkout:
    """A copy of what set-up reads, in a folder with a space in its name."""

    def __init__(self, root: Path):
        self.root = root
        (root / "launch").mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "launch/setup.sh"):
            shutil.copy(ROOT / name, root / name)
        self.python = root / "stand in"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        for name in ("PYTHON", "TORCH_INDEX_URL", "CONFIG", "ARGS", "SLOW", "NPROC"):
            clean.pop(name, None)
        return subprocess.Popen(
            ["make", "--no-print-directory", *arguments],
            cwd=self.root,
            env={**clean, "PYTHON": str(self.python), "STAND_IN": str(self.python), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def make(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def pip_calls(self) -> list[str]:
        path = self.root / "pip-calls"
        calls = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return calls


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "a checkout")


def test_a_second_setup_does_nothing(checkout: Checkout) -> None:
    code, output = checkout.make("setup")
    assert code == 0, output
    (call,) = checkout.pip_calls()
    assert "-c constraints.txt" in call
    assert checkout.make("setup") == (0, "")
    assert checkout.make("setup", PYTHON="") == (0, "")
    assert checkout.pip_calls() == []


def test_changed_pins_update_the_environment_in_place(checkout: Checkout) -> None:
    checkout.make("setup")
    (checkout.root / ".venv" / "kept").touch()
    checkout.pip_calls()
    with (checkout.root / "constraints.txt").open("a") as file:
        file.write("something==1\n")
    assert checkout.make("setup", PYTHON="")[0] == 0
    assert len(checkout.pip_calls()) == 1
    assert (checkout.root / ".venv" / "kept").exists()


@pytest.mark.parametrize("reason", ["killed", "failed"])
def test_an_unfinished_setup_is_made_anew(checkout: Checkout, reason: str) -> None:
    trap = checkout.root / {"killed": "pip-kill", "failed": "pip-fails"}[reason]
    trap.touch()
    assert checkout.make("setup")[0] != 0
    (checkout.root / ".venv" / "half").touch()
    trap.unlink()
    checkout.pip_calls()
    code, output = checkout.make("setup")
    assert code == 0, output
    assert len(checkout.pip_calls()) == 1
    assert not (checkout.root / ".venv" / "half").exists()
    assert checkout.make("setup") == (0, "")


def test_a_moved_checkout_and_another_python_get_a_new_environment(checkout: Checkout) -> None:
    checkout.make("setup")
    (checkout.root / ".venv" / "old").touch()
    moved = checkout.root.with_name("moved")
    checkout.root.rename(moved)
    checkout.root, checkout.python = moved, moved / "stand in"
    assert checkout.make("setup")[0] == 0
    assert not (moved / ".venv" / "old").exists()
    # The stand-in in .venv reports the version of its own time of making.
    python = moved / ".venv" / "bin" / "python"
    python.write_text(python.read_text().replace("${STAND_IN_VERSION:-3.11}", "3.11"))
    (moved / ".venv" / "old").touch()
    assert checkout.make("setup", STAND_IN_VERSION="3.12")[0] == 0
    assert not (moved / ".venv" / "old").exists()


def test_an_environment_made_by_hand_is_used_or_refused_but_never_deleted(
    checkout: Checkout,
) -> None:
    subprocess.run([checkout.python, "-m", "venv", ".venv"], cwd=checkout.root, check=True)
    mine = checkout.root / ".venv" / "mine"
    mine.touch()
    python = checkout.root / ".venv" / "bin" / "python"
    fits = python.read_text()
    python.write_text(fits.replace("${STAND_IN_VERSION:-3.11}", "3.10"))
    code, output = checkout.make("setup")
    assert code == 2
    assert ".venv exists, was not made by this set-up" in output
    python.write_text(fits)
    assert checkout.make("setup")[0] == 0
    assert mine.exists()


def test_two_at_once_install_once(checkout: Checkout) -> None:
    processes = [checkout.start("setup") for _ in range(3)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len(checkout.pip_calls()) == 1


def test_torch_from_another_index_is_remembered(checkout: Checkout) -> None:
    url = "https://example.invalid/whl/cpu"
    assert checkout.make("setup", TORCH_INDEX_URL=url)[0] == 0
    first, second = checkout.pip_calls()
    assert f"--index-url {url} torch==" in first
    assert "torchvision==" in first
    assert "--index-url" not in second
    assert checkout.make("setup") == (0, "")
    (checkout.root / "constraints.txt").open("a").close()
    assert checkout.make("setup", TORCH_INDEX_URL=url + "2")[0] == 0
    assert len(checkout.pip_calls()) == 2


@pytest.mark.parametrize("version", ["2.7", "3.10", "3.14"])
def test_an_unfit_python_is_refused_in_one_line(checkout: Checkout, version: str) -> None:
    code, output = checkout.make("setup", STAND_IN_VERSION=version)
    line, make_line = output.splitlines()
    assert code == 2
    assert f"is Python {version}; this needs Python 3.11, 3.12 or 3.13" in line
    assert make_line.startswith("make: ***")
    assert not (checkout.root / ".venv").exists()


def test_missing_system_packages_without_root_are_one_command_to_run(
    checkout: Checkout, tmp_path: Path
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "env", "flock", "make", "sed", "sha256sum"):
        (tools / name).symlink_to(str(shutil.which(name)))
    for name, answer in {"id": "echo 1000", "apt-get": "exit 1", "sudo": "exit 1"}.items():
        (tools / name).write_text(f"#!{shutil.which('bash')}\n{answer}\n")
        (tools / name).chmod(0o755)
    code, output = checkout.make("setup", PATH=str(tools))
    line, _ = output.splitlines()
    assert code == 2
    assert line.endswith(
        "sudo apt-get update && sudo apt-get install -y --no-install-recommends "
        "g++ pkg-config libopencv-dev libturbojpeg0-dev"
    )


def test_train_starts_the_embedded_run_anew_and_continues_any_other(checkout: Checkout) -> None:
    assert checkout.make("setup")[0] == 0
    # Which counts the GPUs, and restarts what dies: tests/unit/test_launch_run.py.
    launcher = checkout.root / "launch" / "single_node.sh"
    launcher.write_text('#!/usr/bin/env bash\necho "$PYTHON, $NPROC:" "$@"\n')
    launcher.chmod(0o755)
    code, output = checkout.make("train", "NPROC=3", "ARGS=train.epochs=1")
    told = ".venv/bin/python, 3: configs/digits.yaml run.overwrite=true train.epochs=1\n"
    assert (code, output) == (0, told)
    code, output = checkout.make("train", "CONFIG=my runs/a.yaml")
    assert (code, output) == (0, ".venv/bin/python, : my runs/a.yaml\n")


def test_every_declared_dependency_is_pinned_and_this_python_is_in_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in declared:
        name = requirement.split(">")[0].split("=")[0].strip()
        assert name in pinned
    assert project["requires-python"] == ">=3.11,<3.14"
    assert (3, 11) <= sys.version_info[:2] <= (3, 13)
    assert not any(name.startswith(("nvidia-", "cuda-", "triton")) for name in pinned)


def test_ignored_names_hide_no_source() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    paths = [
        "dist_resnet/data/prepare.py",
        "dist_resnet/tracking/wandb_writer.py",
        "tests/data/x.py",
    ]
    run = subprocess.run(
        ["git", "check-ignore", "--no-index", *paths], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout == ""
    made = ["data/cifar10/train.beton", "runs/a/summary.json", ".venv", "wandb/x"]
    run = subprocess.run(
        ["git", "check-ignore", "--no-index", *made], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout.splitlines() == made
