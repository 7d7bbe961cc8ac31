"""Names and paths: as users write them, and as text that every terminal and file can hold."""

import os
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of dist_resnet."""
_UNSHOWABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def user_path(text: str) -> Path:
    """The path that a user wrote; ~ is the home folder, also where no shell has replaced it."""
    return Path(os.path.expanduser(text))


def printable(text: str) -> str:
    """`text` on one line: control characters, and bytes of a name that are no text, as \\xe9."""
    return _UNSHOWABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries a byte that it could not decode
        return f"\\x{code - 0xDC00:02x}"
    return match[0].encode("unicode_escape").decode()
