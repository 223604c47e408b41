"""Read texts, class labels and scores from the columns of a table; exact matches of names come first."""

import logging
import math
import numbers
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .config import InputError
from .tables import Table

logger = logging.getLogger(__name__)

UNLABELED = -1
WHOLE = re.compile(r"0|[1-9][0-9]*")
STARTS_AS_NUMBER = re.compile(r"\s*[+-]?[0-9]")
DECIMAL_COMMA = re.compile(r"[+-]?[0-9]*,[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def infer_classes(table: Table, column: str) -> list[str] | None:
    """Infer the class names from the values of a label column; None if they are scores.

    Whole numbers from 0 on are classes, in numerical order. Numbers with fractions, or stored as floats, are scores.
    Other texts are class names, in alphabetical order. No class is created for a number that does not occur, and two
    names that differ only in case are two classes.

    Raises:
        InputError: the column is missing, or holds gaps, values of several kinds, numbers with a decimal comma, names
            that look the same, or one class only.
    """
    table.require([column])
    values = list(table.columns[column])
    kinds = [_kind(value) for value in values]
    _refuse_decimal_commas(table, column, values, kinds)
    if "number" in kinds:
        if "text" in kinds:
            named = [None if found == "text" else found for found in kinds]
            raise InputError(
                _unexpected(table, column, values, named, "numbers only, as in other rows, or names only")
            )
        return None  # `scores` checks that all of them are numbers
    if {"text", "digits"} & set(kinds) and all(isinstance(value, str) for value in values):
        kinds = ["text" if found in ("whole", "digits") else found for found in kinds]
    kind = next((found for found in kinds if found in ("whole", "text", "truth")), None)
    named = [found if found == kind else None for found in kinds]
    if None in named:
        raise InputError(_unexpected(table, column, values, named, "class names, or whole numbers from 0 on"))
    if kind == "whole":
        names = [str(number) for number in sorted({int(value) for value in values})]
    elif kind == "truth":
        names = sorted({str(value) for value in values})
    else:
        names = _text_classes(table, column, values)
    if len(names) < 2:
        raise InputError(f"{table.name}: column {column!r} holds only one class, {values[0]!r}")
    return names


def _refuse_decimal_commas(table: Table, column: str, values: list, kinds: list[str]) -> None:
    """Refuse numbers such as 0,5, which would become class names."""
    commas = [isinstance(value, str) and bool(DECIMAL_COMMA.fullmatch(value.strip())) for value in values]
    others = {kind for kind, comma in zip(kinds, commas, strict=True) if not comma}
    if any(commas) and others <= {"number", "whole", "digits", "unlabeled"}:
        found = [None if comma else kind for kind, comma in zip(kinds, commas, strict=True)]
        raise InputError(
            _unexpected(table, column, values, found, "numbers with a point, such as 0.5, or class names")
        )


def _text_classes(table: Table, column: str, values: list[str]) -> list[str]:
    refuse_lookalikes(f"{table.name}: column {column!r}", values)
    names = sorted({value.strip() for value in values})
    same = [name for name, count in Counter(map(_key, names)).items() if count > 1]
    if same:
        variants = [name for name in names if _key(name) == same[0]]
        logger.warning(
            f"{table.name}: column {column!r}: {' and '.join(map(repr, variants))} are different classes, although "
            "they differ only in case"
        )
    return names


def refuse_lookalikes(where: str, names: Iterable[str]) -> None:
    """Raise InputError if two class names differ only in blanks, invisible characters or Unicode's form of a letter.

    Args:
        where: file and column, or folder, for the message.
        names: the class names, each any number of times.
    """
    spellings: dict[str, set[str]] = {}
    for name in set(names):
        spellings.setdefault(_visible(name), set()).add(name)
    variants = next((sorted(found) for found in spellings.values() if len(found) > 1), None)
    if variants:
        raise InputError(
            f"{where} holds {' and '.join(map(ascii, variants))}, which differ only in blanks, invisible characters "
            "or the Unicode form of a letter; spell each class in one way"
        )


def listed(names: Sequence[str], most: int = 20) -> str:
    """The first class names, separated by commas."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _kind(value: Any) -> str:
    if (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and value != value)
    ):
        return "gap"
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, str):
        text = value.strip()
        if WHOLE.fullmatch(text):
            return "whole"
        if text == str(UNLABELED):
            return "unlabeled"
        if not NUMBER.fullmatch(text):
            return "text"
        return "number" if set(text) & set(".eE") else "digits"  # such as 01 and -2
    if isinstance(value, numbers.Integral):
        return "whole" if value >= 0 else "unlabeled" if value == UNLABELED else "other"
    return "number" if isinstance(value, numbers.Real) else "other"


def texts(table: Table, column: str) -> list[str]:
    """The values of a text column; InputError if one of them is not text."""
    for row, value in enumerate(table.columns[column]):
        if not isinstance(value, str):
            raise InputError(f"{table.name}: column {column!r} holds {value!r} in row {row}; should be text")
    return list(table.columns[column])


def holds_numbers(values: Sequence[Any]) -> bool:
    """Whether every value is a number or text that can be parsed as one."""
    return all(_number(value) is not None for value in values)


def class_labels(
    table: Table, column: str, names: Sequence[str], *, optional: bool = False, numbered: bool = False
) -> list[int] | None:
    """Read class indices from a column of class names or whole numbers.

    A name is looked up exactly, then ignoring invisible characters and surrounding blanks, then ignoring case, where
    only one class matches. Numbers are looked up as names if the class names are numbers. Otherwise a number stored as
    a whole number is an index; text is one only for classes with published numbers, or without names of their own.

    Args:
        table: the split.
        column: its label column.
        names: class names by index.
        optional: return None if the column is missing or holds only -1 and gaps, as in examples to predict.
        numbered: whether the classes have published numbers, as in GLUE.

    Raises:
        InputError: a value is something else; the message names file, column, row, value and what is allowed.
    """
    values = list(table.columns.get(column, ()))
    lookup = _Lookup(names, numbered)
    stored = table.class_names.get(column, [])
    known = [lookup.by_name(name) for name in stored]
    if any(index is not None for index in known) and None in known:
        raise InputError(_unknown_class(table, column, stored[known.index(None)], names))
    if stored and None not in known:
        values = [stored[value] if isinstance(value, int) and 0 <= value < len(stored) else value for value in values]
    if optional and all(_is_gap(value) for value in values):
        return None
    if stored and None in known and not lookup.text_indices:
        raise InputError(_unknown_class(table, column, stored[0], names))
    indices = [lookup(value) for value in values]
    if None in indices:
        whole = any(isinstance(value, numbers.Integral) for value in values)
        indexed = lookup.text_indices or (whole and lookup.indices)
        allowed = f"0 to {len(names) - 1} or " if indexed else ""
        raise InputError(_unexpected(table, column, values, indices, allowed + listed(names)))
    return indices


def _unknown_class(table: Table, column: str, name: str, names: Sequence[str]) -> str:
    return f"{table.name}: column {column!r} has the class {name!r}; allowed: {listed(names)}"


class _Lookup:
    """Maps class names to indices without confusing classes."""

    def __init__(self, names: Sequence[str], numbered: bool = False):
        self.exact = {name: index for index, name in enumerate(names)}
        self.visible = _unique(names, _visible)
        self.loose = _unique(names, _key)
        self.count = len(names)
        # Models without class names call them LABEL_0, LABEL_1, ...
        self.text_indices = numbered or list(names) == [f"LABEL_{index}" for index in range(len(names))]
        # Next to names such as 01 or 1st, a number may mean one of them.
        self.indices = self.text_indices or not any(STARTS_AS_NUMBER.match(name) for name in names)

    def by_name(self, text: str) -> int | None:
        for table, key in ((self.exact, text), (self.visible, _visible(text)), (self.loose, _key(text))):
            if key in table:
                return table[key]
        return None

    def __call__(self, value: Any) -> int | None:
        """The index, or None."""
        if isinstance(value, bool):
            return self.by_name(str(value))
        if not isinstance(value, str | numbers.Integral):
            return None
        text = str(value).strip()
        if (index := self.by_name(str(value))) is not None:
            return index
        may_be_index = self.text_indices if isinstance(value, str) else self.indices
        return int(text) if may_be_index and WHOLE.fullmatch(text) and int(text) < self.count else None


def _unique(names: Sequence[str], key: Callable[[str], str]) -> dict[str, int]:
    counts = Counter(map(key, names))
    return {key(name): index for index, name in enumerate(names) if counts[key(name)] == 1}


def scores(table: Table, column: str, low: float, high: float, *, optional: bool = False) -> list[float] | None:
    """Read numbers between ``low`` and ``high`` from a column; ``optional`` as in :func:`class_labels`."""
    values = list(table.columns.get(column, ()))
    if optional and all(_is_gap(value) for value in values):
        return None
    parsed = [_number(value) for value in values]
    parsed = [value if value is not None and low <= value <= high else None for value in parsed]
    if None in parsed:
        allowed = "numbers" if math.isinf(high) else f"numbers from {low:g} to {high:g}"
        raise InputError(_unexpected(table, column, values, parsed, allowed))
    return parsed


def _unexpected(table: Table, column: str, values: list, parsed: list, allowed: str) -> str:
    bad = [row for row, value in enumerate(parsed) if value is None]
    more = f" ({len(bad)} rows hold such values)" if len(bad) > 1 else ""
    return (
        f"{table.name}: column {column!r} holds the unexpected value {values[bad[0]]!r} in row {bad[0]}{more}; "
        f"allowed: {allowed}"
    )


def _visible(name: str) -> str:
    """The name without surrounding blanks and invisible format characters, with composed letters."""
    shown = "".join(char for char in name if unicodedata.category(char) != "Cf")
    return unicodedata.normalize("NFC", shown).strip()


def _key(name: str) -> str:
    return _visible(name).lower()


def _is_gap(value: Any) -> bool:
    return _kind(value) in ("gap", "unlabeled") or _number(value) == UNLABELED


def _number(value: Any) -> float | None:
    """The value as a finite number, if it is one or text that can be parsed as one; else None."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        return None
    if isinstance(value, str) and not NUMBER.fullmatch(value.strip()):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
