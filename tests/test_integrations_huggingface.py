"""Averages in Hugging Face's Trainer, and in a loop with accelerate."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from docstrings import code_of
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from swa_fast import EMA, SWA, Averager, Power, Window  # noqa: E402
from swa_fast.integrations import huggingface  # noqa: E402
from swa_fast.integrations._put import put  # noqa: E402
from swa_fast.integrations.huggingface import (  # noqa: E402
    Averaging,
    read_average,
    read_state,
)

# The Trainer's own, of torch's data loaders and schedulers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Net(nn.Module):
    """What a Trainer needs of a model, with dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(x.to(self.head.weight.dtype)))
        return {"loss": (logits.squeeze(1) - labels).square().mean(), "logits": logits}


def data(n: int = 24, seed: int = 5) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(3, generator=g), "labels": torch.randn((), generator=g)}
            for _ in range(n)]  # fmt: skip


def trainer_of(folder: Path, model: nn.Module | None = None, **options: Any) -> Trainer:
    callbacks = options.pop("callbacks", None)
    evaluated = options.pop("eval_dataset", data(8, 6))
    torch.manual_seed(1)
    settings = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.05,
        "report_to": [], "disable_tqdm": True, "save_steps": 4, "use_cpu": True,
        "logging_steps": 1000, "lr_scheduler_type": "constant", "dataloader_pin_memory": False,
    }  # fmt: skip
    return Trainer(
        Net() if model is None else model,
        TrainingArguments(str(folder), **{**settings, **options}),
        train_dataset=data(),
        eval_dataset=evaluated,
        callbacks=callbacks,
    )


class Record(TrainerCallback):
    """The live weights after each of the optimiser's steps, as a user would see them."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self.weights.append(model.head.weight.detach().clone())


RULES = {"ema": EMA(0.7), "swa": SWA(), "power": Power(1.0), "last": Window(2)}


def test_every_rule_averages_the_weights_after_each_step(tmp_path: Path) -> None:
    seen = Record()
    trainer = trainer_of(tmp_path, callbacks=[seen], gradient_accumulation_steps=2)
    averaging = Averaging(RULES, evaluate="swa").attach(trainer)
    trainer.train()
    assert averaging.averager is not None
    averages = averaging.averager.averages
    stack = torch.stack(seen.weights).double()
    assert len(stack) == 6 and averaging.averager.n_averaged["ema"] == 6
    torch.testing.assert_close(averages["swa"]["head.weight"].double(), stack.mean(0))
    torch.testing.assert_close(averages["last"]["head.weight"].double(), stack[-2:].mean(0))
    ema = stack[0]
    for weights in stack[1:]:
        ema = 0.7 * ema + 0.3 * weights
    torch.testing.assert_close(averages["ema"]["head.weight"].double(), ema)
    # Training ends with the average in the model, and so does what is evaluated and saved then.
    assert trainer.model.head.weight.equal(averages["swa"]["head.weight"])
    trainer.save_model(str(tmp_path / "out"))
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "out/model.safetensors")
    assert saved["head.weight"].equal(averages["swa"]["head.weight"])
    # From here on the model is the user's, and evaluations see it as it is.
    with torch.no_grad():
        trainer.model.head.weight.fill_(9)
    predicted = trainer.predict(data(4)).predictions
    assert trainer.model.head.weight.eq(9).all() and abs(predicted).max() > 5


def test_evaluations_see_the_average_and_live_weights_come_back(tmp_path: Path) -> None:
    class Look(Record):
        def on_prediction_step(self, args: Any, *_: Any, **others: Any) -> None:
            self.weights.append(others["model"].head.weight.detach().clone())

    class Expect(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, *_: Any, **others: Any) -> None:
            calls.append(state.global_step)

    look, calls = Look(), []
    sets = {"a": data(4, 7), "b": data(4, 8)}
    trainer = trainer_of(
        tmp_path, callbacks=[look, Expect()], eval_dataset=sets, eval_strategy="steps",
        eval_steps=3, eval_on_start=True, max_steps=7,
    )  # fmt: skip
    averaging = Averaging({"swa": SWA()}, at_end=False).attach(trainer)
    metrics = trainer.train().metrics
    assert "train_loss" in metrics and averaging.averager is not None
    # In the order of what happened: two looks before the first step, then three steps, two looks.
    weights = look.weights
    steps = [*weights[2:5], *weights[7:10], weights[12]]  # and two looks at the end
    assert weights[0].equal(weights[1]) and calls == [0, 0, 3, 3, 6, 6, 7, 7]
    for at, n in ((5, 3), (10, 6)):
        for look_at in (at, at + 1):
            mean = torch.stack(steps[:n]).double().mean(0)
            torch.testing.assert_close(weights[look_at].double(), mean, msg=f"{look_at}")
    # Outside of training, too, and where the evaluation fails.
    live = trainer.model.head.weight.detach().clone()
    assert live.equal(steps[-1])
    before = trainer.predict(data(4, 7)).predictions
    with averaging.averager.applied("swa"):
        trainer.model.eval()
        batch = data(4, 7)
        expected = trainer.model(
            torch.stack([b["x"] for b in batch]), torch.stack([b["labels"] for b in batch])
        )["logits"]
    torch.testing.assert_close(torch.from_numpy(before), expected.detach())

    def fail(*_: Any) -> None:
        assert not trainer.model.head.weight.equal(live)
        raise KeyboardInterrupt

    trainer.compute_metrics = fail
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(data(4, 7))
    assert trainer.model.head.weight.equal(live)
    trainer.compute_metrics = None
    trainer.evaluate()
    assert trainer.model.head.weight.equal(live)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_the_scaler_skipped_is_not_averaged(tmp_path: Path, optim: str) -> None:
    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **others: Any) -> None:
            if state.global_step == 1:
                others["model"].head.weight.grad.fill_(float("inf"))

    trainer = trainer_of(
        tmp_path, max_steps=3, callbacks=[Overflow()], max_grad_norm=0.0, optim=optim
    )
    averaging = Averaging({"swa": SWA()}).attach(trainer)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.train()
    assert trainer.state.global_step == 3
    assert averaging.averager is not None and averaging.averager.n_averaged == {"swa": 2}


def test_an_optimiser_is_not_followed_after_an_error(tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **others: Any) -> None:
            if state.global_step == 2:
                raise RuntimeError("broken callback")

    trainer = trainer_of(tmp_path, callbacks=[Broken()])
    averaging = Averaging(SWA()).attach(trainer)
    with pytest.raises(RuntimeError, match="broken callback"):
        trainer.train()
    assert averaging.averager is not None
    trainer.optimizer.step()
    assert averaging.averager.n_averaged == {"average": 2}
    assert trainer.evaluate()["eval_loss"] > 0


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["n_averaged"] == b["n_averaged"] and a["averages"].keys() == b["averages"].keys()
    for row, tensors in a["averages"].items():
        for name, tensor in tensors.items():
            assert tensor.equal(b["averages"][row][name]), (row, name)


RUN = """
import sys
sys.path.insert(0, {tests!r})
from test_integrations_huggingface import *

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 10:
            os._exit(9)

trainer = trainer_of(Path({folder!r}), callbacks=[Kill()])
Averaging(RULES, every=2, start=1).attach(trainer)
trainer.train()
"""


def test_a_killed_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole")
    expected = Averaging(RULES, every=2, start=1).attach(whole)
    whole.train()
    code = RUN.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    killed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}
    )
    assert killed.returncode == 9, killed.stderr
    again = trainer_of(tmp_path / "killed")
    resumed = Averaging(RULES, every=2, start=1).attach(again)
    again.train(resume_from_checkpoint=True)
    assert expected.averager is not None and resumed.averager is not None
    same(resumed.averager.state_dict(), expected.averager.state_dict())
    assert resumed.averager.n_averaged["ema"] == 5
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert ours.equal(theirs)
    # A second training on the same object starts new averages.
    again.train()
    assert resumed.averager.n_averaged["ema"] == 5


def test_resuming_refuses_averages_that_do_not_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = trainer_of(tmp_path, max_steps=4)
    first.train()  # without averages
    folder = tmp_path / "checkpoint-4"
    with pytest.raises(ValueError, match=r"expected averages .* found none.*resume='anew'"):
        trainer = trainer_of(tmp_path, max_steps=8)
        Averaging(EMA(0.9)).attach(trainer)
        trainer.train(resume_from_checkpoint=str(folder))
    trainer = trainer_of(tmp_path, max_steps=8)
    averaging = Averaging(EMA(0.9), resume="anew").attach(trainer)
    with caplog.at_level("WARNING", "swa_fast"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert "start anew at step 4" in caplog.text
    assert averaging.averager is not None and averaging.averager.n_averaged == {"average": 4}

    folder = tmp_path / "checkpoint-8"
    trainer = trainer_of(tmp_path, max_steps=9)
    Averaging(EMA(0.8)).attach(trainer)
    with pytest.raises(ValueError, match=r"rules: expected .*0\.8.* found .*0\.9"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks

    file = folder / huggingface.TENSORS
    whole = file.read_bytes()
    for broken in (whole[:100], b"", whole[:-8], b"x" * 50):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: expected averages"):
            read_state(folder)
    file.write_bytes(whole)
    os.rename(folder, tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="expected averages of step 3, found those of step 8"):
        trainer = trainer_of(tmp_path, max_steps=9)
        averaging = Averaging(EMA(0.9)).attach(trainer)
        state = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())
        (tmp_path / "checkpoint-3/trainer_state.json").write_text(
            json.dumps({**state, "global_step": 3})
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averager = Averager(nn.Linear(2, 2), {"swa": SWA()})
    huggingface.write_state(tmp_path, averager.state_dict(), {"global_step": 1})
    averager.update()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="no space"):
            huggingface.write_state(tmp_path, averager.state_dict(), {"global_step": 2})
    assert sorted(os.listdir(tmp_path)) == [huggingface.DESCRIPTION, huggingface.TENSORS]
    assert read_state(tmp_path)[1]["global_step"] == 1
    assert json.loads((tmp_path / huggingface.DESCRIPTION).read_text())["global_step"] == 1


def test_the_best_checkpoints_average_is_what_training_ends_with(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_steps=2,
        save_total_limit=1, metric_for_best_model="score", greater_is_better=True, max_steps=8,
    )  # fmt: skip
    scores = iter([1, 3, 2, 0, 0])
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    averaging = Averaging({"ema": EMA(0.5)}).attach(trainer)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-4")
    average = read_average(best)
    for name, tensor in trainer.model.named_parameters():
        assert tensor.equal(average[name]), name
    assert averaging.averager is not None and averaging.averager.n_averaged == {"ema": 4}
    # What was measured at step 4 was the average, and it is what is measured now.
    then = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log][1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(then, rel=1e-6)
    # save_total_limit took the averages of the others with it.
    assert [file.parent.name for file in tmp_path.glob(f"*/{huggingface.TENSORS}")] == [
        "checkpoint-4"
    ]


def tiny_bert(**options: Any) -> BertForSequenceClassification:
    torch.manual_seed(2)
    return BertForSequenceClassification(
        BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=8, max_position_embeddings=8, **options)
    )  # fmt: skip


def text(n: int) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 11, (6,), generator=g), "labels": i % 2}
            for i in range(n)]  # fmt: skip


def test_save_pretrained_of_an_average_beside_live_weights(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_bert(), max_steps=3, eval_dataset=text(4), save_steps=3)
    trainer.train_dataset = text(12)
    averaging = Averaging(
        {"swa": SWA(), "ema": EMA(0.5)}, at_end=False, buffers="skip"
    ).attach(trainer)  # fmt: skip
    with pytest.raises(RuntimeError, match="nothing has been averaged yet"):
        averaging.save_pretrained(tmp_path / "none")
    trainer.train()
    live = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    averaging.save_pretrained(tmp_path / "ema", "ema")
    assert averaging.averager is not None
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "ema")
    for name, tensor in loaded.named_parameters():
        assert tensor.equal(averaging.averager.averages["ema"][name]), name
    assert all(live[name].equal(tensor) for name, tensor in trainer.model.state_dict().items())
    # The same from the checkpoint's file alone.
    other = tiny_bert()
    other.load_state_dict(read_average(tmp_path / "checkpoint-3", "ema"), strict=False)
    assert all(p.equal(loaded.get_parameter(n)) for n, p in other.named_parameters())
    with pytest.raises(KeyError, match="expected one of swa, ema, found 'x'"):
        read_average(tmp_path / "checkpoint-3", "x")


def test_half_precision_evaluation_after_training(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=3, bf16_full_eval=True)
    averaging = Averaging({"swa": SWA()}, at_end=False).attach(trainer)
    trainer.train()
    live = trainer.model.head.weight.detach().clone()
    assert averaging.averager is not None
    average = averaging.averager.averages["swa"]["head.weight"].clone()
    trainer.evaluate()
    # The Trainer leaves the model in bfloat16; it is the live model all the same.
    assert trainer.model.head.weight.equal(live.bfloat16())
    assert averaging.averager.averages["swa"]["head.weight"].equal(average)


def test_a_put_that_is_interrupted_changes_nothing() -> None:
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = [t.detach().clone() + 1 for t in (*model.parameters(), *model.buffers())]
    values[3] = torch.zeros(7)  # of no shape that fits
    with pytest.raises(RuntimeError):
        put(model, values)
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_what_is_refused(tmp_path: Path) -> None:
    class LerobotEMACallback(TrainerCallback):
        pass

    trainer = trainer_of(tmp_path, callbacks=[LerobotEMACallback()])
    with pytest.raises(ValueError, match="found LerobotEMACallback"):
        Averaging(SWA()).attach(trainer)
    trainer = trainer_of(tmp_path)
    averaging = Averaging(SWA()).attach(trainer)
    with pytest.raises(RuntimeError, match="attached already"):
        averaging.attach(trainer_of(tmp_path))
    with pytest.raises(ValueError, match="found Averaging"):
        Averaging(SWA()).attach(trainer)
    averaging.detach()
    assert not {"train", "evaluate", "predict", "save_model"} & set(vars(trainer))
    assert averaging not in trainer.callback_handler.callbacks
    with pytest.raises(RuntimeError, match=r"call attach\(trainer\)"):
        trainer_of(tmp_path, callbacks=[Averaging(SWA())]).train()
    trainer = trainer_of(tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="found fsdp"):
        Averaging(SWA()).attach(trainer)
    for arguments, options, error in (
        ({"a/b": SWA()}, {}, "without '/'"),
        ({}, {}, "at least one rule"),
        ({"a": SWA()}, {"evaluate": "b"}, "expected one of a, found 'b'"),
        ({"a": SWA()}, {"resume": "no"}, "resume: expected"),
    ):
        with pytest.raises(ValueError, match=error):
            Averaging(arguments, **options)
    with pytest.raises(TypeError, match="expected a rule, found int"):
        Averaging({"a": 3})


def test_tied_weights_are_written_once_and_read_under_both_names(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    averager = Averager(Tied(), {"swa": SWA(), "w": Window(2)})
    averager.update()
    huggingface.write_state(tmp_path, averager.state_dict(), {"global_step": 1})
    from safetensors import safe_open

    with safe_open(tmp_path / huggingface.TENSORS, "pt") as file:
        assert len(list(file.keys())) == 4  # swa, w and the two sources that w keeps
    state, _ = read_state(tmp_path)
    other = Averager(Tied(), {"swa": SWA(), "w": Window(2)})
    other.load_state_dict(state)
    same(other.state_dict(), averager.state_dict())


def test_accelerate_saves_and_loads_an_averager(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def make() -> tuple[Any, ...]:
        torch.manual_seed(4)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model, optimizer = accelerator.prepare(model, optimizer)
        averager = Averager(accelerator.unwrap_model(model), {"ema": EMA(0.5), "swa": SWA()})
        attachment = averager.attach(optimizer, every=2)
        accelerator.register_for_checkpointing(averager, attachment)
        return accelerator, model, optimizer, averager

    def train(objects: tuple[Any, ...], batches: range) -> None:
        accelerator, model, optimizer, _ = objects
        for i in batches:
            with accelerator.accumulate(model):
                x = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()

    whole = make()
    train(whole, range(12))
    first = make()
    train(first, range(6))
    first[0].save_state(str(tmp_path / "at-6"))
    second = make()
    train(second, range(4))
    second[0].load_state(str(tmp_path / "at-6"))
    train(second, range(6, 12))
    assert whole[3].n_averaged == {"ema": 3, "swa": 3}
    same(second[3].state_dict(), whole[3].state_dict())


def test_the_ten_lines_of_the_docstring_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with_trainer, with_accelerate = code_of(huggingface)
    names = {
        "Trainer": Trainer,
        "model": tiny_bert(),
        "args": TrainingArguments(
            str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True,
            per_device_train_batch_size=4, dataloader_pin_memory=False,
        ),
        "train": text(8),
        "held_out": text(4),
    }  # fmt: skip
    exec(with_trainer, names)
    swa = BertForSequenceClassification.from_pretrained(tmp_path / "out-swa")
    average = names["averaging"].averager.averages["swa"]  # type: ignore[attr-defined]
    assert swa.classifier.weight.equal(average["classifier.weight"])

    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    names |= {"accelerator": accelerator, "model": model, "optimizer": optimizer}
    exec(with_accelerate, names | {"Averager": Averager, "EMA": EMA})
    assert len(accelerator._custom_objects) == 2
