"""Texts, prompts with completions, and chats for language models, in TRL's columns and checked row by row."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

from .config import InputError
from .labels import texts
from .perplexity import ROW
from .tables import Table

logger = logging.getLogger(__name__)

CHAT_OPTIONS = ("tools", "chat_template_kwargs")


def read_text(path: Path, *, keep_linebreaks: bool = True) -> Table:
    """Read texts separated by blank lines, or one text per line if there is no blank line.

    Args:
        path: a .txt file in UTF-8.
        keep_linebreaks: keep line breaks within a text; otherwise they become spaces.

    Raises:
        InputError: it cannot be read, or holds no text.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    parts = [part.strip("\n") for part in re.split(r"\n[ \t]*\n", content)]
    parts = [part for part in parts if part.strip()]
    apart = "blank lines"
    if len(parts) == 1:
        parts, apart = [line for line in parts[0].split("\n") if line.strip()], "line breaks"
    if not parts:
        raise InputError(f"{path}: holds no text")
    logger.info(f"{path}: {len(parts)} {'texts' if len(parts) > 1 else 'text'}, separated by {apart}")
    return Table(str(path), {"text": parts if keep_linebreaks else [" ".join(part.split("\n")) for part in parts]})


def examples(table: Table, text_column: str) -> Dataset:
    """The columns to learn from, the options of chats, and the row numbers.

    Rows with a blank text or completion are dropped and counted: there is nothing to learn from them.

    Args:
        table: with prompt and completion, or messages, or ``text_column``; other columns are dropped, which is
            logged.
        text_column: the column of plain texts, which has the lowest priority.

    Raises:
        InputError: there is no known set of columns, a row has an unexpected value, or all texts are blank.
    """
    if "text" in table.columns and text_column not in table.columns and len(table.columns) == 1:
        text_column = "text"
    known = (("prompt", "completion"), ("messages",), (text_column,))
    columns = next((names for names in known if set(names) <= set(table.columns)), None)
    if columns is None:
        there = ", ".join(table.columns) or "none"
        raise InputError(
            f"{table.name}: has neither prompt and completion, nor messages, nor {text_column!r} (dataset_text_field) "
            f"among its columns: {there}"
        )
    table.require(columns)
    chats = [name for name in columns if name == "messages" or isinstance(table.columns[name][0], list)]
    for column in columns:
        if column in chats:
            _check_chats(table, column)
        else:
            texts(table, column)
    found = {column: table.columns[column] for column in columns}
    options = [name for name in CHAT_OPTIONS if chats and name in table.columns]
    found |= {name: _option(table, name) for name in options}
    unused = [name for name in table.columns if name not in found]
    if unused:
        logger.info(f"{table.name}: the columns {', '.join(map(repr, columns))} are used; {', '.join(unused)} are not")
    return _without_blanks(table, Dataset.from_dict(found | {ROW: list(range(len(table)))}), columns[-1])


def _without_blanks(table: Table, dataset: Dataset, learned: str) -> Dataset:
    """The rows whose text to learn is not blank."""
    kept = [row for row, text in enumerate(table.columns[learned]) if not isinstance(text, str) or text.strip()]
    dropped = len(dataset) - len(kept)
    if not kept:
        raise InputError(f"{table.name}: column {learned!r} is blank in all {dropped} rows")
    if not dropped:
        return dataset
    logger.warning(f"{table.name}: {dropped} of {len(dataset)} examples dropped: column {learned!r} is blank")
    return dataset.select(kept)


def refuse_mixed(train: Dataset, held_out: Dataset, names: dict[str, str]) -> None:
    """Raise InputError unless both splits hold texts, or prompts, or chats: their perplexities would not compare.

    Args:
        train: the training examples.
        held_out: the held-out examples.
        names: files or splits of "train" and "validation", for the message.
    """
    forms = [
        [
            f"{name} ({'a chat' if isinstance(dataset[0][name], list) else 'text'})"
            for name in dataset.column_names
            if name not in (*CHAT_OPTIONS, ROW)
        ]
        for dataset in (train, held_out)
    ]
    if sorted(forms[0]) != sorted(forms[1]):
        raise InputError(
            f"{names['validation']}: holds {' and '.join(forms[1])}, but {names['train']} holds "
            f"{' and '.join(forms[0])}; both splits should have the same columns"
        )


def _check_chats(table: Table, column: str) -> None:
    for row, chat in enumerate(table.columns[column]):
        wrong = None
        if not isinstance(chat, list) or not chat:
            wrong, allowed = f"{chat!r}", "a list of messages"
        else:
            messages = (m for m in chat if not isinstance(m, dict) or not isinstance(m.get("role"), str))
            if (message := next(messages, None)) is not None:
                wrong, allowed = f"the message {message!r}", "an object with role and content"
        if wrong:
            raise InputError(f"{table.name}: column {column!r} holds {wrong[:300]} in row {row}; should be {allowed}")


def _option(table: Table, name: str) -> list[Any]:
    """Tools as JSON text, since a column type would unify them; template options need the same keys in all rows."""
    values = list(table.columns[name])
    if name == "tools":
        return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    values = [value or {} for value in values]
    for row, value in enumerate(values):
        if not isinstance(value, dict) or value.keys() != values[0].keys():
            keys = ", ".join(values[0]) or "none"
            raise InputError(
                f"{table.name}: column {name!r} holds {value!r} in row {row}; should be an object with the keys of "
                f"row 0, {keys}"
            )
    return values
