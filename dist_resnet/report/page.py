"""The page: its sections, in order."""

from collections.abc import Sequence

from dist_resnet.report.facts import configuration, environment
from dist_resnet.report.images import examples_of
from dist_resnet.report.markup import Html, element, join
from dist_resnet.report.record import RunRecord
from dist_resnet.report.sections import by_class, curves, diagnosis, headline_table, speed_section
from dist_resnet.report.style import CSS

Runs = Sequence[RunRecord]
# The browser itself enforces that nothing is fetched and nothing is run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render_page(runs: Runs) -> str:
    """One HTML document about one run or several.

    The model is evaluated where a checkpoint and the dataset are here, which takes seconds to
    minutes.
    """
    sections = [
        ("figures", "Figures", headline_table(runs)),
        ("diagnosis", "Diagnosis", diagnosis(runs)),
        ("curves", "Curves", curves(runs)),
        ("speed", "Speed", speed_section(runs)),
        ("classes", "Accuracy by class", by_class(runs)),
        ("images", "Mistakes and training images", _images(runs)),
        ("configuration", "Configuration", configuration(runs)),
        ("environment", "Environment", environment(runs)),
    ]
    title = " · ".join(run.label for run in runs)
    links = (element("li", element("a", name, href=f"#{anchor}")) for anchor, name, _ in sections)
    nav = element("nav", element("ul", *links), aria_label="Sections")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"{title}: report"),
        element("style", Html(CSS)),
    )
    body = element(
        "body",
        element("a", "Skip to the figures", href="#main", class_="skip"),
        element("header", element("h1", title), _subtitle(runs), nav),
        element("main", *(_section(*section) for section in sections), id="main", tabindex=-1),
        element("footer", "Made by dist_resnet.report; figures of summary.json, of unfinished"
                " runs of metrics.jsonl."),
    )  # fmt: skip
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def _section(anchor: str, name: str, content: Html) -> Html:
    heading = element("h2", name, id=f"{anchor}-heading")
    return element("section", heading, content, id=anchor, aria_labelledby=f"{anchor}-heading")


def _subtitle(runs: Runs) -> Html:
    lines = []
    for run in runs:
        name = run.config.get("model.name", "unknown model")
        on = run.config.get("data.dataset", "unknown dataset")
        state, reason = run.status.get("state", "state unknown"), run.status.get("reason")
        line = f"{name} on {on}, seed {run.config.get('seed', 'unknown')}; {state}"
        label = f"{run.label}: " if len(runs) > 1 else ""
        lines.append(f"{label}{line}{f': {reason}' if reason else ''}")
    return join(*(element("p", line, class_="note") for line in lines))


def _images(runs: Runs) -> Html:
    if len(runs) == 1:
        return examples_of(runs[0])
    parts = (element("section", element("h3", run.label), examples_of(run)) for run in runs)
    return join(*parts)
