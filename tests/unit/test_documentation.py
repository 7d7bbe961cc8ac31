"""The pages say what is: links, modules, settings, options, files and make's targets exist."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from dist_resnet.base.errors import UserError
from dist_resnet.config.load import load_config
from tests.helpers.jobs import ROOT

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "launch/README.md"]
    + [*(ROOT / "docs").glob("*.md")]
)
# A block without a language is a terminal's.
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SETTING = re.compile(r"(seed|[a-z_]+\.[a-z_]+)=.*")
# What takes our settings; prepare and the others have options only.
CONFIGURED = ("train", "bench", "doctor", "evaluate", "sweep")
# Not a configuration: a file of `dist_resnet.sweep`.
OTHER_FILES = ("configs/sweep.yaml",)


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def lines(text: str) -> Iterator[list[str]]:
    """The words of each command line in a terminal's block, without its comment."""
    for language, block in BLOCK.findall(text):
        if language not in ("", "bash", "sh"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if re.search(r"\bpython -m |\btorchrun |launch/|\bmake |\bsbatch ", line):
                # [--option FILE] and A|B are how a page says what there may be, but in quotes.
                plain = re.sub("('[^']*')|[][|]", lambda match: match[1] or " ", line)
                yield shlex.split(plain, comments=True)


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(h) for h in re.findall(r"^#+ (.+)$", prose(page.read_text()), re.M)}


def broken_links(text: str, folder: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (folder / path).resolve() if path else None
        if place is not None and not place.exists():
            yield f"link to {target}"
        elif anchor and place is not None and anchor not in anchors(place):
            yield f"anchor {target}"


def missing_files(text: str, folder: Path) -> Iterator[str]:
    """Launchers, tests, configurations and modules that a page names in code."""
    code = " ".join([block for _, block in BLOCK.findall(text)] + re.findall(r"`([^`]+)`", text))
    for name in re.findall(r"(?<![\w./])((?:launch|configs|docs|tests)/[\w./]*\w)", code):
        if not (ROOT / name).exists():
            yield name
    for name in re.findall(r"(?<![\w./])(test_\w+\.py)\b", code):
        if not list((ROOT / "tests").rglob(name)):
            yield name
    if folder.name == "launch":
        for name in re.findall(r"`(\w+\.(?:sh|sbatch|yaml))`", text):
            if not (folder / name).exists():
                yield name
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        of_the_package = (ROOT / "dist_resnet" / name).exists() or (ROOT / name).exists()
        if not of_the_package and not list((ROOT / "tests").rglob(name)):
            yield name


def missing_modules(text: str) -> Iterator[str]:
    for name in re.findall(r"-m ((?:dist_resnet|tests|tools)[\w.]*\w)", text):
        place = ROOT / name.replace(".", "/")
        if not (place.with_suffix(".py").exists() or (place / "__main__.py").exists()):
            yield name


def missing_targets(text: str) -> Iterator[str]:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.M))
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.M))
    commands = [words for words in lines(text) if words[:1] == ["make"]]
    commands += [shlex.split(code) for code in re.findall(r"`(make [^`]+)`", prose(text))]
    for _, *words in commands:
        for word in words:
            name, assigned, value = word.partition("=")
            if name not in (variables if assigned else targets):
                yield f"make {word}"
            for part in shlex.split(value) if name == "ARGS" else []:
                if SETTING.fullmatch(part):
                    yield from wrong_settings([part])


def wrong_settings(words: list[str]) -> Iterator[str]:
    """What the configuration says to the files and key=value among `words`."""
    files = [str(ROOT / w) for w in words if w.startswith("configs/") and w not in OTHER_FILES]
    pairs = [word for word in words if SETTING.fullmatch(word)]
    try:
        load_config([*files, *pairs])
    except UserError as error:
        yield str(error)


@cache
def options(module: str, command: str = "") -> frozenset[str]:
    """The --options in the help of a module, or of one of its commands."""
    call = [sys.executable, "-m", module, *([command] if command else []), "--help"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return frozenset(re.findall(r"--[a-z][\w-]*", done.stdout)) | {"--help"}


@cache
def torchrun_options() -> frozenset[str]:
    from torch.distributed.run import get_args_parser

    actions = get_args_parser()._actions
    return frozenset(name for action in actions for name in action.option_strings)


def wrong_commands(text: str) -> Iterator[str]:
    """Settings and options of our modules and launchers that do not exist."""
    for words in lines(text):
        ours = [
            n
            for n, word in enumerate(words)
            if word.startswith(("dist_resnet.", "tests.", "tools."))
        ]
        if words[0] == "torchrun":
            before = words[1 : ours[0]] if ours else words[1:]
            known = torchrun_options()
            flags = [w.split("=")[0] for w in before if w.startswith("--")]
            yield from (f"torchrun {flag}" for flag in flags if flag not in known)
        if ours:
            yield from wrong_arguments(words[ours[0]], words[ours[0] + 1 :])
        elif any(word.startswith("launch/") for word in words):
            yield from wrong_settings(words)


def wrong_arguments(module: str, words: list[str]) -> Iterator[str]:
    end = words.index("--") if "--" in words else len(words)  # the rest is for sweep's trainings
    known = options(module)
    if module == "dist_resnet.data.prepare":  # each source has options of its own
        known = options(module, words[0] if words[0].islower() else "digits")
    flags = [word.split("=")[0] for word in words[:end] if word.startswith("--")]
    yield from (f"{module} {flag}" for flag in flags if flag not in known)
    takes = module.removeprefix("dist_resnet.") in CONFIGURED
    pairs = [w for w in words if "=" in w and not w.startswith("--") and w != "key=value"]
    unknown = [w for w in pairs if w.islower() and not (takes and SETTING.fullmatch(w))]
    yield from (f"{module} {word}" for word in unknown)
    yield from wrong_settings(words)


def problems(text: str, folder: Path) -> list[str]:
    return [
        *broken_links(text, folder),
        *missing_files(text, folder),
        *missing_modules(text),
        *missing_targets(text),
        *wrong_commands(text),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_says_what_is(page: Path) -> None:
    assert problems(page.read_text(), page.parent) == []


def test_the_pages_are_found_and_linked() -> None:
    assert len(PAGES) >= 6
    readme = (ROOT / "README.md").read_text()
    for page in PAGES:
        assert page.name == "README.md" or f"({page.relative_to(ROOT)})" in readme
    assert "](launch/README.md)" in readme
    assert sum(len(list(lines(page.read_text()))) for page in PAGES) > 30


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a](nowhere.md)", "nowhere.md"),
        ("[a](README.md#no-such-heading)", "no-such-heading"),
        ("`launch/nobody.sh`", "launch/nobody.sh"),
        ("as in `test_nothing_such.py`", "test_nothing_such.py"),
        ("see `no_such_module.py`", "no_such_module.py"),
        ("see `update.py`", "update.py"),
        ("`python -m dist_resnet.trian`", "dist_resnet.trian"),
        ("`make tset`", "make tset"),
        ('```\nmake test NO_SUCH="x"\n```', "make NO_SUCH"),
        ('```\nmake train ARGS="train.epoch=3"\n```', "train.epochs"),
        ("```\npython -m dist_resnet.train optim.lrr=0.1\n```", "optim.lr"),
        ("```\npython -m dist_resnet.train optim.lr=-1\n```", "optim.lr"),
        ("```bash\npython -m dist_resnet.train configs/none.yaml\n```", "configs/none.yaml"),
        ("```\npython -m dist_resnet.train --print-conf\n```", "--print-conf"),
        ("```\npython -m dist_resnet.bench scaling --round 4\n```", "--round"),
        ("```\npython -m dist_resnet.data.prepare digits --train x\n```", "--train"),
        ("```\npython -m dist_resnet.sweep a.yaml -- optim.lrr=1\n```", "optim.lr"),
        ("```\ntorchrun --nproc=2 -m dist_resnet.train\n```", "torchrun --nproc"),
        ("```\nlaunch/single_node.sh parallel.replicas=none\n```", "parallel.replicas"),
        ("```\nsbatch -N1 launch/slurm.sbatch model.name=resnet21\n```", "model.name"),
    ],
)
def test_what_is_not_so_is_found(text: str, found: str) -> None:
    told = problems(text, ROOT)
    assert any(found in line for line in told), told


def test_what_is_so_is_not() -> None:
    assert problems("```\npython -m dist_resnet.train optim.lr=0.1 --help  # a\n```", ROOT) == []
    assert problems("[a](README.md#speed) `make test SLOW=1` `step/update.py`", ROOT) == []
