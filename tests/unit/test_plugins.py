"""Names of a configuration that are not built in: found, checked, told in one line, hashed."""

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_resnet.base.errors import UserError
from dist_resnet.config.code import changed_code, check_code, code_of_run, own_hash
from dist_resnet.config.load import load_config
from dist_resnet.config.plugin_code import code_of
from dist_resnet.config.plugins import calling, check_arguments, resolve
from tests.helpers.jobs import ROOT

NETS = """
import helper_layers
class Wide:
    def __init__(self, num_classes, depth=16, *, width: int = 4): ...
    @staticmethod
    def deep(num_classes): ...
def needs(num_classes, depth): ...
def anything(num_classes, **more): ...
NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with plug-ins in it."""
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "helper_layers.py").write_text("import os\n")
    (tmp_path / "unrelated.py").write_text("")
    package = tmp_path / "own_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("def f(): ...\n")
    (tmp_path / "broken_import.py").write_text("import no_such_module_of_mine\n")
    (tmp_path / "broken_value.py").write_text("1 / 0\n")
    (tmp_path / "broken_syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_name_is_found_in_the_working_folder_and_on_the_path(folder: Path) -> None:
    assert resolve("model.name", "own_nets:Wide").__name__ == "Wide"
    assert resolve("model.name", "own_nets:Wide.deep").__name__ == "deep"
    assert resolve("model.name", "own_package.inner:f").__name__ == "f"
    assert resolve("optim.name", "torch.optim:AdamW") is torch.optim.AdamW


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("own_nets:", "write it as module:callable"),
        ("own-nets:Wide", "write it as module:callable"),
        ("own_nets:Wiide", "own_nets has no Wiide; did you mean Wide"),
        ("own_nets:NUMBER", "is a int, which cannot be called"),
        ("own_netz:Wide", "there is no module own_netz on the Python path or in "),
        ("own_package.no:f", "there is no module own_package.no on"),
        ("broken_import:f", "No module named 'no_such_module_of_mine'"),
        ("broken_value:f", r"ZeroDivisionError: division by zero \(.*broken_value.py:1\)"),
        ("broken_syntax:f", r"SyntaxError.*broken_syntax.py:1\)"),
    ],
)
def test_what_is_wrong_with_a_name(folder: Path, name: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        resolve("model.name", name)
    assert str(caught.value).startswith(f"model.name={name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "args", "line"),
    [
        ("Wide", {"dept": 3}, r"model.args.dept: unknown argument of Wide; did you mean depth\?"),
        ("Wide", {"x": 3}, "model.args.x: unknown argument of Wide; it takes depth, width"),
        ("Wide", {"num_classes": 3}, "model.args.num_classes: is set by the training itself"),
        ("needs", {}, "needs the argument depth: model.args.depth="),
    ],
)
def test_arguments_are_held_against_the_signature(
    folder: Path, name: str, args: dict[str, Any], line: str
) -> None:
    function = resolve("model.name", f"own_nets:{name}")
    with pytest.raises(UserError, match=line):
        check_arguments("model.args", function, args, given=["num_classes"])


def test_right_arguments_pass(folder: Path) -> None:
    def check(name: str, args: dict[str, Any]) -> None:
        function = resolve("model.name", f"own_nets:{name}")
        check_arguments("model.args", function, args, given=["num_classes"])

    check("Wide", {"depth": 1, "width": 2})
    check("needs", {"depth": 1})
    check("anything", {"whatever": 1})
    check_arguments("x", functools.partial(resolve, "a"), {"name": "b:c"})


def test_what_a_plugin_raises_is_told_with_its_place(folder: Path) -> None:
    (folder / "raising.py").write_text("def f():\n    return {}['gone']\n")
    function: Callable[[], Any] = resolve("model.name", "raising:f")
    line = r"model.name=raising:f: raised KeyError: 'gone' \(.*raising.py:2\)"
    with pytest.raises(UserError, match=line), calling("model.name", "raising:f"):
        function()
    with pytest.raises(MemoryError), calling("model.name", "raising:f"):
        raise MemoryError
    with pytest.raises(UserError, match="our own"), calling("model.name", "raising:f"):
        raise UserError("our own")


def test_the_code_of_a_name_is_its_file_and_what_it_imports_beside_it(folder: Path) -> None:
    found = code_of([("m", "own_nets:Wide")])
    assert found == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("own_nets.py", "helper_layers.py")
    }
    assert code_of([("m", "own_package.inner:f")]).keys() == {
        "own_package/__init__.py",
        "own_package/inner/__init__.py",
    }
    plain = folder / "plain_folder"
    plain.mkdir()
    (plain / "net.py").write_text(
        "from . import part\nfrom plain_folder.other import f\ndef g(): ...\n"
    )
    (plain / "part.py").write_text("import helper_layers\n")
    (plain / "other.py").write_text("def f(): ...\n")
    (plain / "unused.py").write_text("")
    assert code_of([("m", "plain_folder.net:g")]).keys() == {
        "helper_layers.py", *(f"plain_folder/{name}.py" for name in ("net", "part", "other"))
    }  # fmt: skip
    assert code_of([("m", "torch.optim:AdamW")]) == {"torch": f"torch=={version('torch')}"}


def test_the_code_of_a_name_is_that_of_the_module_it_names_too(folder: Path) -> None:
    """Whatever the callable is: a partial one, an object, or another module's."""
    (folder / "named.py").write_text(
        "import functools, torch, own_package.inner\nfrom own_package.inner import f as passed_on\n"
        "partial = functools.partial(functools.partial(own_package.inner.f), 1)\n"
        "installed = functools.partial(torch.nn.Linear, 3)\n"
        "alone = functools.partial(lambda: 1)\n"
    )
    own = {"named.py", "own_package/__init__.py", "own_package/inner/__init__.py"}
    assert code_of([("m", "named:partial")]).keys() == own
    assert code_of([("m", "named:passed_on")]).keys() == own
    assert code_of([("m", "named:alone")]).keys() == own
    assert code_of([("m", "named:installed")]).keys() == {*own, "torch"}


def test_files_of_one_name_in_two_folders_are_both_known(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = folder / "elsewhere"
    other.mkdir()
    (other / "second.py").write_text("import helper_layers\ndef f(): ...\n")
    (other / "helper_layers.py").write_text("1\n")
    monkeypatch.syspath_prepend(str(other))
    names = [("m", "own_nets:Wide"), ("m", "second:f")]
    found = [code_of(names)]
    assert found[0] == code_of(names[::-1])
    for file in (other / "helper_layers.py", folder / "helper_layers.py"):
        file.write_text(f"{file.read_text()}2\n")
        found.append(code_of(names))
    assert len({code["helper_layers.py"] for code in found}) == 3


def test_the_code_of_a_name_has_no_files_of_this_package(folder: Path) -> None:
    """They have a hash of their own, which refuses nothing."""
    (folder / "dist_resnet").mkdir()
    (folder / "dist_resnet" / "__init__.py").write_text("")
    (folder / "beside.py").write_text("import dist_resnet\ndef f(): ...\n")
    assert code_of([("m", "beside:f")]).keys() == {"beside.py"}
    assert code_of([("m", "dist_resnet.models.resnet:resnet")]) == {}


def test_what_is_installed_for_a_user_is_no_source(tmp_path: Path) -> None:
    found = (
        "import site, sys, os; site.USER_SITE = site.USER_BASE = None; "
        "os.makedirs(place := site.getusersitepackages()); "
        "open(place + '/package_of_user.py', 'w').write('def f(): ...'); sys.path.append(place); "
        "from dist_resnet.config.plugin_code import code_of; "
        "print(list(code_of([('m', 'package_of_user:f')])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", found], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONUSERBASE": str(tmp_path)}, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "['package_of_user']"


@pytest.mark.parametrize("content", [b"def {{ name }}(:\n", b"\0", b"\xff", b"# coding: none\n"])
def test_a_file_of_a_package_that_is_no_python_is_hashed(folder: Path, content: bytes) -> None:
    template = folder / "own_package" / "template.py"
    template.write_bytes(content)
    (folder / "own_package" / ".#lock.py").symlink_to("nowhere")  # as Emacs makes them
    (folder / "own_package" / "folder.py").mkdir()
    found = code_of([("m", "own_package.inner:f")])
    assert found["own_package/template.py"] == hashlib.sha256(content).hexdigest()
    assert len(found) == 3


def test_the_code_of_a_run_is_that_of_all_its_names(folder: Path) -> None:
    config = load_config(
        ["model.name=own_nets:Wide", "optim.name=torch.optim:AdamW", "augment.extra=[own_nets:f]"]
    )
    with pytest.raises(UserError, match=r"augment.extra=own_nets:f: own_nets has no f"):
        code_of_run(config)
    config = load_config(["model.name=own_nets:Wide", "optim.name=torch.optim:AdamW"])
    names = {"dist_resnet", "own_nets.py", "helper_layers.py", "torch"}
    assert code_of_run(config).keys() == names
    assert code_of_run(load_config([])) == {"dist_resnet": own_hash()}


def test_changed_code_is_refused_with_the_files_that_changed() -> None:
    before = {"dist_resnet": "1", "a.py": "2", "b.py": "3", "timm": "timm==1"}
    assert check_code(before, before, allowed=False) == []
    assert changed_code(before, before | {"dist_resnet": "other"}) == []
    now = {"dist_resnet": "1", "a.py": "x", "timm": "timm==2", "c.py": "4"}
    with pytest.raises(UserError, match=r"a.py, b.py, c.py, ...; .*run.allow_code_change=true"):
        check_code(before, now, allowed=False)
    assert check_code(before, now, allowed=True) == ["a.py", "b.py", "c.py", "timm"]
    assert check_code({}, now, allowed=False) == []  # a checkpoint of before this was known
