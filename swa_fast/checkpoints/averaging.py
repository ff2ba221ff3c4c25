"""Averages of checkpoints on disk: :func:`average`, :func:`greedy`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .compare import check_output_apart, check_same_tensors, is_numeric, ties
from .entries import Checkpoint, bytes_of
from .errors import CheckpointError
from .formats import reader, weights_name
from .output import Layout, Output, check_output, companions_of
from .stream import Stream, anonymous_bytes
from .weights import check_window, expand, merge_weights, select

__all__ = ["AverageReport", "average", "combine"]

DTYPES = {
    "fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
_ALIASES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
_NO_DIGEST = "0" * 64


@dataclass
class AverageReport:
    """What :func:`average` did.

    Attributes:
        output: what was written.
        inputs: what was averaged, oldest first.
        weights: of the inputs.
        tensors: that were averaged; copied ones (integers and booleans) are not counted.
        parameters: their elements.
        copied: integers and booleans, taken from the last input.
        differing: those of them that are not the same in all inputs.
        tied: names of tensors that are another one, and which.
        left_out: names of what is no tensor.
        bytes_read: of the inputs' tensors.
        bytes_written: of the output's.
        seconds: of all work.
        peak_bytes: by which the process' anonymous memory grew; 0 where that cannot be told.
        sha256: of every file that was read; empty without ``checksums``.
        dry_run: nothing was written.
    """

    output: str
    inputs: list[str]
    weights: list[float]
    tensors: int = 0
    parameters: int = 0
    copied: int = 0
    differing: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    sha256: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{w:10.6f}  {path}" for path, w in zip(self.inputs, self.weights, strict=True)]
        rate = self.bytes_read / max(self.seconds, 1e-9) / 1e9
        verb = "to average" if self.dry_run else "averaged"
        lines.append(
            f"{self.tensors} tensors of {self.parameters:,} elements {verb}, {self.copied} copied "
            f"from the last input"
        )
        if self.differing:
            shown = ", ".join(self.differing[:5])
            lines.append(f"not the same in all inputs: {shown} ({len(self.differing)} of them)")
        if self.tied:
            lines.append(f"written once: {', '.join(f'{a} = {b}' for a, b in self.tied.items())}")
        if self.left_out:
            lines.append(f"no tensors, left out: {', '.join(self.left_out[:5])}")
        if not self.dry_run:
            lines.append(
                f"{self.bytes_read / 1e9:.2f} GB read in {self.seconds:.1f} s ({rate:.2f} GB/s), "
                f"memory grew by {self.peak_bytes / 2**20:.0f} MiB"
            )
        lines.append(f"{'would write' if self.dry_run else 'written:'} {self.output}")
        return "\n".join(lines)


def dtype_of(name: str, argument: str, allowed: Sequence[str]) -> str:
    """The short name of a floating type.

    Raises:
        CheckpointError: not one of ``allowed``.
    """
    short = _ALIASES.get(name, name)
    if short not in allowed:
        raise CheckpointError(f"{argument}: expected one of {', '.join(allowed)}, found {name!r}")
    return short


def average(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: str | Sequence[float] = "uniform",
    last: int | None = None,
    window: tuple[int, int] | None = None,
    every: int = 1,
    sort: bool = False,
    accumulate: str = "fp64",
    dtype: str = "keep",
    shard_size: int = 5_000_000_000,
    key: str | None = None,
    ema: bool = False,
    strip: str | None = None,
    update_bn: tuple[nn.Module, Iterable[Any]] | None = None,
    checksums: bool = True,
    max_memory: int = 32 << 20,
    chunk: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> AverageReport:
    r"""Averages checkpoints on disk, :math:`\sum_i c_i \theta_i`, a chunk at a time.

    Memory does not depend on the size of the model: two buffers for each input and one for the
    output, ``max_memory`` in all, and what lies in another order than row-major in a file of
    torch.save, a tensor at a time. The output is there as a whole or not at all.

    Args:
        inputs: files, folders or patterns, oldest first; what a pattern matches is in natural
            order. See :func:`~swa_fast.checkpoints.reader` for what can be read.
        output: a ``.safetensors`` file, a file of :func:`torch.save` (``.pt``, ``.pth``, ``.bin``,
            ``.ckpt``), or else a folder for ``model.safetensors``, or shards and their index,
            with the configuration and tokenizer of the last input.
        weights: see :func:`~swa_fast.checkpoints.merge_weights`.
        last, window, every: which inputs are taken, see :func:`~swa_fast.checkpoints.select`.
        sort: put all inputs in natural order (``checkpoint-9`` before ``checkpoint-10``).
        accumulate: ``fp32`` or ``fp64``: in which the sum is made.
        dtype: of the result: ``keep``, or ``fp32``, ``fp64``, ``bf16`` or ``fp16``; other than
            ``keep`` allows inputs of different floating types.
        shard_size: most bytes of a file in a folder.
        key, ema, strip: see :func:`~swa_fast.checkpoints.reader`.
        update_bn: a model of these weights and batches: its BatchNorm statistics are estimated
            anew with the average and written in place of the averaged ones. The model holds the
            average afterwards.
        checksums: put the SHA-256 of every file that was read into the output's metadata.
        max_memory: bytes for the buffers.
        chunk: bytes of a buffer; None chooses. The result does not depend on it.
        overwrite: replace an output that is there.
        dry_run: check everything that can be without reading tensors, and write nothing.
        progress: show a bar on stderr, with tqdm.

    Integers and booleans are copied from the last input. Tensors that are one in all inputs are
    written once; safetensors name the others in their metadata, as ``safetensors.torch.save_model``
    does. Metadata of safetensors: ``format`` and, as JSON in ``swa_fast``, inputs, weights,
    version and checksums. A file of torch.save has no place for these.

    Raises:
        CheckpointError: an input, an argument or the output that cannot be right; the message
            names it. Nothing is written.
        OSError: a file cannot be read or written.

    Source: Izmailov et al., UAI 2018; Tian et al., 2025 (arXiv 2507.17634) for weights that replay
    a decay of the learning rate.
    """
    start = time.perf_counter()
    chosen = select(expand(inputs, sort=sort), last=last, window=window, every=every)
    numbers = merge_weights(weights, len(chosen))
    with ExitStack() as stack:
        opened = [
            stack.enter_context(reader(path, key=key, ema=ema, strip=strip)) for path in chosen
        ]
        if min(numbers) < 0:
            check_window(numbers, {e.dtype for e in opened[0].entries.values() if
                                   e.dtype.is_floating_point})  # fmt: skip
        (report,) = combine(
            opened, [Path(output)], torch.tensor([numbers], dtype=torch.float64),
            notes=[{"weights": numbers}], accumulate=accumulate, dtype=dtype,
            shard_size=shard_size, update_bn=update_bn, checksums=checksums,
            max_memory=max_memory, chunk=chunk, overwrite=overwrite, dry_run=dry_run,
            progress=progress,
        )  # fmt: skip
    report.seconds = time.perf_counter() - start
    return report


def combine(
    checkpoints: Sequence[Checkpoint],
    outputs: Sequence[Path],
    coefficients: Tensor,
    *,
    notes: Sequence[dict[str, Any]],
    accumulate: str,
    dtype: str,
    shard_size: int,
    update_bn: tuple[nn.Module, Iterable[Any]] | None = None,
    checksums: bool = True,
    max_memory: int = 32 << 20,
    chunk: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> list[AverageReport]:
    """K weighted sums of checkpoints in one pass; see :func:`average`.

    Args:
        checkpoints: r of them, open.
        outputs: K paths.
        coefficients: float64 [K, r].
        notes: for each output what its metadata tells besides.
    """
    started = anonymous_bytes()
    accumulate = dtype_of(accumulate, "accumulate", ("fp32", "fp64"))
    dtype = dtype_of(dtype, "dtype", ("keep", *DTYPES))
    if max_memory < 1 << 16:
        raise CheckpointError(f"max_memory: expected at least 65536 bytes, found {max_memory}")
    check_same_tensors(checkpoints, any_dtype=dtype != "keep")
    for output in outputs:
        check_output_apart([c.path for c in checkpoints], output)
    last = checkpoints[-1]
    tied = ties(checkpoints)
    dtypes = {name: _result(entry.dtype, dtype) for name, entry in last.entries.items()}
    names = [name for name in last.entries if name not in tied]
    # The widest types first, so that every tensor is aligned in the output.
    names.sort(key=lambda name: -_unit(dtypes[name]))
    plan = [(name, dtypes[name], last.entries[name].shape) for name in names]
    stem = _stem(last.path)
    layouts = [Layout(plan, output, stem, shard_size) for output in outputs]
    for output, layout in zip(outputs, layouts, strict=True):
        check_output(output, layout, overwrite)
    averaged = [name for name in names if is_numeric(dtypes[name])]
    copied = [name for name in names if not is_numeric(dtypes[name])]
    reports = [
        AverageReport(
            output=str(output), inputs=[str(c.path) for c in checkpoints], weights=row,
            tensors=len(averaged), parameters=sum(last.entries[n].numel for n in averaged),
            copied=len(copied), tied=tied, left_out=last.left_out,
            bytes_read=sum(c.entries[n].nbytes for c in checkpoints for n in names),
            bytes_written=layout.total, dry_run=dry_run,
        )
        for output, layout, row in zip(outputs, layouts, coefficients.tolist(), strict=True)
    ]  # fmt: skip
    if dry_run:
        return reports
    stream = Stream(
        checkpoints, averaged, coefficients, dtypes, accumulate == "fp64", max_memory, chunk,
        checksums=checksums,
    )  # fmt: skip
    files = [file for c in checkpoints for file in c.files] if checksums else []
    digests = dict.fromkeys(files, _NO_DIGEST)
    with ExitStack() as stack:
        written = []
        for output, layout, note in zip(outputs, layouts, notes, strict=True):
            written.append(stack.enter_context(Output(output, layout, tied, overwrite=overwrite)))
            written[-1].open(_metadata(last, note, tied, checkpoints, digests))
        with _bar(progress, sum(r.bytes_read for r in reports[:1])) as advance:
            stream.advance = advance
            differing = _copy(checkpoints, copied, written)
            digests = stream.run(written)
        if update_bn is not None:
            for made in written:
                _refresh(made, plan, tied, *update_bn)
        for report, made, note in zip(reports, written, notes, strict=True):
            report.differing = differing
            report.sha256 = {str(file): digest for file, digest in digests.items()}
            report.peak_bytes = max(stream.peak - started, 0)
            metadata = _metadata(last, note, tied, checkpoints, digests)
            name = dtype if dtype == "keep" else str(DTYPES[dtype]).removeprefix("torch.")
            made.commit(metadata, companions_of(last.path), name)
    return reports


def _result(dtype: torch.dtype, wanted: str) -> torch.dtype:
    if wanted == "keep" or not is_numeric(dtype):
        return dtype
    if dtype.is_complex:
        return _COMPLEX.get(DTYPES[wanted], dtype)
    return DTYPES[wanted]


def _unit(dtype: torch.dtype) -> int:
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize


def _stem(path: Path) -> str:
    name = weights_name(path) if path.is_dir() else None
    stem = (name or "model").split(".", 1)[0]
    return "model" if stem == "pytorch_model" else stem.removeprefix("pytorch_")


def _metadata(
    last: Checkpoint,
    note: dict[str, Any],
    tied: dict[str, str],
    checkpoints: Sequence[Checkpoint],
    digests: dict[Path, str],
) -> dict[str, str]:
    from .. import __version__

    facts: dict[str, Any] = {
        "version": __version__,
        "torch": str(torch.__version__),
        "inputs": [str(c.path) for c in checkpoints],
        **note,
    }
    if digests:
        facts["sha256"] = {str(file): digest for file, digest in digests.items()}
    kept = {k: v for k, v in last.metadata.items() if k not in ("swa_fast", "format")}
    return {**kept, **tied, "format": "pt", "swa_fast": json.dumps(facts)}


def _copy(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], outputs: Sequence[Output]
) -> list[str]:
    """Copies tensors of the last checkpoint; gives the names of those that differ elsewhere."""
    differing = []
    piece = 1 << 20
    for name in names:
        same = True
        entry = checkpoints[-1].entries[name]
        size = entry.dtype.itemsize
        for first in range(0, entry.nbytes, piece):
            count = min(piece, entry.nbytes - first)
            own = bytearray(count)
            checkpoints[-1].read_into(name, first // size, own)
            for other in checkpoints[:-1]:
                theirs = bytearray(count)
                other.read_into(name, first // size, theirs)
                same = same and own == theirs
            for output in outputs:
                output.write(name, first, memoryview(own))
        if not same:
            differing.append(name)
    return differing


def _refresh(
    output: Output,
    plan: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    tied: dict[str, str],
    model: nn.Module,
    loader: Iterable[Any],
) -> None:
    """Estimates the BatchNorm statistics of the average and writes them over the averaged ones."""
    from .. import update_bn

    state = {name: output.read(name, dtype, shape) for name, dtype, shape in plan}
    state.update({alias: state[name] for alias, name in tied.items()})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"update_bn: the model does not fit the average: {error}") from None
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    update_bn(loader, model, device, estimator="pooled")
    changed = model.state_dict()
    for name, dtype, _ in plan:
        now = changed[name].detach().cpu().to(dtype)
        if not torch.equal(now, state[name]):
            output.write(name, 0, bytes_of(now.contiguous()))


@contextlib.contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar of bytes; gives what advances it."""
    if not shown:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="averaging") as bar:
        yield bar.update
