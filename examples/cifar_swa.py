"""Stochastic Weight Averaging on CIFAR-10, in one file.

    python examples/cifar_swa.py                            # downloads CIFAR-10 into data/cifar10
    python examples/cifar_swa.py --epochs 30 --device cuda --workers 8

SGD with a cosine schedule for the first three quarters of the epochs; then a constant rate, at
which the weights at the end of every epoch are averaged. After the last one the BatchNorm
statistics of the average are estimated anew, since those of the network that was trained do not fit
it. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from tqdm import tqdm

import swa_fast

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: relu(f(x) + s(x))."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet(depth: int = 20, width: int = 16, classes: int = 10) -> nn.Module:
    """ResNet of depth 6n + 2 for images of 32x32 pixels (He et al., CVPR 2016)."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)]
    layers.append(nn.ReLU())
    channels = width
    for stage in range(3):
        for block in range((depth - 2) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Block(channels, width << stage, stride))
            channels = width << stage
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


def load(options: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    """Training images, cropped and mirrored at random, and test images."""
    plain = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    random = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    kinds = {True: transforms.Compose(random + plain), False: transforms.Compose(plain)}
    train, test = (
        DataLoader(
            datasets.CIFAR10(options.data_dir, train=part, transform=kinds[part], download=True),
            batch_size=options.batch_size if part else 500,
            shuffle=part,
            num_workers=options.workers,
            pin_memory=options.device.type == "cuda",
            persistent_workers=options.workers > 0,
        )
        for part in (True, False)
    )
    return train, test


@torch.inference_mode()
def accuracy(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """Share of the images that are classified rightly, in percent."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)  # stays there: nothing waits
    for images, labels in loader:
        predicted = model(images.to(device, non_blocking=True)).argmax(1)
        correct += (predicted == labels.to(device, non_blocking=True)).sum()
    return 100 * correct.item() / len(loader.dataset)


def save(path: Path, content: dict[str, object]) -> None:
    """Writes beside the file and renames, so that it is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, and gives the test accuracies in percent of the last weights and of the average."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data/cifar10", help="of torchvision's CIFAR10")
    parser.add_argument("--out", type=Path, default=Path("cifar_swa.pt"), help="checkpoint")
    parser.add_argument("--depth", type=int, default=20, help="of the ResNet, 6n + 2")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--swa-lr", type=float, default=0.05, help="while averaging")
    parser.add_argument("--swa-start", type=float, default=0.75, help="fraction of the epochs")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(auto))
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    device, start = options.device, int(options.swa_start * options.epochs)
    train, test = load(options)
    model = resnet(options.depth, options.width)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, momentum=0.9, weight_decay=options.weight_decay
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=max(start, 1), eta_min=options.swa_lr
    )
    constant = swa_fast.SWALR(optimizer, swa_lr=options.swa_lr, anneal_epochs=1)
    averaged = swa_fast.AveragedModel(model)  # the mean of all weights that it is updated with

    for epoch in tqdm(range(options.epochs), unit="epoch"):
        model.train()
        for images, labels in tqdm(train, leave=False, unit="batch"):
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            loss = F.cross_entropy(model(images), labels.to(device, non_blocking=True))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if epoch >= start:
            averaged.update_parameters(model)
        (constant if epoch + 1 >= start else cosine).step()

    found = {"sgd": accuracy(model, test, device)}
    swa_fast.update_bn(tqdm(train, desc="BatchNorm", leave=False), averaged, device)
    found["swa"] = accuracy(averaged, test, device)
    save(options.out, {"model": averaged.module.state_dict(), "accuracy": found})
    print(f"last weights {found['sgd']:.2f} %, SWA {found['swa']:.2f} % of {len(test.dataset):,}")
    return found


if __name__ == "__main__":
    main()
