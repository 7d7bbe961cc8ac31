"""HTML that is escaped by construction: text becomes markup only through `element`."""

import re
from collections.abc import Iterable, Sequence
from html import escape

_VOID = ("meta", "img", "br", "wbr")


class Html(str):
    """Markup, as opposed to text that has to be escaped first."""


def join(*content: str) -> Html:
    """One piece of markup; plain text is escaped."""
    return Html("".join(c if isinstance(c, Html) else escape(c) for c in content))


def element(name: str, /, *content: str, **attributes: object) -> Html:
    """An element. Attributes: class_ is written class, aria_label aria-label; None is left out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{join(*content)}</{name}>")


def data(value: object, text: str) -> Html:
    """A figure: rounded for the reader, whole for whoever reads the page by program."""
    return element("data", text, value=value)


def _breakable(text: str) -> Html:
    """A key such as data.batch_size_per_replica, which may break after its . / or _ on a phone."""
    parts = re.split(r"(?<=[./_])", text)
    return join(parts[0], *(join(element("wbr"), part) for part in parts[1:]))


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], class_: str = ""
) -> Html:
    """A table whose first column heads the rows.

    It scrolls within itself where the screen is narrower, and can be reached by the keyboard to do
    so.
    """
    columns = element("tr", *(element("th", name, scope="col") for name in head))
    body = [
        element(
            "tr",
            element("th", _breakable(row[0]), scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    ]
    inner = element(
        "table",
        element("caption", caption),
        element("thead", columns),
        element("tbody", *body),
        class_=class_ or None,
    )
    return element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)
