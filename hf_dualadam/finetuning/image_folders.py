"""Folders of images: first-level names are splits, second-level names are classes.

Words elsewhere in a path have no meaning, for example in a file name or in a class called "freight train".
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image as PILImage

from .config import InputError
from .tables import SPLIT_NAMES

logger = logging.getLogger(__name__)

LAYOUT = "train, validation (or val, dev) and test with a folder per class in each, or a folder per class"


class FoundImages(NamedTuple):
    """The images of one split: paths, and names of their class folders (None without class folders)."""

    paths: list[str]
    classes: list[str] | None


def split_folders(folder: Path) -> dict[str, Path]:
    """The folder of each split: the first-level folders if all are named like splits, else all of it for training.

    Folders without images do not affect this choice, but a folder with the name of a split is one even if it is empty.

    Raises:
        InputError: only some of them have names of splits, or two of them mean the same split.
    """
    by_name = {name: split for split, names in SPLIT_NAMES.items() for name in names}
    inside = [path for path in _folders(folder) if any(_is_image(file) for file in _files(path))]
    named = [path for path in inside if path.name in by_name]
    if not named:
        return {"train": folder}
    others = [path.name for path in inside if path not in named]
    if others:
        raise InputError(
            f"{folder}: {named[0].name!r} may be a split or a class: {others[0]!r} is not a split; needed: "
            f"{LAYOUT}; or name the folder of each split with train_dir, validation_dir and test_dir"
        )
    found: dict[str, Path] = {}
    for path in (path for path in _folders(folder) if path.name in by_name):
        if (other := found.setdefault(by_name[path.name], path)) != path:
            raise InputError(f"{folder}: {other.name!r} and {path.name!r} both mean {by_name[path.name]}; keep one")
    loose = next((path for path in folder.iterdir() if _is_image(path)), None)
    if loose is not None:
        raise InputError(f"{loose}: is next to the folders of the splits; needed: {LAYOUT}")
    return found


def read_split_folder(folder: Path, *, labeled: bool) -> FoundImages:
    """The images of one split; other files, dead links and class folders without images are skipped, which is logged.

    Args:
        folder: with a folder per class, or with images to predict.
        labeled: whether class folders are needed.

    Raises:
        InputError: there is no image, an image is outside the class folders or below them, or there is one class only.
    """
    skipped: Counter[str] = Counter()
    loose = [path for path in _sorted_files(folder, skipped) if _count(path, skipped)]
    inside = {
        path.name: [file for file in _files(path, skipped, {folder.resolve()}) if _count(file, skipped)]
        for path in _folders(folder, skipped)
    }
    found = {name: paths for name, paths in inside.items() if paths}
    for name, paths in found.items():
        deeper = next((path for path in paths if path.parent != folder / name), None)
        if deeper is not None:
            raise InputError(f"{deeper}: is deeper than the folder of class {name!r}; needed: {LAYOUT}")
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common(8))
        logger.warning(f"{folder}: skipped {skipped.total()} files that Pillow cannot read as images: {kinds}")
    if found and (empty := [repr(name) for name, paths in inside.items() if not paths]):
        names = ", ".join(empty[:8]) + (", ..." if len(empty) > 8 else "")
        logger.warning(f"{folder}: skipped {len(empty)} folders without images: {names}")
    if loose and found:
        raise InputError(f"{loose[0]}: is next to the class folders ({', '.join(list(found)[:3])}, ...)")
    if loose and not labeled:
        return FoundImages([_text(path) for path in loose], None)
    if loose:
        raise InputError(f"{loose[0]}: is not in a class folder; needed: {LAYOUT}")
    if not found:
        raise InputError(f"{folder}: holds no images; needed: {LAYOUT}")
    if labeled and len(found) < 2:
        raise InputError(f"{folder}: holds only one class folder, {next(iter(found))!r}; at least 2 are needed")
    pairs = [(_text(path), name) for name, paths in found.items() for path in paths]
    return FoundImages([path for path, _ in pairs], [name for _, name in pairs])


def refuse_shared(splits: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError if a training image is also in another split, under a link or in the same folder.

    Args:
        splits: the paths of the images of each split.
    """
    trained = {_identity(path): path for path in splits.get("train", ())}
    for split, paths in splits.items():
        if split == "train":
            continue
        if (path := next((path for path in paths if _identity(path) in trained), None)) is not None:
            raise InputError(f"{path}: the {split} image is also a training image, {trained[_identity(path)]}")


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _text(path: Path) -> str:
    """The absolute path, which must be valid text: file systems allow names that cannot be decoded."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{str(path)!a}: the name is not UTF-8; rename it") from None
    if "::" in str(path.absolute()):
        raise InputError(f"{path}: datasets interprets '::' in a path as a chain of files; rename the folder")
    return str(path.absolute())


def _folders(folder: Path, skipped: Counter[str] | None = None) -> list[Path]:
    """The subfolders in order; hidden ones are skipped, and their files are counted."""
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    if skipped is not None:
        skipped["in hidden folders"] += sum(1 for path in found if _is_hidden(path) for _ in _files(path))
        skipped += Counter()  # without zeros
    return [path for path in found if not _is_hidden(path)]


def _sorted_files(folder: Path, skipped: Counter[str] | None = None) -> list[Path]:
    """The files of the folder in order; dead links are counted."""
    if skipped is not None and (dead := sum(not path.exists() for path in folder.iterdir())):
        skipped["dead links"] += dead
    return sorted(path for path in folder.iterdir() if path.is_file())


def _files(folder: Path, skipped: Counter[str] | None = None, read: set[Path] | None = None) -> Iterator[Path]:
    """All files in the folder and below, in order; links are followed, except to the folders in ``read``."""
    yield from _sorted_files(folder, skipped)
    read = set() if read is None else read
    read.add(folder.resolve())
    for inside in sorted(path for path in folder.iterdir() if path.is_dir()):
        if inside.resolve() not in read:
            yield from _files(inside, skipped, read)
        elif skipped is not None:
            skipped["links to a folder that is read already"] += 1


def _count(path: Path, skipped: Counter[str]) -> bool:
    """Whether a file is an image; if not, count it by its extension."""
    if not _is_image(path):
        skipped["hidden" if _is_hidden(path) else path.suffix.lower() or "without an extension"] += 1
        return False
    return True


def _is_hidden(path: Path) -> bool:
    return path.name.startswith((".", "__MACOSX"))


def _is_image(path: Path) -> bool:
    if _is_hidden(path) or not path.is_file():
        return False
    return PILImage.registered_extensions().get(path.suffix.lower()) in PILImage.OPEN
