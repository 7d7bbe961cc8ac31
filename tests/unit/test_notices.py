"""When W&B raises an alert, and what it is given to keep."""

from pathlib import Path

import pytest

from dist_resnet.tracking.tracker import Artifact, Row
from dist_resnet.tracking.wandb_notices import STARVED_ROWS, Notices
from tests.unit.test_wandb_writer import _Session, _started


def _titles(rows: list[Row], exit_code: int, reason: str = "") -> list[object]:
    session = _Session()
    tracker = _started(session, [], 5.0)
    notices = Notices(tracker, "the run", lambda: [])
    for row in rows:
        notices.log(row)
    notices.close(exit_code, {"reason": reason})
    tracker.close(exit_code, {})
    return [title for _, title in session.others]


@pytest.mark.parametrize(
    ("exit_code", "title"), [(0, ["finished"]), (3, ["diverged"]), (1, ["failed"]), (75, [])]
)
def test_the_end_is_told_unless_the_run_goes_on(exit_code: int, title: list[str]) -> None:
    assert _titles([{"step": 3}], exit_code) == title


def _waits(*shares: float) -> list[Row]:
    return [{"step": i, "perf/data_wait_fraction": share} for i, share in enumerate(shares)]


def test_starvation_is_told_once_and_only_when_it_lasts() -> None:
    assert STARVED_ROWS == 3
    assert _titles(_waits(0.9, 0.9, 0.4, 0.9, 0.9, 0.5), 75) == []
    rows = _waits(0.9, 0.9)
    rows += [{"step": 2, "val/top1": 0.5}]  # an evaluation's row says nothing about waiting
    assert _titles([*rows, *_waits(*[0.51] * 50)], 75) == ["starved of data"]


def test_files_are_kept_of_a_finished_run_only() -> None:
    class Keeping(_Session):
        def keep(self, artifact: Artifact) -> None:
            self.others.append(("kept", artifact.name))

    for exit_code, expected in ((0, ["best"]), (3, []), (75, [])):
        session = Keeping()
        tracker = _started(session, [], 5.0)
        best = Artifact("best", "model", Path("best.pt"), {})
        Notices(tracker, "the run", lambda best=best: [best]).close(exit_code, {})
        tracker.close(exit_code, {})
        assert [what for how, what in session.others if how == "kept"] == expected
