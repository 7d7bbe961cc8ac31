"""How a command ends: its line, said once, and where torchrun looks for it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dist_resnet.base.errors import UserError
from tests.helpers.jobs import ROOT

# The patience of the ranks that are not their machine's first is for torchrun to end them in.
_COMMAND = """
import sys
{imports}
from dist_resnet.base import cli
from dist_resnet.base.errors import *
cli._PATIENCE_SECONDS = 0
def main():
    raise {error}
cli.run_command(main)
"""
FULL = 'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\\nAnd so on")'


def ended(error: str, folder: Path, rank: int = 0) -> tuple[int, list[str], Path]:
    file = folder / "error.json"
    environment = os.environ | {"TORCHELASTIC_ERROR_FILE": str(file), "LOCAL_RANK": str(rank)}
    imports = "import torch" if "torch" in error else ""
    program = _COMMAND.replace("{error}", error).replace("{imports}", imports)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines(), file


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("UserError('seed=x: no number')", 2, "seed=x: no number"),
        ("UserError('method=a\\nb')", 2, r"method=a\nb"),
        ("Diverged('diverged: at step 3')", 3, "diverged: at step 3"),
        ("PeerLost('rank 0: lost contact')", 1, "rank 0: lost contact"),
        ("OutOfMemory('GPU 0 is full')", 2, "GPU 0 is full"),
        (FULL, 2, "CUDA out of memory. Tried to allocate 2 GiB.; free the GPU"),
        (
            "UnicodeEncodeError('ascii', 'runs/\xe4', 5, 6, 'no')",
            2,
            "runs/\xe4: no name for a file",
        ),
        ("SystemExit(0)", 1, "ended by a call of sys.exit(0)"),  # in somebody's net, say
        ("OSError(5, 'Input/output error')", 2, "the output: cannot be written: Input/output"),
        ("ZeroDivisionError('by zero')", 1, "ZeroDivisionError: by zero"),
    ],
)
def test_torchruns_report_gives_the_line_once(
    tmp_path: Path, error: str, code: int, line: str
) -> None:
    returned, lines, file = ended(error, tmp_path)
    assert returned == code
    if not error.startswith("Zero"):  # a bug, which shows its traceback
        assert len(lines) == 1
        assert line in lines[0]
    if error.startswith("OSError"):  # the terminal, of which torchrun has its own view
        return
    report = str(ChildFailedError("train", {0: ProcessFailure(0, 7, code, str(file))}))
    _, root = report.split("Root Cause")
    assert root.count(line) == 1
    assert report.count(line) == 1
    assert f"exitcode  : {code}" in root
    assert json.loads(file.read_text())["message"]["extraInfo"].keys() == {"timestamp"}


def test_a_run_that_goes_on_has_no_error_to_report(tmp_path: Path) -> None:
    code, lines, file = ended("Preempted('stopped by SIGTERM')", tmp_path)
    assert (code, lines) == (75, ["dist_resnet: stopped by SIGTERM"])
    assert not file.exists()


@pytest.mark.parametrize(
    "kind", ["UserError", "Diverged", "PeerLost", "Preempted", "ValueError", "FileExistsError"]
)
def test_it_ends_without_the_interpreters_tear_down(tmp_path: Path, kind: str) -> None:
    """Which would destroy what a rank that fails alone keeps: NCCL waits there for the others."""
    program = f"""
import atexit
class Kept:
    def __del__(self):
        print("torn down")
kept = Kept()
atexit.register(print, "hooks")
{_COMMAND}"""
    program = program.replace("{error}", f"{kind}('x')").replace("{imports}", "")
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    unforeseen = kind.endswith("Error") and kind != "UserError"
    assert done.stderr.splitlines()[-1] == f"{kind if unforeseen else 'dist_resnet'}: x"
    assert ("Traceback" in done.stderr) == unforeseen
    assert done.stdout == "hooks\n"


@pytest.mark.parametrize(
    ("error", "speaks"),
    [
        ("UserError('x')", False),
        ("Diverged('x')", False),
        ("Preempted('x')", False),
        ("PeerLost('x')", True),
        ("OutOfMemory('x')", True),
        (FULL, True),
    ],
)
def test_what_one_rank_alone_may_have_it_says_itself(
    tmp_path: Path, error: str, speaks: bool
) -> None:
    _, lines, _ = ended(error, tmp_path, rank=1)
    assert len(lines) == speaks


@pytest.mark.parametrize(
    "command",
    ["bench", "dashboard", "data.prepare", "doctor", "evaluate", "export", "predict", "report"]
    + ["sweep"],
)
def test_every_command_reads_its_line_alike(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong word is one line that names the command; --help begins with how to write it."""
    package = importlib.import_module(f"dist_resnet.{command}")
    is_package = hasattr(package, "__path__")
    module = importlib.import_module(f"dist_resnet.{command}.__main__") if is_package else package
    if command == "data.prepare":
        assert module.main(["--nonsense"]) == 2
        said = capsys.readouterr().err.strip().removeprefix("dist_resnet: ")
    else:
        with pytest.raises(UserError) as caught:
            module.main(["--nonsense"])
        said = str(caught.value)
    assert said.startswith(f"{command}: ")
    assert said.endswith("; see --help")
    assert "\n" not in said
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m dist_resnet.{command} ")
