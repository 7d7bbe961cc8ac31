"""A user without a home: an unknown number in a container."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_resnet.base.home import ensure_home
from tests.helpers.jobs import ROOT

NOBODY = """
import pwd, sys
def unknown(number):
    raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = unknown
from dist_resnet.base.cli import run_command
"""
HOME = """
def main():
    import getpass
    from pathlib import Path
    from dist_resnet.native.build import _cache
    print(Path.home(), _cache(), getpass.getuser())
    return 0
run_command(main)
"""
TRACKED = """
def main():
    from dist_resnet.config.schema import WandbConfig
    from dist_resnet.tracking.wandb_writer import start_wandb
    tracker = start_wandb(WandbConfig("offline"), sys.argv[1], {}, "the-run", "a name")
    mode = tracker.mode
    tracker.close(0, {})
    print(mode)
    return 0
run_command(main)
"""


def _run(program: str, folder: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", NOBODY + program, str(folder / "run")], cwd=ROOT, text=True,
        env={"PATH": os.environ["PATH"], "TMPDIR": str(folder)} | environment,
        capture_output=True, timeout=240, check=True,
    )  # fmt: skip
    return done.stdout.split()


def test_a_private_folder_serves_as_home(tmp_path: Path) -> None:
    home, cache, name = _run(HOME, tmp_path)
    assert Path(home) == tmp_path / f"dist_resnet-{os.getuid()}"
    assert Path(cache).is_relative_to(home)
    assert Path(home).stat().st_mode & 0o777 == 0o700
    assert name == f"user-{os.getuid()}"
    assert _run(HOME, tmp_path)[0] == home  # what is cached there is found again
    own = str(tmp_path / "own")  # need not exist, as it could be made
    assert _run(HOME, tmp_path, HOME=own)[0] == own


@pytest.mark.parametrize("exists", [True, False])
def test_a_home_that_cannot_be_written_has_its_caches_elsewhere(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    if exists:
        home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "somebody")
    for variable in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "")  # so that what is set below is undone
        monkeypatch.delenv(variable)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    ensure_home()
    private = str(tmp_path / f"dist_resnet-{os.getuid()}")
    assert os.environ["HOME"] == (str(home) if exists else private)  # a key there is still found
    assert os.environ.get("XDG_CACHE_HOME") == (private if exists else None)
    assert os.environ.get("TRITON_CACHE_DIR") == (f"{private}/triton" if exists else None)


def test_somebody_else_s_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"dist_resnet-{os.getuid()}").symlink_to(tmp_path / "theirs")
    assert not Path(_run(HOME, tmp_path)[0]).samefile(tmp_path / "theirs")


def test_wandb_records_without_a_home(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    assert _run(TRACKED, tmp_path) == ["offline"]
