"""Settings that are out of their range or contradict each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from swa_fast.train import cli
from swa_fast.train.errors import TrainError

pytestmark = pytest.mark.usefixtures("small")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "mnist"], "--dataset: expected one of digits, images, .* found 'mnist'"),
        (["--model", "vgg"], "--model: expected one of .*, or package.module:factory, found 'vgg'"),
        (["--epochs", "0"], "--epochs: expected 1 or more, found 0"),
        (["--batch-size", "-1"], "--batch-size: expected 1 or more, found -1"),
        (["--width", "0"], "--width: expected 1 or more, found 0"),
        (["--threads", "0"], "--threads: expected an integer from 1 to 1024, found 0"),
        (["--threads", "100000000000"], "--threads: expected an integer from 1 to 1024, found 10"),
        (["--workers", "99999"], "--workers: expected an integer from 0 to 1024, found 99999"),
        (["--workers", "-1"], "--workers: expected an integer from 0 to 1024, found -1"),
        (["--eval-every", "0"], "--eval-every: expected 1 or more, found 0"),
        (["--lr", "0"], "--lr: expected a finite number above 0, found 0"),
        (["--lr", "nan"], "--lr: expected a finite number above 0, found nan"),
        (["--swa-lr", "-1"], "--swa-lr: expected a finite number above 0, found -1"),
        (["--momentum", "1"], r"--momentum: expected a number in \[0, 1\), found 1"),
        (["--nesterov", "--momentum", "0"], "--momentum: expected a number above 0 with --nest"),
        (["--weight-decay", "inf"], "--weight-decay: expected a finite number of 0 or more"),
        (["--seed", "-1"], r"--seed: expected an integer in \[0, 2\^63\), found -1"),
        (["--fraction", "0"], r"--fraction: expected a number in \(0, 1\], found 0"),
        (["--swa-start", "-1"], "--swa-start: expected a fraction of 0 or more, found -1"),
        (["--swa-start", "1"], "--swa-start: expected a fraction that leaves an epoch to average"),
        (["--methods", "sgd,adam"], "--methods: expected one of sgd, .*, found 'adam'"),
        (["--methods", "sgd,sgd"], "--methods: expected different names"),
        (["--methods", "swa-cyclic"], "--cycle-epochs: expected with the method swa-cyclic, found"),
        (["--methods", "swa-cyclic", "--cycle-epochs", "9"],
         "--cycle-epochs: expected at most the 8 epochs that are left after --swa-start, found 9"),
        (["--methods", "swa-cyclic", "--cycle-epochs", "1", "--swa-start", "1.2", "--budgets",
          "2"], "--swa-start: expected 1 at most for swa-cyclic"),
        (["--methods", "swa-cyclic", "--cycle-epochs", "1", "--cycle-lr-min", "1"],
         r"--cycle-lr-min: expected 0.05 \(--cycle-lr-max\) at most, found 1"),
        (["--methods", "swa-cyclic", "--cycle-epochs", "16", "--cycle-shape", "cosine"],
         "--cycle-epochs: expected at most half of the 30 epochs with --cycle-shape cosine"),
        (["--methods", "fge", "--fge-cycle", "3"], "--fge-cycle: expected an even number of epo"),
        (["--methods", "fge", "--fge-cycle", "14"],
         "--fge-cycle: expected a half cycle within the 6 epochs that are left after --fge-start"),
        (["--methods", "fge", "--fge-start", "1"], "--fge-start: expected a fraction that leaves"),
        (["--methods", "swa-fixed", "--fixed-start", "1.5"], "--fixed-start: expected a fraction"),
        (["--budgets", "0"], r"--budgets: expected numbers in \(0, 100\], found 0"),
        (["--budgets", "1.5,1"], "--budgets: expected rising numbers"),
        (["--budgets", "0.5"],
         r"--swa-start: .* first average after epoch 23 of 15 \(swa\)"),
        (["--lr-schedule", "cosine", "--swa-from", "scratch"],
         "--swa-from: expected sgd with --lr-schedule cosine, found scratch"),
        (["--amp", "int8"], "--amp: expected one of none, bf16, fp16, found 'int8'"),
        (["--amp", "fp16", "--device", "cpu"], "--amp: fp16 needs a CUDA device, found device cpu"),
        (["--sync-bn", "--device", "cpu"], "--sync-bn: torch's SyncBatchNorm needs a CUDA device"),
        (["--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, found 'tpu'"),
        (["--device", "cuda:99"], "--device: .*found 'cuda:99'"),
        (["--backend", "fpga"], "--backend: .*fpga"),
        (["--dataset", "images"], "--data-dir: expected a folder with train"),
        (["--dataset", "imagenet"], "--data-dir: expected a folder with .*val/<class>"),
        (["--dataset", "images", "--data-dir", "missing"], "missing/train: expected a folder"),
        (["--dataset", "images", "--data-dir", ".", "--image-size", "4"], "--image-size: exp"),
        (["--data-dir", "."], "--data-dir: expected none with --dataset digits, which has no"),
        (["--pretrained", "torchvision"], "--pretrained: torchvision has weights of resnet50"),
        (["--pretrained", "missing.pt"], "missing.pt"),
        (["--pretrained", "x.pt", "--bn-gamma", "uniform"], "--bn-gamma: expected ones with --pre"),
        (["--bn-gamma", "zeros"], "--bn-gamma: expected one of ones, uniform, found 'zeros'"),
        (["--curve-data", "1.5"], r"--curve-data: expected a number in \[0, 1\], found 1.5"),
        (["--methods", "sgd", "--fge-start", "nan"], "--fge-start: expected a fraction"),
        (["--checkpoint-minutes", "-1"], "--checkpoint-minutes: expected a number of 0 or more"),
        (["--checkpoint-minutes", "nan"], "--checkpoint-minutes: expected a number of 0 or more"),
        (["--model", "vgg16", "--width", "2"], "--image-size: .* that a vgg16 can take, found 8x8"),
        (["--resume", "missing"], "expected the folder of a run, found no results.json"),
    ],
)  # fmt: skip
def test_bad_options(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("swa-fast train: error: ") and error.count("\n") == 1
    with pytest.raises(TrainError, match=message):
        raise TrainError(error.removeprefix("swa-fast train: error: "))
    assert not list(tmp_path.glob("runs/*/*"))
