"""Image files: which there are of each class, and what is in them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainError, import_extra
from ..files import open_regular

#: Pillow's names of the formats that are read. Pillow decides by the content of a file, and for
#: others (EPS) runs other programs on it.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


@dataclass
class Listing:
    """The image files below class folders in sorted order, their labels (positions in ``classes``,
    int64), and the number of other files."""

    classes: tuple[str, ...]
    files: list[str]
    labels: Tensor
    skipped: int


def list_images(root: Path, first: str, second: str) -> tuple[Listing, Listing]:
    """What is below the class folders of two parts of a dataset.

    Files and folders whose name begins with a dot are ignored. Files are images if their extension
    is one of :data:`FORMATS`; others are skipped and counted.

    Raises:
        TrainError: a part is missing or has no class folder, a class has no image, the parts have
            other classes than each other, or Pillow is not installed.
    """
    found = {part: _list(root / part) for part in (first, second)}
    differing = [
        f"only in {part}: {', '.join(names)}"
        for part, other in ((first, second), (second, first))
        if (names := sorted(set(found[part].classes) - set(found[other].classes)))
    ]
    if differing:
        raise TrainError(
            f"{root}: expected the same classes in {first} and {second}; {'; '.join(differing)}"
        )
    return found[first], found[second]


def _list(folder: Path) -> Listing:
    image_module = import_extra("PIL.Image")
    names = image_module.registered_extensions().items()
    extensions = {extension for extension, name in names if name in FORMATS}
    if not folder.is_dir():
        raise TrainError(f"{folder}: expected a folder with one folder per class, found none")
    classes: list[str] = []
    files: list[str] = []
    skipped = 0
    labels: list[int] = []
    for entry in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if not entry.is_dir():
            skipped += 1
            continue
        before = len(files)
        for where, subfolders, inside in os.walk(entry):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            shown = sorted(name for name in inside if not name.startswith("."))
            images = [name for name in shown if os.path.splitext(name)[1].lower() in extensions]
            # Not by way of Path, which takes ten seconds for the files of ImageNet.
            files += [os.path.join(where, name) for name in images]
            skipped += len(shown) - len(images)
        if len(files) == before:
            raise TrainError(f"{entry}: expected images of the class {entry.name!r}, found none")
        labels += [len(classes)] * (len(files) - before)
        classes.append(entry.name)
    if not classes:
        raise TrainError(f"{folder}: expected one folder per class, found none")
    return Listing(tuple(classes), files, torch.tensor(labels), skipped)


def read_rgb(path: str | Path) -> Any:
    """The image in a file, as Pillow's in mode RGB.

    Raises:
        TrainError: the file is no regular one or of none of :data:`FORMATS`, cannot be decoded or
            has more than 8 bits a channel, or Pillow is not installed.
    """
    image_module = import_extra("PIL.Image")
    try:
        with open_regular(path) as file, image_module.open(file, formats=FORMATS) as image:
            image.load()
            if image.mode.startswith(("I", "F")):
                raise TrainError(
                    f"{path}: expected 8 bits per channel, found Pillow mode {image.mode}"
                )
            if image.mode in ("P", "PA"):
                # By way of RGBA: Pillow warns of palettes with transparency otherwise.
                image = image.convert("RGBA")
            return image.convert("RGB")
    # Pillow's decoders raise SyntaxError, ValueError or struct.error on some broken files.
    except TrainError:
        raise
    except Exception as error:
        raise TrainError(f"{path}: expected a readable image, found: {error}") from error
