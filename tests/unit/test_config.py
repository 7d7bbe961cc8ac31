"""From the command line to a `Config`: merging, every refusal, documentation, round trips."""

import ast
import json
import re
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import PACKAGE
from dist_resnet.config.effects import changes_trajectory
from dist_resnet.config.keys import describe_keys
from dist_resnet.config.load import (
    flatten,
    load_config,
    stored_config,
    to_dict,
    to_yaml,
    trajectory_differences,
    trajectory_hash,
)
from dist_resnet.config.schema import Config

# Names and defaults that people's scripts rely on: they stay.
CONTRACT = {
    "run.dir": "runs", "run.resume": "auto", "run.overwrite": False,
    "data.dataset": "cifar10", "data.root": "data", "data.loader": "ffcv",
    "data.batch_size_per_replica": 32, "data.val_split": 0,
    "augment.crop_padding": 4, "augment.flip": True, "augment.mixup_alpha": 0.2,
    "augment.cutout": 0, "augment.padding_mode": "zero", "augment.trivial": False,
    "augment.jitter": 0, "augment.extra": [], "augment.erasing": 0, "augment.mix": "mixup",
    "augment.cutmix_alpha": 1,
    "model.name": "resnet20", "model.widths": [16, 32, 64], "model.shortcut": "projection",
    "model.dropout": 0.3,
    "optim.lr": 0.05, "optim.momentum": 0.9, "optim.weight_decay": 5e-4, "optim.nesterov": False,
    "optim.clip_norm": 0, "optim.bias_lr_factor": 1,
    "optim.lr_scaling": "none", "optim.reference_batch_size": 32, "optim.label_smoothing": 0,
    "schedule.name": "cosine", "schedule.warmup_epochs": 0, "schedule.milestones": [80, 120],
    "train.epochs": 150, "train.max_steps": None, "train.ema_decay": 0, "train.step_mode": "auto",
    "precision.dtype": "auto", "precision.channels_last": True,
    "parallel.replicas": "auto", "parallel.reduction": "fast", "parallel.timeout_seconds": 120,
    "eval.every_epochs": 1, "eval.flip_tta": False,
    "checkpoint.every_epochs": 1, "checkpoint.every_steps": 0, "checkpoint.keep": 3,
    "log.every_steps": 50, "wandb.mode": "auto", "wandb.media_every_epochs": 10,
    "wandb.artifacts": False,
}  # fmt: skip


def _write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def _refused(*arguments: str) -> str:
    """The one line with which `arguments` are refused."""
    with pytest.raises(UserError) as caught:
        load_config(arguments)
    line = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in line
    assert len(line) < 300
    return line


def test_defaults_are_the_contract() -> None:
    defaults = dict(flatten(to_dict(load_config([]))))
    assert defaults | CONTRACT == defaults
    assert defaults["seed"] == 0


def test_files_merge_left_to_right_then_pairs_in_order(tmp_path: Path) -> None:
    first = _write(tmp_path, "a.yaml", "optim:\n  lr: 0.1\n  momentum: 0.5\nseed: 1\n")
    second = _write(tmp_path, "b.yaml", "optim:\n  lr: 0.2\nmodel:\n  widths: [8, 8, 9]\n")
    config = load_config([first, second])
    assert (config.optim.lr, config.optim.momentum, config.seed) == (0.2, 0.5, 1)
    assert config.model.widths == [8, 8, 9]
    assert load_config([second, first]).optim.lr == 0.1
    # A pair wins over a file that stands after it, and the last pair wins.
    assert load_config(["optim.lr=0.3", first]).optim.lr == 0.3
    assert load_config([first, "optim.lr=0.3", "optim.lr=0.4"]).optim.lr == 0.4


def test_a_list_is_replaced_not_extended(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.yaml", "schedule:\n  milestones: [1, 2, 3, 4]\n")
    assert load_config([file, "schedule.milestones=[7]"]).schedule.milestones == [7]


def test_values_get_their_types() -> None:
    config = load_config(
        ["optim.lr=1", "train.epochs=3", "augment.flip=false", "run.name=12",
         "train.max_steps=null", "parallel.replicas=4", "wandb.tags=[a,b]",
         "optim.weight_decay=1e-3"]
    )  # fmt: skip
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert (config.train.epochs, config.train.max_steps) == (3, None)
    assert config.augment.flip is False
    assert config.run.name == "12"
    assert config.parallel.replicas == 4
    assert config.wandb.tags == ["a", "b"]
    assert config.optim.weight_decay == 0.001
    assert load_config(["parallel.replicas=auto"]).parallel.replicas == "auto"


@pytest.mark.parametrize("text", ["", "{}\n", "# only a comment\n"])
def test_an_empty_file_changes_nothing(text: str, tmp_path: Path) -> None:
    assert load_config([_write(tmp_path, "a.yaml", text)]) == load_config([])


@pytest.mark.parametrize(
    ("pair", "suggestion"),
    [
        ("optim.lrr=1", "optim.lr"),
        ("optim.momentun=0.5", "optim.momentum"),
        ("optm.lr=1", "optim.lr"),
        ("lr=1", "optim.lr"),
        ("epochs=3", "train.epochs"),
        ("batch_size=3", "optim.reference_batch_size|data.batch_size_per_replica"),
        ("model.width=[1,2,3]", "model.widths"),
        ("seeed=3", "seed"),
    ],
)
def test_an_unknown_key_names_the_nearest(pair: str, suggestion: str) -> None:
    line = _refused(pair)
    assert pair.split("=")[0] in line
    assert "unknown key" in line
    assert re.search(f"did you mean ({suggestion})\\?", line), line


def test_an_unknown_key_without_neighbours() -> None:
    assert "unknown key" in _refused("zzzzqqqq=1")


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.yaml", "optim:\n  lrr: 1\n")
    line = _refused(file)
    assert "optim.lrr=1" in line
    assert file in line
    assert "optim.lr?" in line


@pytest.mark.parametrize(
    ("pair", "kind"),
    [
        ("optim.lr=fast", "float"),
        ("train.epochs=ten", "int"),
        ("train.epochs=1.5", "int"),
        ("train.epochs=true", "int"),
        ("train.epochs=null", "int"),
        ("train.epochs=", "int"),
        ("optim.lr=true", "float"),
        ("optim.nesterov=3", "bool"),
        ("optim.nesterov=1", "bool"),
        ("model.widths=16", "list"),
        ("model.widths=[a,b,c]", "list"),
        ("model.dropout=[1]", "float"),
        ("train.max_steps=soon", "int"),
        ("seed=1.5", "int"),
        ("data.root=null", "str"),
    ],
)
def test_a_wrong_type_names_key_value_and_type(pair: str, kind: str) -> None:
    line = _refused(pair)
    assert pair.split("=")[0] in line
    assert kind in line
    assert "Traceback" not in line


@pytest.mark.parametrize(
    "pair",
    [
        "data.batch_size_per_replica=0", "data.batch_size_per_replica=-1", "data.val_split=-1",
        "data.dataset=a/b", "data.dataset=..", "data.dataset=",
        "augment.crop_padding=-1", "augment.mixup_alpha=-0.1", "augment.cutout=-2",
        "augment.flip=1", "augment.flip=3", "augment.jitter=-0.1", "augment.erasing=1.1",
        "augment.cutmix_alpha=0",
        "model.widths=[16,32]", "model.widths=[0,1,2]", "model.dropout=1", "model.dropout=-0.1",
        "optim.clip_norm=-1", "optim.clip_norm=inf", "optim.bias_lr_factor=0",
        "optim.lr=0", "optim.lr=-1", "optim.lr=inf", "optim.lr=nan", "optim.momentum=1",
        "optim.weight_decay=-1", "optim.reference_batch_size=0", "optim.label_smoothing=1",
        "schedule.warmup_epochs=-1", "schedule.warmup_epochs=150", "schedule.milestones=[2,1]",
        "schedule.milestones=[1,1]", "schedule.milestones=[0]",
        "train.epochs=0", "train.max_steps=0", "train.ema_decay=1", "train.ema_decay=nan",
        "parallel.replicas=0", "parallel.replicas=some", "parallel.timeout_seconds=0",
        "parallel.threads=-1", "eval.every_epochs=0", "checkpoint.every_steps=-1",
        "checkpoint.keep=0", "log.every_steps=0", "seed=-1", "run.name=a/b", "run.name=.hidden",
        "run.resume=", "wandb.media_every_epochs=-1", "wandb.project=a/b", "wandb.project=",
        "wandb.project=" + 129 * "p", "wandb.entity=a:b", "wandb.group=" + 129 * "g",
        "wandb.tags=[ok,'']", "wandb.tags=[" + 65 * "t" + "]", "train.epochs=1000000000",
        "parallel.timeout_seconds=1000000000000", "parallel.threads=100000",
    ],
)  # fmt: skip
def test_an_impossible_value_is_refused(pair: str) -> None:
    line = _refused(pair)
    key, value = pair.split("=")
    assert key in line
    assert re.sub(r"[\s']", "", value)[:60] in re.sub(r"[\s']", "", line)
    assert "must be" in line


def test_impossible_together() -> None:
    assert "model.widths" in _refused("model.widths=[32,16,8]", "model.shortcut=pad")
    assert "optim.nesterov" in _refused("optim.nesterov=true", "optim.momentum=0")
    assert "schedule.warmup_epochs" in _refused("train.epochs=5", "schedule.warmup_epochs=5")


@pytest.mark.parametrize(
    ("pair", "nearest"),
    [
        ("model.name=resnet200", "resnet20"),
        ("model.name=resnet101", "resnet110"),
        ("model.shortcut=padd", "pad"),
        ("schedule.name=cosin", "cosine"),
        ("optim.lr_scaling=liner", "linear"),
        ("data.loader=fcv", "ffcv"),
        ("precision.dtype=bf1", "bf16"),
        ("wandb.mode=ofline", "offline"),
        ("train.step_mode=grap", "graph"),
        ("parallel.reduction=exac", "exact"),
    ],
)
def test_a_wrong_choice_names_all_and_the_nearest(pair: str, nearest: str) -> None:
    line = _refused(pair)
    assert pair in line
    assert "must be one of" in line
    assert f"did you mean {nearest}?" in line


def test_what_is_no_setting_at_all(tmp_path: Path) -> None:
    assert "no such configuration file" in _refused(str(tmp_path / "missing.yaml"))
    assert "optim.lr=VALUE" in _refused("optim.lr")  # a key whose value was forgotten
    assert "section" in _refused("optim=3")
    assert "key=value" in _refused("=3")
    assert "key=value" in _refused("--seed=3")
    _refused(str(tmp_path))  # a folder
    _refused(_write(tmp_path, "list.yaml", "- 1\n- 2\n"))
    _refused(_write(tmp_path, "broken.yaml", "a: [1, 2\nb: }{\n"))
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    _refused(str(tmp_path / "binary.yaml"))


def test_interpolation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "hunter2")
    in_list = _write(tmp_path, "b.yaml", "wandb:\n  tags: ['${oc.env:SECRET_OF_MINE}']\n")
    in_text = _write(tmp_path, "a.yaml", "run:\n  name: ${oc.env:SECRET_OF_MINE}\n")
    for arguments in (["run.name=${oc.env:SECRET_OF_MINE}"], [in_text], [in_list],
                      ["wandb.tags=['${oc.env:SECRET_OF_MINE}']"]):  # fmt: skip
        line = _refused(*arguments)
        assert "interpolation" in line
        assert "hunter2" not in line


def test_the_configuration_is_frozen() -> None:
    config = load_config([])
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        config.optim.lr = 1  # type: ignore[misc]


def test_every_key_is_documented() -> None:
    rows = describe_keys()
    # The keys, found without the code under test.
    expected = []
    for item in fields(Config):
        value = getattr(Config(), item.name)
        inner = [f"{item.name}.{sub.name}" for sub in fields(value)] if is_dataclass(value) else []
        expected += inner or [item.name]
    assert [row[0] for row in rows] == expected
    for key, kind, default, meaning in rows:
        assert len(meaning) > 8, f"{key} says nothing"
        assert meaning.endswith("."), f"{key}: {meaning}"
        assert kind, key
        assert default != "", key


def test_the_documentation_of_a_key_is_its_own() -> None:
    # Read with ast here too, but by position in the text: the string on the line after the field.
    source = (PACKAGE / "config" / "schema.py").read_text()
    lines = [*source.splitlines(), ""]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            meaning = [row[3] for row in describe_keys() if row[0].endswith(f".{node.target.id}")]
            following = lines[node.end_lineno or 0].strip().strip('"')
            if following and meaning:
                assert following in meaning, node.target.id


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["seed=9", "model.widths=[20,40,80]", "parallel.replicas=4", "wandb.tags=[a,b]",
         "run.name=x", "train.max_steps=7", "schedule.milestones=[]", "optim.lr=1e-5"],
    ],
)  # fmt: skip
def test_round_trips(arguments: list[str], tmp_path: Path) -> None:
    config = load_config(arguments)
    assert stored_config(to_dict(config)) == config
    # PyYAML, which knows nothing of us, reads the same values; and the file is a configuration.
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)
    assert load_config([_write(tmp_path, "stored.yaml", to_yaml(config))]) == config


def test_a_stored_configuration_is_checked_too() -> None:
    for values in ({"optim": {"lr": -1}}, {"optim": {"lrr": 1}}, {"train": {"epochs": "x"}}):
        with pytest.raises(UserError):
            stored_config(values)


FREE = [
    "run.dir=x", "run.name=x", "run.resume=never", "run.overwrite=true", "data.root=x",
    "run.extend=true",
    "data.loader=resident", "eval.every_epochs=2", "eval.flip_tta=true",
    "checkpoint.every_steps=5", "checkpoint.keep=1", "log.every_steps=1", "wandb.mode=disabled",
    "wandb.media_every_epochs=0", "wandb.artifacts=true",
    "parallel.timeout_seconds=5", "train.max_steps=5", "train.early_stop=true",
]  # fmt: skip
BINDING = [
    "seed=1", "data.dataset=digits", "data.batch_size_per_replica=16", "data.val_split=10",
    "augment.crop_padding=2", "augment.flip=false", "augment.mixup_alpha=0", "augment.cutout=4",
    "model.name=resnet32", "model.widths=[8,16,32]", "model.shortcut=pad", "model.dropout=0",
    "optim.name=muon", "optim.muon_lr=0.2", "optim.lr=0.1", "optim.momentum=0.8",
    "optim.weight_decay=0", "optim.nesterov=true",
    "optim.lr_scaling=linear", "optim.reference_batch_size=64", "optim.label_smoothing=0.1",
    "schedule.name=step", "schedule.warmup_epochs=1", "schedule.milestones=[1]", "train.epochs=10",
    "train.ema_decay=0.9", "precision.dtype=fp32", "precision.channels_last=false",
    "parallel.replicas=2", "parallel.reduction=exact",
]  # fmt: skip


@pytest.mark.parametrize("pair", FREE)
def test_what_may_change_when_a_run_goes_on(pair: str) -> None:
    assert not changes_trajectory(pair.split("=")[0])
    base, other = load_config([]), load_config([pair])
    assert base != other
    assert trajectory_hash(base) == trajectory_hash(other)
    assert trajectory_differences(to_dict(base), to_dict(other)) == []


@pytest.mark.parametrize("pair", BINDING)
def test_what_must_not_change_when_a_run_goes_on(pair: str) -> None:
    key = pair.split("=")[0]
    assert changes_trajectory(key)
    base, other = load_config([]), load_config([pair])
    assert trajectory_hash(base) != trajectory_hash(other)
    (line,) = trajectory_differences(to_dict(base), to_dict(other))
    values: dict[str, Any] = dict(flatten(to_dict(other)))
    assert line == f"{key}: {dict(flatten(to_dict(base)))[key]} -> {values[key]}"


def test_a_key_of_a_later_version_leaves_name_and_continuation_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = load_config(["seed=3"])
    before = to_dict(now)
    del before["optim"]["muon_lr"]
    assert trajectory_differences(before, to_dict(now)) == []
    changed = to_dict(load_config(["seed=3", "optim.muon_lr=0.3"]))
    assert trajectory_differences(before, changed) == ["optim.muon_lr: 0.1 -> 0.3"]
    name = trajectory_hash(now)
    with monkeypatch.context() as patch:
        patch.setattr(
            "dist_resnet.config.load.changes_trajectory", lambda key: key != "optim.muon_lr"
        )
        assert trajectory_hash(now) == name


def test_the_hash_does_not_depend_on_how_a_value_was_written(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.yaml", "optim: {lr: 0.1}\n")
    hashes = {trajectory_hash(load_config([a])) for a in (file, "optim.lr=1e-1", "optim.lr=0.10")}
    assert len(hashes) == 1
    assert re.fullmatch("[0-9a-f]{8}", hashes.pop())


AS_IT_STANDS = [
    "007", "0012", "2024_11_27", "1e3", "12:30", "on", "off", "yes", "No", "true", "1_000", "a #b",
    "0x1f", "1.", ".5", "2024-11-27", "nan", "-", "a: b", "{a}", "@x", "!tag", "&a", "*b",
    "Versuch-ä", "  spaced  ", "=", "a=b", "'quoted'",
]  # fmt: skip


@pytest.mark.parametrize("text", AS_IT_STANDS)
def test_a_text_stays_as_it_stands(text: str, tmp_path: Path) -> None:
    config = load_config(
        [
            f"wandb.group={text}",
            f"data.root={text}",
            f'wandb.tags=[{json.dumps(text, ensure_ascii=False)},"{text}"]',
        ]
    )
    assert (config.wandb.group, config.data.root) == (text, text)
    assert config.wandb.tags == [text, text]
    # The resolved configuration says the same, to this program and to the next.
    stored = _write(tmp_path, "config.yaml", to_yaml(config))
    assert load_config([stored]) == config
    assert stored_config(to_dict(config)) == config


@pytest.mark.parametrize("text", ["007", "0012", "1e3", "12:30", "on", "2024_11_27", "a: b"])
def test_a_text_of_a_file_stays_as_yaml_leaves_it(text: str, tmp_path: Path) -> None:
    for written in (text, f"'{text}'", f'"{text}"'):
        if written == "a: b":
            continue
        file = _write(tmp_path, "a.yaml", f"wandb:\n  group: {written}\n  tags: [{written}, x]\n")
        config = load_config([file])
        assert (config.wandb.group, config.wandb.tags) == (text, [text, "x"])


def test_unquoted_items_of_a_list_stay_as_they_stand() -> None:
    config = load_config(["wandb.tags=[007, on ,a #b,12:30,'a,b', \"c]\" ,null,~]"])
    assert config.wandb.tags == ["007", "on", "a #b", "12:30", "a,b", "c]", "null", "~"]
    assert load_config(["wandb.tags=[]"]).wandb.tags == []


def test_null_is_no_text(tmp_path: Path) -> None:
    for arguments in (["wandb.group=null"], [_write(tmp_path, "a.yaml", "wandb: {group: null}")],
                      [_write(tmp_path, "b.yaml", "wandb:\n  group:\n")]):  # fmt: skip
        assert load_config(["wandb.group=x", *arguments]).wandb.group in (None, "x")
        assert load_config(arguments).wandb.group is None
    quoted = _write(tmp_path, "c.yaml", "wandb: {group: 'null'}")
    config = load_config([quoted])
    assert config.wandb.group == "null"
    assert load_config([_write(tmp_path, "d.yaml", to_yaml(config))]) == config


@pytest.mark.parametrize(
    ("text", "value"), [("0012", 12), ("+3", 3), ("1_000", 1000), (" 7 ", 7), ("-0", 0)]
)
def test_a_number_is_decimal(text: str, value: int, tmp_path: Path) -> None:
    assert load_config([f"seed={text}"]).seed == value
    assert load_config([_write(tmp_path, "a.yaml", f"seed: {text}\n")]).seed == value


@pytest.mark.parametrize(
    "pair",
    ["seed=12:30", "seed=0x1f", "seed=1e3", "seed=0b11", "seed=", "optim.lr=1:30", "optim.lr=1_0",
     "seed=" + 5000 * "9", "model.widths=[010x]", "model.widths=3", "model.widths=[1,[2],3]",
     "wandb.tags=a", "wandb.tags=[a", "augment.flip=2", "augment.flip=maybe", "wandb.group=???",
     "wandb.group=a\nb", "wandb.group=\x1b[31m", "wandb.tags=[a\tb]", "run.name=\udce9",
     "data.root=a\0b", "optim={lr: 0.1", "optim={lr: [1, 2]}", "optim={}x", "optim=[1]"],
)  # fmt: skip
def test_what_is_no_value_is_refused(pair: str) -> None:
    line = _refused(pair)
    assert line.isprintable()
    assert pair[:4] in line


def test_a_section_may_be_given_as_wandb_s_agent_gives_it() -> None:
    config = load_config(["optim={'lr': 0.02, 'nesterov': True}", "data={'dataset': '001'}"])
    assert (config.optim.lr, config.optim.nesterov, config.data.dataset) == (0.02, True, "001")


def test_a_path_may_have_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seed=1").mkdir()
    file = _write(tmp_path / "seed=1", "config.yaml", "optim: {lr: 0.3}\n")
    monkeypatch.chdir(tmp_path)
    for path in (file, "seed=1/config.yaml"):
        assert load_config([path, "seed=5"]).optim.lr == 0.3
    _write(tmp_path, "seed=2", "optim: {lr: 0.3}\n")  # by a > too many in a command, say
    assert load_config(["seed=2"]).seed == 2


@pytest.mark.parametrize(
    "content",
    ["seed: 1\nseed: 2\n", "? [a]\n: 1\n", "a: &a\n  b: *a\n", "- x\n", "seed: *none\n",
     "optim: {lr: !!python/object:os.system x}}\n", "%YAML 9.9\n---\nx", "a\tb:\n\t- c\n",
     "\x00", "seed: [", "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
         f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(9 * ['*' + chr(97 + n)])}]\n" for n in range(9)
     ), "x: " + 3000 * "[" + 3000 * "]"],
)  # fmt: skip
def test_what_is_no_configuration_file_is_refused(content: str, tmp_path: Path) -> None:
    line = _refused(_write(tmp_path, "a.yaml", content))
    assert line.isprintable()


def test_anchors_and_merges_are_yaml_s(tmp_path: Path) -> None:
    text = "model: &m {name: resnet32}\noptim: {<<: {lr: 0.3, momentum: 0.5}, lr: 0.4}\n"
    config = load_config([_write(tmp_path, "a.yaml", text)])
    assert (config.model.name, config.optim.lr, config.optim.momentum) == ("resnet32", 0.4, 0.5)


def test_a_list_for_an_argument_of_ones_own() -> None:
    given = ["optim.name=torch.optim:AdamW", "optim.args.betas=[0.8, 0.95]"]
    assert load_config(given).optim.args == {"betas": [0.8, 0.95]}
    assert load_config([*given, "optim.args.x={a: [1]}"]).optim.args["x"] == {"a": [1]}
    text = load_config(["model.name=a:b", 'model.args={x: "[1]"}'])
    assert stored_config(to_dict(text)).model.args == text.model.args == {"x": "[1]"}
    assert "optim.args" in _refused("optim.args.betas=[0.8")


def test_an_argument_that_is_null_is_one_that_is_given() -> None:
    without, null = (
        load_config(["model.name=a:b"]),
        load_config(["model.name=a:b", "model.args.x=null"]),
    )
    assert null.model.args == {"x": None}
    assert trajectory_differences(to_dict(without), to_dict(null)) == [
        "model.args.x: (not given) -> None"
    ]
    assert trajectory_hash(without) != trajectory_hash(null)


def test_from_python_later_sources_win() -> None:
    def rate(*arguments: Any) -> float:
        return load_config(arguments).optim.lr

    mapping = {"optim": {"lr": 0.2}}
    assert rate("optim.lr=0.1", mapping) == 0.2
    assert rate(mapping, "optim.lr=0.1") == 0.1
