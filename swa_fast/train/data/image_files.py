"""Image files: which there are of each class, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TrainError, import_extra

__all__ = ["Listing", "check_same_classes", "list_images", "read_rgb"]


@dataclass(frozen=True)
class Listing:
    """Image files by class, in sorted order, and the number of other files."""

    files: dict[str, list[Path]]
    skipped: int


def list_images(folder: Path) -> Listing:
    """Image files below each class folder.

    Files and folders whose name begins with a dot are ignored. Files are images if their extension
    is one that Pillow reads; others are skipped and counted.

    Raises:
        TrainError: the folder is missing or has no class folder, a class has no image, or Pillow is
            not installed.
    """
    image_module = import_extra("PIL.Image")
    extensions = {
        extension
        for extension, name in image_module.registered_extensions().items()
        if name in image_module.OPEN
    }
    if not folder.is_dir():
        raise TrainError(f"{folder}: expected a folder with one folder per class, found none")
    files: dict[str, list[Path]] = {}
    skipped = 0
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            skipped += 1
            continue
        paths = []
        for where, subfolders, names in os.walk(entry):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(names):
                if name.startswith("."):
                    continue
                path = Path(where, name)
                if path.suffix.lower() in extensions:
                    paths.append(path)
                else:
                    skipped += 1
        if not paths:
            raise TrainError(f"{entry}: expected images of the class {entry.name!r}, found none")
        files[entry.name] = paths
    if not files:
        raise TrainError(f"{folder}: expected one folder per class, found none")
    return Listing(files, skipped)


def check_same_classes(root: Path, classes: Mapping[str, Collection[str]]) -> None:
    """Raises TrainError where the two parts of a dataset in ``root`` have other classes than each
    other; the message names those that only one part has."""
    first, second = classes
    differing = [
        f"only in {part}: {', '.join(names)}"
        for part, other in ((first, second), (second, first))
        if (names := sorted(set(classes[part]) - set(classes[other])))
    ]
    if differing:
        raise TrainError(
            f"{root}: expected the same classes in {first} and {second}; {'; '.join(differing)}"
        )


def read_rgb(path: Path) -> Any:
    """The image in a file, as Pillow's in mode RGB.

    Raises:
        TrainError: the file cannot be decoded or has more than 8 bits a channel, or Pillow is not
            installed.
    """
    image_module = import_extra("PIL.Image")
    try:
        with image_module.open(path) as image:
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
