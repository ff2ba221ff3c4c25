"""The input pipeline against the training step that it feeds: time per batch of both.

    python bench/bench_input.py --dataset synthetic --model preresnet20
    python bench/bench_input.py --dataset images --data-dir DIR --threads 1

The pipeline is timed by itself, without a network, and the step (forward, backward, SGD) on one
batch that is on the device already; rounds of both take turns. In-memory datasets make their
batches in turn with the steps, so the share is the pipeline's part of the sum. Streams decode in
other processes meanwhile: there a pipeline that is quicker than the step costs next to nothing,
provided that cores are left for it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from swa_fast.train.data import DATASETS, NORMALISATIONS, Batches, Placement, load_dataset
from swa_fast.train.models import MODELS, build_model


def endless(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    seed = 0
    while True:
        yield from batches.epoch(seed)
        seed += 1


def milliseconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    """Mean time of a call, the device's work included."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronise()
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronise()
    return 1000 * (time.perf_counter() - start) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=DATASETS, default="synthetic")
    parser.add_argument("--data-dir")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--normalise", choices=("dataset", *NORMALISATIONS), default="dataset")
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--model", choices=MODELS, default="preresnet20")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=4, help="processes that decode a stream")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=50, help="batches of a round")
    parser.add_argument("--steps", type=int, default=5, help="training steps of a round")
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(arguments.threads)

    dataset = load_dataset(
        arguments.dataset,
        arguments.data_dir,
        image_size=arguments.image_size,
        normalise=arguments.normalise,
        fraction=arguments.fraction,
        threads=arguments.threads,
    )
    source = endless(
        dataset.train_batches(arguments.batch_size, Placement(device, workers=arguments.workers))
    )
    images, labels = next(source)
    model = build_model(
        arguments.model,
        in_channels=dataset.image_shape[0],
        num_classes=len(dataset.classes),
        width=arguments.width,
    ).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    step()
    times: dict[str, list[float]] = {"input": [], "step": []}
    for _ in range(arguments.rounds):
        times["input"].append(milliseconds(lambda: next(source), arguments.batches, device))
        times["step"].append(milliseconds(step, arguments.steps, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    shape = "x".join(str(n) for n in dataset.image_shape)
    print(
        f"{arguments.dataset} {shape}, batches of {len(labels)}, {arguments.model}, {device}, "
        f"{arguments.threads} thread(s), torch {torch.__version__}"
    )
    print(f"{'':8}{'ms/batch':>10}{'min':>10}{'max':>10}")
    for name, values in times.items():
        print(f"{name:8}{medians[name]:10.3f}{min(values):10.3f}{max(values):10.3f}")
    print(f"input / (input + step): {100 * medians['input'] / sum(medians.values()):.2f} %")


if __name__ == "__main__":
    main()
