"""The code of a net that a checkpoint names, when others use its weights."""

import sys
from pathlib import Path

import pytest

from dist_resnet.base.errors import UserError
from dist_resnet.config.code import OURS, code_of_run, told_of_code
from dist_resnet.runs.fork import with_code
from dist_resnet.runs.weights import trained_model
from tests.helpers.checkpoints import checkpoint_of
from tests.helpers.training import own_config, small_config, train_step

NET = "from helper_of_net import Plain\ndef net(num_classes): return Plain(num_classes)\n"


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the net net_in_use:net imports."""
    (tmp_path / "net_in_use.py").write_text(NET)
    (tmp_path / "helper_of_net.py").write_text("from tests.helpers.nets import Plain\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "helper_of_net.py"
    for name in ("net_in_use", "helper_of_net"):
        sys.modules.pop(name, None)


def test_the_code_of_a_teachers_net_is_part_of_the_run(helper: Path) -> None:
    teachers = [own_config("net_in_use:net"), small_config()]
    found = code_of_run(small_config(), teachers)
    assert found.keys() == {"dist_resnet", "net_in_use.py", "helper_of_net.py"}
    helper.write_text(helper.read_text() + "1\n")
    assert code_of_run(small_config(), teachers) != found


def test_a_net_with_other_code_than_its_checkpoints_is_told(
    helper: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = own_config("net_in_use:net")
    saved = checkpoint_of(
        config=config,
        state=train_step(config, 1).state.snapshot(),
        classes=list("abcde"),
        code={**code_of_run(config), "an_optimizer.py": "1", "dist_resnet": "other"},
    )
    trained_model(saved, config)
    assert capsys.readouterr().err == ""
    helper.write_text(helper.read_text() + "1\n")
    trained_model(saved, config)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        "model.name=net_in_use:net: its code has changed since the checkpoint: helper_of_net.py; "
        "what it gives may differ\n"
    )


def test_code_that_changed_is_a_fork_where_that_is_allowed() -> None:
    before = {OURS: "1", "net.py": "2"}
    saved = checkpoint_of(code=before)
    assert with_code(saved, before, before, allowed=False) is saved
    assert with_code(None, before, before, allowed=False) is None
    now = before | {"net.py": "3"}
    with pytest.raises(UserError, match=r"changed since its checkpoint: net\.py;"):
        with_code(saved, now, now, allowed=False)
    forked = with_code(saved, now, now, allowed=True)
    assert forked is not None
    assert forked.forks[-1]["changed"] == ["the code of net.py"]
    with pytest.raises(UserError, match=r"the ranks have other code of net\.py"):
        with_code(saved, now, before, allowed=True)


def test_another_version_of_ours_is_told() -> None:
    assert told_of_code({OURS: "1"}, {OURS: "1"}) == told_of_code({}, {OURS: "1"}) == []
    (line,) = told_of_code({OURS: "1"}, {OURS: "2"})
    assert "another version of dist_resnet" in line
