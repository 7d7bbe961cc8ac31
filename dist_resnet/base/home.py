"""A home folder for a user that has none, as in a container that runs under any number."""

import contextlib
import getpass
import os
import tempfile
from pathlib import Path


def ensure_home() -> None:
    """Where neither HOME nor the list of users names one, give this process a private folder.

    Where it can only be read, one for caches. And a name, where the user has none.

    Libraries ask for it when they start: W&B, the compiler's caches, our own kernels.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # torch.compile asks for it, too
        os.environ["LOGNAME"] = f"user-{os.getuid()}"
    home = os.path.expanduser("~")
    if home != "~" and _can_be_written(Path(home)):
        return
    folder = Path(tempfile.gettempdir()) / f"dist_resnet-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    # In a shared folder the name may be somebody else's, or a link of theirs.
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
        folder = Path(tempfile.mkdtemp(prefix=f"dist_resnet-{os.getuid()}-"))
    if home != "~" and os.path.isdir(home):  # what stands there, such as a key, is still read
        os.environ.setdefault("XDG_CACHE_HOME", str(folder))
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))  # obeys no XDG
    else:
        os.environ["HOME"] = str(folder)


def _can_be_written(folder: Path) -> bool:
    """Or made; `docker run --user` leaves HOME=/."""
    while not os.path.exists(folder):  # Path.exists raises below a folder that is closed to us
        folder = folder.parent
    return os.access(folder, os.W_OK)
