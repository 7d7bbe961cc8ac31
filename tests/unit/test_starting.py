"""Starting weights: whose tensor is whose, from where they come, what stays new."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dist_resnet
from dist_resnet.base.errors import UserError
from dist_resnet.config.load import load_config
from dist_resnet.config.schema import Config, ModelConfig
from dist_resnet.data.dataset import Dataset
from dist_resnet.models.matching import Start, matched, natural, start_from
from dist_resnet.models.resnet import resnet
from dist_resnet.runs.exported import read_tensors
from dist_resnet.runs.fork import starting_point
from dist_resnet.runs.store import CheckpointStore
from dist_resnet.step.state import build_state
from dist_resnet.training.starting import read_start, started_model
from tests.helpers.checkpoints import checkpoint_of

_EMBEDDED = "shared/peer_weights/resnet20-w16-ema.safetensors"
PEER = next((p / _EMBEDDED for p in Path(__file__).parents if (p / _EMBEDDED).exists()), None)
SMALL = ModelConfig(widths=[4, 4, 8])
PEER_NAMES = {
    "embed.0": "stem",
    "embed.1": "bn",
    **{f"layer{n + 1}": f"stages.{n}" for n in range(3)},
    **{f"layer{n + 1}.0.downsample": f"stages.{n}.0.shortcut" for n in (1, 2)},
    "fc": "head",
}


def weights(classes: int = 5, seed: int = 1) -> dict[str, Tensor]:
    return dict(resnet(SMALL, classes, seed).state_dict())


def as_peers(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the embedded somebody else's, in the order of a safetensors file."""
    found = {}
    for name, tensor in own.items():
        for theirs, ours in sorted(PEER_NAMES.items(), key=lambda pair: -len(pair[1])):
            if name.startswith(f"{ours}."):
                found[theirs + name.removeprefix(ours)] = tensor
                break
    assert len(found) == len(own)
    return {name: found[name] for name in natural(found)}


def assert_whole(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("prefix", ["", "network.", "module.", "model.module."])
def test_the_same_names_behind_wrappers(prefix: str) -> None:
    given = {f"{prefix}{name}": tensor for name, tensor in weights(seed=2).items()}
    given |= {"mean": torch.ones(1, 3, 1, 1), "scale": torch.ones(1, 3, 1, 1)}
    given["bn.num_batches_tracked"] = torch.tensor(3)
    found, new = matched(weights(), given, "names", 5)
    assert_whole(found, weights(seed=2))
    assert new == []


def test_somebody_elses_by_order_and_by_prefixes() -> None:
    wanted = weights(seed=2)
    for tensor in wanted.values():  # no two alike, or a mix-up would not show
        tensor.copy_(torch.randn_like(tensor))
    for how in ("order", PEER_NAMES):
        found, new = matched(weights(), as_peers(wanted), how, 5)
        assert_whole(found, wanted)
        assert new == []


@pytest.mark.parametrize("how", ["names", "order"])
def test_another_number_of_classes_leaves_the_last_layer_new(how: str) -> None:
    given = weights(7, seed=2)
    found, new = matched(weights(), given if how == "names" else as_peers(given), how, 5)
    assert new == ["head.weight", "head.bias"]
    assert_whole(found, {n: t for n, t in given.items() if not n.startswith("head.")})


def test_what_stays_new_is_as_it_was_built_and_said() -> None:
    model = resnet(SMALL, 5, 1)
    start = Start("w.safetensors", "0" * 64, weights(7, seed=2))
    told, new = start_from(model, start, SMALL, 5)
    assert told == (
        "starting weights: w.safetensors (SHA-256 0000000000000000); head is new, for 5 classes"
    )
    assert new == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, weights()["head.weight"])
    assert torch.equal(model.stem.weight, weights(seed=2)["stem.weight"])


def test_the_order_of_people() -> None:
    assert natural(["b10.w", "b2.w", "a", "b2.b"]) == ["a", "b2.b", "b2.w", "b10.w"]


@pytest.mark.parametrize(
    ("change", "how", "told"),
    [
        ({"stem.weight": None}, "names", "it lacks stem.weight; is it another model"),
        ({"other.weight": torch.ones(3)}, "names", "it has other.weight besides"),
        ({"stem.weight": torch.ones(4, 3, 5, 5)}, "names", "stem.weight is of shape"),
        # A wider layer in the middle is no last layer, though its own shapes differ in one place.
        (
            {"bn.weight": torch.ones(9), "head.bias": torch.ones(9)},
            "names",
            "bn.weight is of shape",
        ),
        # Nor is a single tensor of another length, be it one that belongs to no layer.
        ({"bn.weight": torch.ones(9)}, "names", "bn.weight is of shape"),
        ({"stem.weight": None}, "order", "it lacks stem.weight"),
        ({}, {"stm": "stem"}, "it has nothing of stm; did you mean stem"),
        ({}, {"stem": "setm"}, "would be setm.weight, which the net does not have; did you mean"),
        ({}, {"stem": "bn"}, "would be bn.weight"),
    ],
)
def test_what_does_not_fit_is_told(
    change: dict[str, Tensor | None], how: object, told: str
) -> None:
    given = {n: t for n, t in (weights(seed=2) | change).items() if t is not None}
    config = ModelConfig(widths=[4, 4, 8], init="w", init_map=how)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=told) as caught:
        start_from(resnet(SMALL, 5, 1), Start("w", "0", given), config, 5)
    assert str(caught.value).startswith("model.init=w: ")
    assert "\n" not in str(caught.value)


def checkpoint(folder: Path, ema: bool) -> Path:
    pairs = ["model.widths=[4,4,8]", f"train.ema_decay={0.5 if ema else 0}", "seed=2"]
    state = build_state(load_config(pairs), 5, torch.float32, torch.device("cpu"))
    if state.ema is not None:
        state.ema += 1
    saved = replace(checkpoint_of(3), state=state.snapshot())
    return CheckpointStore(folder / "checkpoints", 1).save(saved, best=False)


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("of_run", [False, True])
def test_from_a_run_or_a_checkpoint(tmp_path: Path, ema: bool, of_run: bool) -> None:
    file = checkpoint(tmp_path, ema)
    start = read_start(Config(model=ModelConfig(init=str(tmp_path if of_run else file))), "")
    assert start is not None
    assert start.identity() == {
        "file": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    wanted = weights(seed=2)
    assert_whole(start.tensors, {name: t + 1 if ema else t for name, t in wanted.items()})


def test_a_safetensors_file_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.torch").save
    names = ["a", "b2.weight", "b10.weight"]  # by text the last one comes second
    file = tmp_path / "w.safetensors"
    file.write_bytes(save({name: torch.zeros(1) for name in reversed(names)}))
    assert list(read_tensors(file)[0].tensors) == names


def test_from_a_safetensors_file(tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.torch").save
    file = tmp_path / "w.safetensors"
    file.write_bytes(save(weights(seed=2)))
    start = read_start(Config(model=ModelConfig(init=str(file))), "")
    assert start is not None
    assert start.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert_whole(start.tensors, weights(seed=2))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.safetensors", None, "cannot be read: No such file"),
        ("bad.safetensors", b"no tensors", "not a safetensors file, or damaged"),
        ("none.pt", None, "cannot be read"),
        ("bad.pt", b"no tensors", "not a checkpoint, or damaged"),
    ],
)
def test_files_that_hold_no_weights(
    tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^model.init={tmp_path / name}: {told}") as caught:
        read_start(Config(model=ModelConfig(init=str(tmp_path / name))), "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        (["model.init_map=order"], "with a model.init"),
        (["model.init=a", "model.init_map=ordre"], "names, order, or"),
        (["model.init=a", "model.init_map={a: 3}"], "names, order, or"),
        (["model.init="], "a path, or null"),
        (["model.bn_momentum=0"], "above 0"),
    ],
)
def test_keys_are_checked(pairs: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(pairs)


def test_a_mapping_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model:\n  init: a\n  init_map: {layer1.0: stages.0.0, fc: head}\n")
    wanted = {"layer1.0": "stages.0.0", "fc": "head"}
    assert load_config([str(file)]).model.init_map == wanted
    one = load_config(["model.init=a", "model.init_map={layer1.0: stages.0.0, fc: head}"])
    assert one.model.init_map == wanted
    assert load_config([str(file), "model.init_map=order"]).model.init_map == "order"


def test_the_embedded_weights_of_somebody_else_fit_by_order_and_by_prefixes() -> None:
    pytest.importorskip("safetensors")
    if PEER is None:
        pytest.skip("there are no such weights here")
    config = ModelConfig(init=str(PEER), init_map="order")
    start = read_start(Config(model=config), "")
    assert start is not None
    own = resnet(config, 10).state_dict()
    found, new = matched(own, start.tensors, "order", 10)
    assert new == []
    assert sum(found[n].numel() for n in own if "running" not in n) == 272_474
    assert_whole(found, matched(own, start.tensors, PEER_NAMES, 10)[0])


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first who asks for CIFAR-10 prepares it
def test_somebody_elses_net_has_its_accuracy_here(cifar10: Dataset) -> None:
    """An independent trainer's weights, scored in float32 by this evaluator: 95.07%."""
    pytest.importorskip("safetensors")
    if PEER is None:
        pytest.skip("there are no such weights here")
    found = dist_resnet.evaluate(
        PEER,
        f"data.root={cifar10.folder.parent}",
        f"data.dataset={cifar10.folder.name}",
        "model.init_map=order",
        "data.normalisation=imagenet",
        "precision.dtype=fp32",
    )
    assert found["images"] == 10_000
    assert abs(found["correct"] - 9_507) <= 3  # kinds of processors round otherwise


def test_a_file_is_evaluated_with_all_its_classes_only(tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.torch").save
    file = tmp_path / "w.safetensors"
    file.write_bytes(save({f"network.{n}": t for n, t in weights(5, seed=2).items()}))
    config = load_config(["model.widths=[4,4,8]", f"model.init={file}"])
    start = read_start(config, "")
    assert start is not None
    model = started_model(config, 5, start)
    assert not model.training
    assert_whole(dict(model.state_dict()), weights(5, seed=2))
    with pytest.raises(UserError, match="its net tells other classes apart than 4"):
        started_model(config, 4, start)


def test_a_run_that_goes_on_cannot_begin_with_other_weights() -> None:
    saved = checkpoint_of(config=load_config(["model.init=a"]), fingerprint="f")
    same = load_config(["model.init=a"])
    assert starting_point(saved, same, "f", []) is saved
    other = ["model.init=b", "train.epochs=200"]
    with pytest.raises(UserError, match=r"belongs to another run: model.init: a -> b"):
        starting_point(saved, load_config(other), "f", ["model.init"])
    extended = load_config([*other, "run.extend=true"])
    with pytest.raises(UserError, match="these weights were read before the first step"):
        starting_point(saved, extended, "f", ["model.init", "train.epochs"])


def test_a_table_of_another_length_is_no_last_layer() -> None:
    own = {"places": torch.zeros(49, 16), "head.weight": torch.zeros(49, 16)}
    given = {"places": torch.zeros(16, 16), "head.weight": torch.zeros(49, 16)}
    with pytest.raises(UserError, match="places is of shape"):
        matched(own, given, "names", 49)
