"""import dist_resnet: train, evaluate and load from Python, as a notebook would."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_resnet
from dist_resnet.base import signals
from dist_resnet.base.errors import UserError
from dist_resnet.config.load import load_config
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset
from dist_resnet.training.loop import Trainer


@pytest.fixture
def settings(tiny: Dataset, tmp_path: Path) -> dict[str, Any]:
    return {
        "data": {
            "root": str(tiny.folder.parent),
            "dataset": tiny.folder.name,
            "batch_size_per_replica": 8,
            "loader": "resident",
        },
        "run": {"dir": str(tmp_path), "name": "job"},
        "model": {"widths": [4, 4, 4]},
        "parallel": {"device": "cpu", "threads": 1},
        "wandb": {"mode": "disabled"},
        "train": {"epochs": 1},
    }


def test_train_evaluate_load(settings: dict[str, Any], tiny: Dataset, tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    summary = dist_resnet.train(**settings)
    assert summary == json.loads((tmp_path / "job" / "summary.json").read_text())
    assert summary["step"] == 6
    assert dist_resnet.train(load_config([settings])) == summary  # complete: not trained again
    figures = dist_resnet.evaluate(tmp_path / "job")
    assert figures["val/top1"] == summary["val/top1"]
    mirrored = dist_resnet.evaluate(tmp_path / "job", "eval.flip_tta=true", "precision.dtype=fp32")
    again = {"eval": {"flip_tta": True}, "precision": {"dtype": "fp32"}}
    assert mirrored == dist_resnet.evaluate(tmp_path / "job", **again)
    model, test = dist_resnet.load(tmp_path / "job"), read_back(tiny.test_path)
    assert len(model.classes) == 5
    images = torch.from_numpy(test.images[:]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        guesses = (model(images) + model(images.flip(3))).argmax(1).numpy()
    correct = int((guesses == test.labels[:]).sum())
    assert mirrored["val/top1_tta"] == pytest.approx(correct / len(guesses))
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert torch.get_num_threads() == threads


def test_two_trainings_in_one_process_are_those_of_two(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    def trained(name: str) -> dict[str, torch.Tensor]:
        summary = dist_resnet.train(settings, run={"dir": str(tmp_path), "name": name})
        assert summary["step"] == 6
        return dist_resnet.load(tmp_path / name).state_dict()

    first, second = trained("first"), trained("second")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ctrl_c_saves_and_the_same_call_goes_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Trainer._train_on_next_batch

    def interrupted(self: Trainer) -> None:
        train(self)
        if self.state.step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_on_next_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dist_resnet.train(settings)
    status = json.loads((tmp_path / "job" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 4)
    assert not signals.received()
    assert dist_resnet.train(settings)["step"] == 6


def test_in_a_thread_that_may_not_handle_signals(settings: dict[str, Any]) -> None:
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(dist_resnet.train(settings)))
    thread.start()
    thread.join()
    assert found[0]["step"] == 6


def test_a_mistake_is_an_exception_with_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"optim\.lrr=1 \(argument\): .*did you mean optim\.lr\?"):
        dist_resnet.train(settings, optim={"lrr": 1})
    absent = {"root": "gone", "dataset": "absent"}
    with pytest.raises(UserError, match=r"model\.name=no_such_module:net: there is no module"):
        dist_resnet.train(settings, data=absent, model={"name": "no_such_module:net"})
    net = {"name": "examples.own_net:small", "args": {"wdith": 1}}
    with pytest.raises(UserError, match=r"model\.args\.wdith: .*did you mean width\?"):
        dist_resnet.train(settings, data=absent, model=net)
    adam = {"name": "torch.optim:Adam", "args": {"beta": 1}}
    with pytest.raises(UserError, match=r"optim\.args\.beta: .*did you mean betas\?"):
        dist_resnet.train(settings, data=absent, optim=adam)
    tint = {"name": "examples.own_augmentation:tint", "args": {"strenght": 1}}
    with pytest.raises(UserError, match=r"augment\.extra\.args\.strenght"):
        dist_resnet.train(settings, data=absent, augment={"extra": [tint]})
    with pytest.raises(UserError, match=r"nowhere"):
        dist_resnet.evaluate("nowhere")


def test_the_functions_are_there_whoever_imported_the_commands_before() -> None:
    code = (
        "import dist_resnet, sys; assert 'torch' not in sys.modules;"
        "import dist_resnet.train, dist_resnet.evaluate;"
        "from dist_resnet import train, Config, load;"
        "assert callable(train) and callable(dist_resnet.train) and callable(dist_resnet.evaluate);"
        "assert 'summary' in dist_resnet.train.__call__.__doc__; assert Config().seed == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_the_caller_has_set_of_torch_changes_nothing_and_comes_back(
    dtype: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    # Of the built-in nets only `eager` takes autocast's own casts.
    settings["train"] = {"epochs": 1, "step_mode": "eager"}
    settings["precision"] = {"dtype": dtype}
    torch.manual_seed(1)
    wanted = torch.rand(2)

    def weights(name: str) -> Any:
        found = dist_resnet.train(settings, run={"dir": str(tmp_path), "name": name})
        assert dist_resnet.evaluate(tmp_path / name)["val/top1"] == found["val/top1"]
        return found["weights_sha256"]

    plain = weights("plain")
    command = [sys.executable, "-m", "dist_resnet.train", *_as_words(settings, tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    assert (
        json.loads((tmp_path / "command" / "summary.json").read_text())["weights_sha256"] == plain
    )
    for name, state in (
        ("autocast", torch.autocast("cpu", torch.bfloat16)),
        ("no_autocast", torch.autocast("cpu", enabled=False)),
        ("inference", torch.inference_mode()),
        ("no_grad", torch.no_grad()),
        ("meta", torch.device("meta")),
    ):
        with state:
            assert weights(name) == plain
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        assert weights("double") == plain
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(2), wanted)
    own = {"run": {"dir": str(tmp_path), "name": "repeatable"}}
    dist_resnet.train(settings, **own, precision={"dtype": dtype, "deterministic": True})
    assert not torch.are_deterministic_algorithms_enabled()


def test_two_trainings_at_once_are_refused() -> None:
    from dist_resnet.training.api import as_in_a_new_process

    with (
        as_in_a_new_process(),
        pytest.raises(UserError, match="another training runs in this process"),
        as_in_a_new_process(),
    ):
        pass
    with as_in_a_new_process():
        pass


def _as_words(settings: dict[str, Any], folder: Path) -> list[str]:
    """The same training as a command, in the folder `command`."""
    keys = settings | {"run": {"dir": str(folder), "name": "command"}}
    return [
        f"{section}.{name}={str(value).replace(' ', '')}"
        for section, values in keys.items()
        for name, value in values.items()
    ]
