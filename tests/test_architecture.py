"""The rules of the code base: imports point downwards, one door to each heavy library, small files.

Read from the source with ast; nothing is imported.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dist_resnet"
MAX_LINES, MAX_FUNCTION = 250, 60

# From the ground up: a folder imports from itself (without cycles) and from those before it.
FOLDERS = (
    "base", "config", "machine", "native", "kernels", "tracking", "distributed",
    "data", "augment", "models", "optim", "step", "runs", "training",
)  # fmt: skip
# At the top: what is run as `python -m dist_resnet.NAME`.
COMMANDS = {
    "train", "evaluate", "predict", "export", "dashboard", "sweep", "report", "bench", "doctor",
}  # fmt: skip
DOORS = {
    "torch.distributed": {"distributed.group"},
    "omegaconf": {"config.load"},
    # The last is measured against, not used.
    "ffcv": {"data.ffcv_loader", "bench.loader"},
    "wandb": {"tracking.wandb_session"},
    "wandb_workspaces": {"dashboard"},
}
# Modules that talk to whoever watches: commands, and what they show on the way.
OWN_THE_TERMINAL = {
    *COMMANDS, "base.cli", "base.terminal", "data.images", "data.prepare", "data.sources",
    "tracking.console",
}  # fmt: skip
# What runs in every step: the host must not wait there.
WAITLESS = (
    "step.train_step", "step.captured", "step.loss", "step.replica_pass", "step.shadow",
    "step.update", "augment.choices", "augment.colour", "augment.erase", "augment.geometry",
    "augment.mix", "augment.named", "augment.normalisation", "augment.pipeline", "augment.trivial",
    "distributed.flat", "distributed.counters", "distributed.overlap", "distributed.reduction",
    "distributed.shared_sum", "models.norm_act", "kernels.conv", "kernels.images", "kernels.loss",
    "kernels.norm_act", "kernels.update",
)  # fmt: skip


def _name(path: Path) -> str:
    """dist_resnet/data/order.py -> data.order; dist_resnet/__init__.py -> the empty name."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _trees() -> dict[str, ast.Module]:
    return {_name(p): ast.parse(p.read_text(), str(p)) for p in sorted(PACKAGE.rglob("*.py"))}


def _imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all that a module imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _edges(name: str) -> set[str]:
    """Modules of this package that `name` imports."""
    found = set()
    for target in _imported(_trees()[name]):
        inner = target.removeprefix("dist_resnet").removeprefix(".")
        if target.split(".")[0] == "dist_resnet" and inner in _trees() and inner != name:
            found.add(inner)
    # `from dist_resnet import signals` names the package too.
    return found - {""} - {p for p in found if any(q.startswith(f"{p}.") for q in found)}


def _height(name: str) -> int:
    """Of the folder that a module lies in; commands are on top, the package's name is free."""
    folder = name.split(".")[0]
    if folder in COMMANDS:
        return len(FOLDERS)
    assert folder in FOLDERS, f"dist_resnet/{folder} has no place in FOLDERS: say where it belongs"
    return FOLDERS.index(folder)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_there_is_something_to_check() -> None:
    assert len(_trees()) > 100
    assert {"step.train_step", "training.loop", "data.order", "tracking.console"} <= _trees().keys()
    assert "augment" in _edges("step.train_step")
    assert "base.signals" in _edges("step.train_step")  # from dist_resnet.base import signals
    assert sum(len(_edges(name)) for name in _trees()) > 300


def test_imports_point_downwards() -> None:
    upwards = [
        f"{name} -> {target}"
        for name in _trees()
        for target in _edges(name)
        if name and _height(target) > _height(name)
    ]
    assert upwards == []


def test_a_file_at_the_top_is_a_command() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} <= COMMANDS


def test_the_page_on_architecture_shows_the_folders() -> None:
    """From the top: the first line of each `__init__.py`, and what the folder imports."""
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Folders")[1]
    rows = re.findall(r"^\| `(\w+)/` \| (.+) \| (.+) \|$", text, re.MULTILINE)
    used: dict[str, set[str]] = {name: set() for name in FOLDERS}
    for name in _trees():
        folder = name.split(".")[0]
        if folder in used:
            used[folder] |= {target.split(".")[0] for target in _edges(name)} - {folder, ""}
    said = {name: str(ast.get_docstring(_trees()[name])).splitlines()[0] for name in FOLDERS}
    assert rows == [
        (name, said[name], ", ".join(f for f in FOLDERS if f in used[name]) or "nothing of ours")
        for name in reversed(FOLDERS)
    ]


def test_imports_form_no_cycle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in _edges(name):
                visit(target, (*path, name))
            done.add(name)

    for name in _trees():
        visit(name, ())


def _mentions(tree: ast.Module, library: str) -> bool:
    """Whether a module imports `library`, by statement, by a dotted string or as an attribute."""
    if any(name == library or name.startswith(f"{library}.") for name in _imported(tree)):
        return True
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(rf"{re.escape(library)}(\.\w+)+", node.value):
                return True
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == library:
            return True
    return False


@pytest.mark.parametrize("library", list(DOORS))
def test_each_heavy_library_has_its_door(library: str) -> None:
    found = {name for name, tree in _trees().items() if _mentions(tree, library)}
    assert found
    assert found <= DOORS[library]


@pytest.mark.parametrize("library", ["torch", "ffcv", "wandb", "scipy", "sklearn", "torchvision"])
def test_what_a_command_imports_before_it_knows_its_configuration(library: str) -> None:
    """--help and a mistyped key must not wait for torch: follow imports outside of functions."""

    def top_level(name: str) -> Iterator[str]:
        body = [n for n in _trees()[name].body if isinstance(n, ast.Import | ast.ImportFrom)]
        yield from _imported(ast.Module(body, []))

    seen, todo = set(), ["train"]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for target in top_level(name):
            assert target.split(".")[0] != library, f"train imports {name}, which imports {target}"
            inner = target.removeprefix("dist_resnet.")
            if inner != target and inner in _trees():
                todo.append(inner)
    assert "config.load" in seen


def test_files_are_small() -> None:
    sizes = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {str(path): n for path, n in sizes.items() if n > MAX_LINES} == {}


def test_functions_are_small() -> None:
    large = {}
    for name, tree in _trees().items():
        for function in _functions(tree):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > MAX_FUNCTION:
                large[f"{name}.{function.name}"] = lines
    assert large == {}


def _undocumented(name: str, tree: ast.Module) -> Iterator[str]:
    """A module, a public class, and a public function or method of more than six lines say what
    they are. A shorter one, a class whose every field is explained, and a method that another
    class of the module explains under the same name may speak for themselves."""
    methods = [m for c in tree.body if isinstance(c, ast.ClassDef) for m in c.body]
    explained_names = {
        m.name for m in methods if isinstance(m, ast.FunctionDef) and ast.get_docstring(m)
    }
    if tree.body and not ast.get_docstring(tree):
        yield name
    for node in tree.body:
        inner = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        members = [node, *(node.body if inner and isinstance(node, ast.ClassDef) else [])]
        for member in members:
            if not isinstance(member, ast.ClassDef | ast.FunctionDef):
                continue
            if member.name.startswith("_") or ast.get_docstring(member):
                continue
            if isinstance(member, ast.ClassDef):
                kinds = [type(item) for item in member.body]
                explained = kinds.count(ast.Expr) >= kinds.count(ast.AnnAssign) > 0
                if not explained and len(member.body) > 0 and member.name != "Config":
                    yield f"{name}.{member.name}"
            elif member in methods and member.name in explained_names:
                continue
            elif (member.end_lineno or 0) - member.lineno >= 6:
                yield f"{name}.{member.name}"


def test_what_is_public_is_documented() -> None:
    missing = [text for name, tree in _trees().items() for text in _undocumented(name, tree)]
    assert missing == []


def test_nothing_is_unpickled() -> None:
    for name, tree in _trees().items():
        imports = {target.split(".")[0] for target in _imported(tree)}
        assert not imports & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}, name
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert options.get("weights_only", "True") == "True", f"{name}:{node.lineno}"
            assert options.get("allow_pickle", "False") == "False", f"{name}:{node.lineno}"
            if called == "torch.load":
                assert options.get("weights_only") == "True", f"{name}:{node.lineno}"


def test_only_the_terminals_owners_print() -> None:
    for name, tree in _trees().items():
        owns = any(name == o or name.startswith(f"{o}.") for o in OWN_THE_TERMINAL)
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        lines = [n.lineno for n in calls if ast.unparse(n.func) == "print"]
        assert owns or not lines, f"{name} prints in lines {lines}"


def test_the_step_never_waits_for_the_device() -> None:
    waits = set()
    for name in WAITLESS:
        for function in _functions(_trees()[name]):
            for node in ast.walk(function):
                called = node.func if isinstance(node, ast.Call) else None
                attribute = called.attr if isinstance(called, ast.Attribute) else ""
                if attribute in ("item", "tolist", "cpu", "synchronize"):
                    waits.add(f"{name}.{function.name}")
    assert waits == set()


def test_no_rank_is_asked_for_in_the_loop() -> None:
    """Distribution decorates, never branches: other ranks have null objects instead."""
    for name in ("training.loop", "step.train_step", "training.evaluation"):
        for node in ast.walk(_trees()[name]):
            if isinstance(node, ast.If | ast.IfExp):
                test = ast.unparse(node.test)
                assert "is_main" not in test, f"{name}:{node.lineno}"
                assert not re.search(r"\brank\b *[=!]=", test), f"{name}:{node.lineno}"


def test_no_path_of_one_machine() -> None:
    pattern = re.compile("/(?:wo" + "rk|ho" + "me|Users|tm" + "p/w)/")
    for folder in ("dist_resnet", "tools", "tests", "configs", "launch"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml", ".sh", ".sbatch", ".toml"):
                found = pattern.search(path.read_text())
                assert not found, f"{path.relative_to(ROOT)}: {found and found[0]}"
