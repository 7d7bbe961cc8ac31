"""The report: every figure as the files have it, nothing fetched, nothing unescaped."""

import base64
import io
import itertools
import json
import re
from pathlib import Path
from statistics import quantiles

import numpy as np
import pytest
from PIL import Image

from dist_resnet.base.chart import Series, curves, thin, ticks
from dist_resnet.base.errors import UserError
from dist_resnet.report.__main__ import main
from dist_resnet.report.page import png_uri
from dist_resnet.report.text import sparkline
from tests.helpers.report_page import Page, make_run, write_json

HEADLINE, CLASSES, SPEED = "Finished runs", "each class's images", "all windows"


def page_of(output: Path, *runs: Path) -> Page:
    assert main([*map(str, runs), "--output", str(output)]) == 0
    return Page(output.read_text())


def test_a_finished_runs_figures_are_those_of_its_summary(tmp_path: Path) -> None:
    rows = make_run(tmp_path / "run")
    page = page_of(tmp_path / "r.html", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    table = page.table(HEADLINE)
    names = {"images/s": "images_per_second", "wall seconds": "wall_seconds"}
    keys = ["step", "epoch", "val/top1", "best/val/top1", "best/step", "val/loss", "train/top1"]
    for key in [*keys, "gap/top1", "parameters", *names]:
        (cell,) = table.row(key)
        assert float(str(cell.value)) == summary[names.get(key, key)], key
    shown = {key: table.row(key)[0].text for key in ("val/top1", "images/s", "step")}
    top1 = rows[-1]["val/top1"]
    assert shown == {"val/top1": f"{top1:.4f}", "images/s": "4,321", "step": "600"}
    for name in ("cat", "dog"):
        (cell,) = page.table(CLASSES).row(name)
        assert float(str(cell.value)) == summary[f"val/per_class/{name}"]
    assert page.texts["dt"] == ["a finding"]
    assert page.texts["dd"] == ["from the summary"]
    facts = page.table("From summary.json")
    assert facts.row("versions.torch")[0].text == "9.9.9"
    assert facts.row("git_commit")[0].text == "abc123"


def test_a_running_runs_figures_are_the_newest_rows(tmp_path: Path) -> None:
    rows = make_run(tmp_path / "run", 3, 4, False)
    worse = dict(rows[-1], step=650, epoch=3.25, **{"val/top1": 0.1, "gap/top1": 0.05})
    torn = '{"step": 700, "val/top1": 0.9'
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(worse) + "\n" + torn)
    page = page_of(tmp_path / "r.html", tmp_path / "run")
    table = page.table(HEADLINE)
    expected = {
        "step": 650, "epoch": 3.25, "val/top1": 0.1, "best/val/top1": rows[-1]["val/top1"],
        "best/step": 600, "train/top1": 0.1 + 0.05, "gap/top1": 0.05,
        "images/s": rows[-2]["perf/images_per_second"],
    }  # fmt: skip
    for name, value in expected.items():
        assert float(str(table.row(name)[0].value)) == value, name
    assert table.row("parameters")[0].value is None
    assert "generalisation gap" in page.texts["dt"]  # computed from the rows
    # Called again, it shows what came since.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('}\n{"step": 750, "epoch": 3.75, "val/top1": 0.2, "gap/top1": 0}\n')
    table = page_of(tmp_path / "r.html", tmp_path / "run").table(HEADLINE)
    assert [table.row(name)[0].value for name in ("step", "val/top1")] == ["750", "0.2"]


def test_the_first_line_is_the_result_in_plain_words(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    file = tmp_path / "run" / "summary.json"
    told = {
        "val/top1": 0.92874, "val/images": 10000, "gap/top1": 0.021, "epoch": 150.0,
        "wall_seconds": 4810.0, "world_size": 2, "eval_set": "test set",
        "best/val/top1": 0.9301, "best/step": 560, "val/top1_tta": 0.9295,
        "hardware": {"cpu": "Some CPU", "threads_per_rank": 1},
    }  # fmt: skip
    summary = json.loads(file.read_text()) | told
    cases = {
        "92.87% of 10,000 test images (best 93.01% at epoch 140, 92.95% with mirror images), 150"
        " epochs, train minus test +2.1 points, 1 h 20 min on 2 threads of Some CPU": {},
        "92.87% of 5,000 held-out images, 150 epochs, train minus held-out +2.1 points, 4 min on 1"
        " x GPU":
        {"eval_set": "held-out training images", "val/images": 5000, "wall_seconds": 245.0,
         "world_size": 1, "hardware": {"gpu": "GPU"}, "best/step": 600, "val/top1_tta": None},
        "92.87% of 10,000 test images, 150 epochs, train minus test +2.1 points, 1 h 20 min on 2"
        " threads of Some CPU": {"best/val/top1": 0.92874, "val/top1_tta": None},
        "150 epochs": {"val/top1": "x", "gap/top1": None, "wall_seconds": None, "hardware": 3},
    }  # fmt: skip
    for line, other in cases.items():
        write_json(file, summary | other)
        page = page_of(tmp_path / "r.html", tmp_path / "run")
        assert page.texts["p"][0].removeprefix("no evaluation yet, ") == line
        assert next(attrs.get("class") for tag, attrs in page.tags if tag == "p") == "result"
        # Then the curves; the raw keys are further down.
        ids = [str(attrs["id"]) for tag, attrs in page.tags if tag == "section"]
        assert ids[0] == "curves"
        assert ids.index("figures") > ids.index("classes")
    file.unlink()
    page = page_of(tmp_path / "r.html", tmp_path / "run")
    assert page.texts["p"][0].endswith("3 epochs, train minus test -3.1 points, 15 s (so far)")
    (tmp_path / "run" / "config.yaml").write_text("data: {val_split: 5}\n")
    page = page_of(tmp_path / "r.html", tmp_path / "run")
    assert "train minus held-out -3.1" in page.texts["p"][0]
    assert "best" not in page.texts["p"][0]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 800, "epoch": 4, "val/top1": 0.1}\n')
    page = page_of(tmp_path / "r.html", tmp_path / "run")
    assert re.match(
        r"10\.00% of held-out images \(best \d\d\.\d\d% at epoch 3\)", page.texts["p"][0]
    )


def test_below_the_first_line_stands_what_the_diagnosis_advises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run")
    assert page_of(tmp_path / "r.html", tmp_path / "run").texts["p"][1].startswith("resnet20 on")
    file = tmp_path / "run" / "summary.json"
    names = ("generalisation gap", "overfitting", "decline at low learning rate")
    findings = [{"name": name, "text": "why"} for name in names]
    write_json(file, json.loads(file.read_text()) | {"diagnosis": findings})
    advice = (
        "Overfitting: more mixup or dropout may help. Decline at low learning rate: the best"
        " checkpoint may serve better, and more regularisation may help."
    )
    assert page_of(tmp_path / "r.html", tmp_path / "run").texts["p"][1] == advice
    capsys.readouterr()
    assert main([str(tmp_path / "run"), "--text"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == f"  {advice}"
    # As long as it runs nothing is advised: half a run looks like underfitting.
    file.unlink()
    rows = [
        {"step": 10 * n, "epoch": n, "train/top1": 0.05 * n, "val/top1": 0.06 * n, "gap/top1": -0.1}
        for n in range(1, 11)
    ]
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(tmp_path / "r.html", tmp_path / "run")
    assert "underfitting" in page.texts["dt"]
    assert "Underfitting" not in page.texts["p"][1]


def test_speed_is_the_quartiles_of_the_rows(tmp_path: Path) -> None:
    rows = make_run(tmp_path / "run")
    table = page_of(tmp_path / "r.html", tmp_path / "run").table(SPEED)
    for key in ("perf/images_per_second", "perf/step_ms", "perf/data_wait_fraction"):
        values = [row[key] for row in rows if key in row]
        cells = [float(str(cell.value)) for cell in table.row(key)]
        assert cells == [*quantiles(values, n=4, method="inclusive"), len(values)]


def test_a_run_before_its_first_evaluation_and_without_any_other_file(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 50, "epoch": 0.5, "train/loss": null}\n')
    page = page_of(tmp_path / "r.html", run)
    assert page.table(HEADLINE).row("step")[0].value == "50"
    assert "No evaluation yet." in page.texts["p"]
    assert main([str(run), "--text"]) == 0


def test_two_runs_show_the_keys_in_which_they_differ(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 3, 4, True, "optim.lr=0.1")
    make_run(tmp_path / "b", 3, 4, False, "optim.lr=0.2", "model.shortcut=pad")
    page = page_of(tmp_path / "r.html", tmp_path / "a", tmp_path / "b")
    table = page.table("Keys in which the runs differ")
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["key", "a", "b"],
        ["model.shortcut", "projection", "pad"],
        ["optim.lr", "0.1", "0.2"],
    ]
    assert [cell.value for cell in page.table(HEADLINE).row("state")] == ["done", "running"]
    assert "Not known of b" in " ".join(page.texts["p"])


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        make_run(tmp_path / parent / "run")
    page = page_of(tmp_path / "r.html", tmp_path / "a" / "run", tmp_path / "b" / "run")
    head = [cell.text for cell in page.table(HEADLINE).rows[0]]
    assert head[1:] == [str(tmp_path / parent / "run") for parent in ("a", "b")]


def test_one_run_shows_where_it_departs_from_the_defaults(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 3, 4, True, "optim.lr=0.1")
    table = page_of(tmp_path / "r.html", tmp_path / "run").table("config.yaml")
    assert [cell.text for cell in table.row("optim.lr")] == ["0.1", "0.05"]
    assert [cell.text for cell in table.row("optim.momentum")] == ["0.9", ""]


def test_a_configuration_of_another_version_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("optim: {lrr: 1}\n")
    page = page_of(tmp_path / "r.html", tmp_path / "run")
    assert any("unknown key" in text for text in page.texts["p"])
    assert page.table(HEADLINE).row("val/top1")[0].value


def test_the_page_is_whole_and_can_be_used_without_a_mouse(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    page = page_of(tmp_path / "r.html", tmp_path / "a", tmp_path / "b")
    text = (tmp_path / "r.html").read_text()
    assert not re.search(r"https?://|//[a-z]|url\(|@import", text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        for key in ("src", "href"):
            target = str(attrs.get(key, "data:"))
            assert target.startswith("data:") or target.removeprefix("#") in ids, (tag, target)
        assert tag not in ("script", "link", "iframe", "object", "form")
        assert not any(key.startswith("on") for key in attrs)
        assert tag != "img" or attrs["alt"]
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert page.tags[0] == ("html", {"lang": "en"})
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert all(later - level <= 1 for level, later in itertools.pairwise(levels))
    assert all("http-equiv" not in a or a["http-equiv"] != "refresh" for _, a in page.tags)
    for table in page.tables:
        assert table.caption
        assert all(cell.scope == "col" for cell in table.rows[0])
        assert all(row[0].header and row[0].scope == "row" for row in table.rows[1:])
    for tag, attrs in page.tags:
        assert tag != "svg" or attrs.get("aria-hidden") == "true" or attrs["aria-label"]
    links = [attrs for tag, attrs in page.tags if tag == "a"]
    assert links[0]["href"] == "#main"  # the skip link comes first


def test_a_hash_is_shortened_for_the_eye_only(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    commit = "0123456789abcdef" * 2 + "01234567+"
    write_json(tmp_path / "run" / "summary.json", summary | {"git_commit": commit})
    facts = page_of(tmp_path / "r.html", tmp_path / "run").table("From summary.json")
    assert [(c.text, c.value) for c in facts.row("git_commit")] == [("0123456789ab+", commit)]
    (fingerprint,) = facts.row("dataset.fingerprint")
    assert (fingerprint.text, fingerprint.value) == ("f" * 12, "f" * 64)


def test_no_curve_ends_above_the_highest_mark_or_below_the_lowest() -> None:
    for values in ((0.35, 0.989), (-0.21, -0.107), (2.0, 2.0), (3e-6, 0.0497)):
        points = list(enumerate(values))
        drawn = Page(curves("t", [Series("s", [(float(x), y) for x, y in points], 0)]))
        d = {str(a.get("class", "")): str(a["d"]) for tag, a in drawn.tags if tag == "path"}
        line = next(d[kind] for kind in d if kind.startswith("line"))
        places = [float(pair.split()[1]) for pair in re.split("[ML]", line)[1:]]
        marks = [
            float(re.split("[ H]", str(a["d"]))[1])
            for tag, a in drawn.tags
            if tag == "path" and a.get("class") in ("grid", "axis")
        ]
        assert min(marks) - 0.11 <= min(places)  # SVG counts downwards
        assert max(places) <= max(marks) + 0.11


def test_what_files_say_is_text(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>\"&"
    run = tmp_path / evil.replace("/", "_")
    make_run(run, 1)
    rows = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(rows.replace("per_class/cat", "per_class/<b>cat"))
    summary = json.loads((run / "summary.json").read_text())
    summary["diagnosis"] = [{"name": evil, "text": evil}]
    summary["versions"] = {evil: evil}
    summary["val/per_class/<b>cat"] = 0.5
    write_json(run / "summary.json", summary)
    write_json(run / "status.json", {"state": evil, "reason": evil})
    write_json(run / "plan.json", {evil: evil})
    page = page_of(tmp_path / "r.html", run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert evil in page.texts["dd"]
    assert page.table(CLASSES).row("<b>cat")
    assert "<script" not in (tmp_path / "r.html").read_text()


def test_a_run_of_150_epochs_stays_small(tmp_path: Path) -> None:
    rows = make_run(tmp_path / "run", 150, 16)  # 2,400 windows: 117,000 steps, a row every 50
    assert len(rows) == 150 * 17
    output = tmp_path / "r.html"
    page = page_of(output, tmp_path / "run")
    assert output.stat().st_size < 300_000  # images of mistakes and samples add about 200,000
    assert page.table(HEADLINE).row("val/top1")[0].value == repr(rows[-1]["val/top1"])
    assert page.table(SPEED).row("perf/step_ms")[-1].value == "2400"


def test_thinning_keeps_the_ends_and_every_extreme(rng: np.random.Generator) -> None:
    values = rng.normal(size=5000)
    values[1234], values[4321] = 50.0, -50.0
    points = [(float(i), float(value)) for i, value in enumerate(values)]
    kept = thin(points, buckets=100)
    assert len(kept) <= 202
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert {points[0], points[-1], points[1234], points[4321]} <= set(kept)
    assert thin(points[:200], buckets=100) == points[:200]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.31, 0.78, [0.4, 0.5, 0.6, 0.7]),
        (0.0, 150.0, [0, 50, 100, 150]),
        (-0.15, 0.0, [-0.15, -0.1, -0.05, 0]),
        (3.0, 3.0, [3.0]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_curve_lies_where_its_figures_say() -> None:
    drawn = Page(curves("t", [Series("s", [(0.0, 0.0), (1.0, 1.0), (2.0, 0.5)], 0)]))
    (line,) = (a["d"] for tag, a in drawn.tags if str(a.get("class", "")).startswith("line"))
    places = [tuple(map(float, pair.split())) for pair in re.split("[ML]", str(line))[1:]]
    (x0, bottom), (x1, top), (x2, middle) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert top < middle < bottom  # SVG counts downwards
    assert middle == pytest.approx((top + bottom) / 2, abs=0.11)
    single = Page(curves("t", [Series("s", [(0.0, 0.7)], 0)]))
    assert "circle" in [tag for tag, _ in single.tags]
    assert curves("t", [Series("s", [], 0)]) == ""


def test_marks_are_written_out() -> None:
    drawn = Page(curves("t", [Series("s", [(0.0, -0.5), (1.0, 20_000.0)], 0)]))
    assert "20,000" in drawn.texts["text"]
    assert not any("e+" in text for text in drawn.texts["text"])


def test_an_image_survives_its_data_uri(rng: np.random.Generator) -> None:
    pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
    prefix, content = png_uri(pixels).split(",")
    assert prefix == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_text_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_run(tmp_path / "run")
    assert main([str(tmp_path / "run"), "--text"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"val/top1 +{rows[-1]['val/top1']:.4f}\n", shown)
    assert "▁" in shown
    assert "3 evaluations" in shown
    assert re.search(rf"cat +{rows[-1]['val/per_class/cat']:.3f} █+\n", shown)
    assert "a finding: from the summary" in shown
    assert not (tmp_path / "report.html").exists()


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, 0.3]) == "▁█▃"
    assert sparkline([0.3, 0.3]) == "▁▁"
    long = sparkline([0.0] * 149 + [1.0], width=60)
    assert len(long) == 60
    assert long[-1] == "█"


def test_each_error_is_one_line(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    early = tmp_path / "early"
    early.mkdir()
    (early / "config.yaml").write_text("seed: 0\n")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "metrics.jsonl").write_text('{"step": 1')
    run = str(tmp_path / "run")
    cases = [
        ([str(tmp_path / "none")], "no such run folder"),
        ([f"{run}/metrics.jsonl"], "no such run folder"),
        ([str(empty)], "not a run folder"),
        ([str(early)], "no metrics yet"),
        ([str(torn)], "no metrics yet"),
        ([run, run], "named twice"),
        ([run, "--out", str(tmp_path / "missing" / "r.html")], "cannot be written"),
        ([run, "--out", str(empty)], "is a folder"),
        ([run, "--text", "--out", "r.html"], "leave --output away"),
        ([], "see --help"),
        ([run, "--nonsense"], "see --help"),
    ]
    for arguments, reason in cases:
        with pytest.raises(UserError, match=reason) as error:
            main(arguments)
        assert "\n" not in str(error.value)
    assert list(empty.iterdir()) == []
