"""The sections of the page that show images and confusions."""

import base64
import io
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_resnet.base.errors import UserError
from dist_resnet.report.markup import Html, data, element, join, table
from dist_resnet.report.record import RunRecord

_MATRIX_CLASSES = 20
"""Above, the matrix would be too large to read: its largest confusions are listed."""
_LISTED = 20


def examples_of(run: RunRecord) -> Html:
    """Confusions, worst mistakes and augmented samples of one run, or why there are none."""
    from dist_resnet.report.examples import find_examples  # torch and FFCV take seconds

    try:
        found = find_examples(run.path)
    except UserError as error:
        return element("p", f"Not shown: {error}.", class_="note")
    where = f"of {found.file}, step {found.step:,}, on the {found.eval_set}"
    mistakes = (
        (m.pixels, f"{m.truth}, taken for {m.predicted}", f"loss {m.loss:.2f}")
        for m in found.mistakes
    )
    augmented = found.augmented
    mixed = "" if augmented.lam is None else f", mixing weight {augmented.lam:.4f}"
    samples = (
        (pixels, label, "")
        for pixels, label in zip(augmented.pixels, augmented.labels, strict=True)
    )
    return join(
        _confusions(found.classes, found.confusion, where),
        element("h3", "Worst mistakes"),
        element("p", f"The wrong answers with the largest loss, {where}.", class_="note"),
        _grid(mistakes),
        element("h3", "Augmented training images"),
        element(
            "p",
            f"What the network was given in step {augmented.step + 1:,}: the beginning of the"
            f" first replica's batch{mixed}.",
            class_="note",
        ),
        _grid(samples),
    )


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """A data: URI of an image, uint8 (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _grid(items: Iterable[tuple[NDArray[np.uint8], str, str]]) -> Html:
    """(pixels, what it shows, a second line) of each."""
    parts = [
        element(
            "li",
            element("img", src=png_uri(pixels), alt=text, width=64, height=64),
            text,
            element("br"),
            more,
        )
        for pixels, text, more in items
    ]
    return element("ul", *parts, class_="images") if parts else element("p", "None.")


def _confusions(classes: tuple[str, ...], matrix: NDArray[np.int64], where: str) -> Html:
    heading = element("h3", "Confusion matrix")
    if len(classes) > _MATRIX_CLASSES:
        return join(heading, _largest_confusions(classes, matrix, where))
    totals = np.maximum(matrix.sum(axis=1), 1)
    head = element("tr", *(element("th", c, scope="col") for c in ("true class", *classes)))
    rows = []
    for i, name in enumerate(classes):
        cells = (_cell(int(n), n / totals[i], i == j) for j, n in enumerate(matrix[i]))
        rows.append(element("tr", element("th", name, scope="row"), *cells))
    caption = f"Images by true class (rows) and predicted class (columns), {where}"
    inner = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *rows),
        class_="confusion",
    )
    scroll = element(
        "div", inner, class_="scroll", tabindex=0, role="region", aria_label="Confusion matrix"
    )
    return join(heading, scroll)


def _cell(count: int, share: float, is_true: bool) -> Html:
    shade = f"background: rgba(var(--heat), {0.6 * share:.3f})" if count else None
    kind = "true" if is_true else None if count else "zero"
    return element("td", data(count, str(count)), style=shade, class_=kind)


def _largest_confusions(classes: tuple[str, ...], matrix: NDArray[np.int64], where: str) -> Html:
    wrong = matrix - np.diag(matrix.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED]
    places = [divmod(int(place), len(classes)) for place in order]
    rows = [
        (classes[i], classes[j], data(int(wrong[i, j]), str(wrong[i, j])))
        for i, j in places
        if wrong[i, j]
    ]
    caption = f"The {len(rows)} most frequent confusions, {where}"
    return table(caption, ("true class", "predicted", "images"), rows)
