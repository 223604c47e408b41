"""Texts, chats and prompts are joined, cut and dropped as documented, or refused with file, row and reason."""

import json
import logging
import re

import pytest
import torch
from tiny import FAST, load_script, read_json, write_rows

pytest.importorskip("trl", reason="the extra [clm] is not installed")
pytest.importorskip("peft", reason="the extra [clm] is not installed")

from hf_dualadam.finetuning import clm, clm_examples, generation, tasks  # noqa: E402
from hf_dualadam.finetuning.config import InputError, parse  # noqa: E402
from hf_dualadam.finetuning.tables import Table  # noqa: E402
from hf_dualadam.finetuning.training import make_trainer  # noqa: E402

MODEL = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
MODEL |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TEMPLATE = (
    "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}"
    "{% if tools %}tools {{ tools | length }} {% endif %}{% if mood %}mood {{ mood }} {% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content if m.content is string else 'parts' }}\n{% endfor %}"
)
script = load_script("run_clm")


def chat(*contents):
    return [{"role": ["user", "assistant"][i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte tokenizer with a chat template, in a folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    new = clm.train_tokenizer(["a few words to learn from"], 258)
    new.chat_template = TEMPLATE
    new.save_pretrained(folder)
    return str(folder)


def trainer_of(tmp_path, tokenizer, rows, held_out=None, *options, ending="jsonl"):
    """The trainer for a command line, ready for its first step."""
    files = {}
    for split, content in (("train", rows), ("validation", held_out)):
        if content is not None:
            path = tmp_path / f"{split}.{ending}"
            if isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            else:
                write_rows(path, content)
            files[split] = str(path)
    argv = [part for split, path in files.items() for part in (f"--{split}_file", path)]
    argv += ["--model_config", json.dumps(MODEL), "--tokenizer_name", tokenizer, *FAST, *options]
    kind = tasks.task_kind("clm")
    *own, args = parse((*kind.argument_classes, kind.training_arguments), argv, defaults=script.defaults)
    args.output_dir = str(tmp_path / "out")
    task = kind.build(*own, training_args=args, splits=["train", "validation"])
    torch.manual_seed(0)
    return make_trainer(task, args, task.build_model())


def test_texts_are_joined_into_blocks(tmp_path, tokenizer, caplog):
    rows = [{"text": "word " * 40} for _ in range(10)]  # 200 bytes each, more than the model's 64 positions
    with caplog.at_level(logging.INFO, "hf_dualadam"):
        trainer = trainer_of(tmp_path, tokenizer, rows, rows[:2])
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert set(lengths[:-1]) == {64} and sum(lengths) == 10 * 201
    assert "max_length: 64, the maximum of the model and its tokenizer" in caplog.text
    assert "100.0% of the tokens are used, in 32 blocks of 64 tokens" in caplog.text


@pytest.mark.parametrize(
    ("options", "blocks", "length"),
    [
        (["--block_size", "32"], True, 32),
        (["--block_size", "1000"], True, 64),
        (["--max_length", "16"], True, 16),
        (["--packing", "--packing_strategy", "wrapped", "--max_length", "16"], True, 16),
        (["--packing", "false"], False, 64),
        (["--join_texts", "false", "--max_length", "16"], False, 16),
        (["--packing", "false", "--max_length", "1000"], False, 64),
    ],
)
def test_length_is_capped_by_the_model_and_texts_may_stay_apart(tmp_path, tokenizer, caplog, options, blocks, length):
    with caplog.at_level(logging.INFO, "hf_dualadam"):
        trainer = trainer_of(tmp_path, tokenizer, [{"text": "x" * 100}] * 9, [{"text": "x" * 100}], *options)
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert max(lengths) == length and (len(lengths) == 9) == (not blocks)
    if not blocks:
        assert f"{length / 100:.1%} of the tokens are used, within max_length={length}" in caplog.text


def test_examples_without_targets_are_dropped_and_said(tmp_path, tokenizer, caplog):
    pairs = [{"prompt": "p" * length, "completion": " yes"} for length in (5, 90, 80, 6, 70, 7)]
    trainer = trainer_of(tmp_path, tokenizer, pairs, pairs)
    assert trainer.train_dataset["row"][:] == [0, 3, 5] == trainer.kept
    assert caplog.text.count("3 of 6 examples dropped") == 2


@pytest.mark.parametrize("options", [["--packing", "false"], ["--block_size", "2"]])
def test_rows_without_a_target_are_left_out(tmp_path, tokenizer, options):
    trainer = trainer_of(
        tmp_path, tokenizer, [{"text": text} for text in ("", "ab", "", "c")], [{"text": "ab"}], *options
    )
    assert all(len(ids) > 1 for ids in trainer.train_dataset["input_ids"])


@pytest.mark.parametrize("column", ["text", "completion"])
def test_blank_texts_are_dropped_and_counted(column, caplog):
    rows = [" ", "ab", "", "\n\t", "c"]
    table = Table("train.jsonl", ({"prompt": ["p"] * 5} if column == "completion" else {}) | {column: rows})
    kept = clm_examples.examples(table, "text")
    assert kept[column][:] == ["ab", "c"] and kept["row"][:] == [1, 4]
    assert f"train.jsonl: 3 of 5 examples dropped: column '{column}' is blank" in caplog.text
    table.columns[column][:] = [" "] * 5
    with pytest.raises(InputError, match=f"train.jsonl: column '{column}' is blank in all 5 rows"):
        clm_examples.examples(table, "text")


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ({"text": "ab"}, {"prompt": "a", "completion": "b"}),
        ({"prompt": "a", "completion": "b"}, {"text": "ab"}),
        ({"messages": chat("a", "b")}, {"text": "ab"}),
        ({"prompt": chat("a"), "completion": chat("b")}, {"prompt": "a", "completion": "b"}),
    ],
)
def test_both_splits_hold_the_same_kind_of_examples(tmp_path, tokenizer, train, held_out):
    with pytest.raises(InputError, match=r"validation.jsonl: holds .* but .*train.jsonl holds .* the same columns"):
        trainer_of(tmp_path, tokenizer, [train] * 2, [held_out] * 2)


@pytest.mark.parametrize("options", [[], ["--packing", "false"]])
@pytest.mark.parametrize("text", ["a", "abc " * 30])
def test_at_most_all_tokens_are_used(tmp_path, tokenizer, caplog, options, text):
    with caplog.at_level(logging.INFO, "hf_dualadam"):
        trainer_of(tmp_path, tokenizer, [{"text": text}] * 50, [{"text": text}] * 50, *options)
    shares = [float(share) for share in re.findall(r"([0-9.]+)% of the tokens", caplog.text)]
    assert all(0 < share <= 100 for share in shares)
    assert bool(shares) == (not options or len(text) > 64)


@pytest.mark.parametrize("long", ["train", "validation"])
def test_nothing_to_learn_is_refused_before_training(tmp_path, tokenizer, long):
    good, bad = ([{"prompt": "p" * n, "completion": " yes"}] * 3 for n in (5, 90))
    splits = (bad, good) if long == "train" else (good, bad)
    with pytest.raises(InputError, match=rf"{long}.jsonl: no example is left: within max_length=64 .*row 0"):
        trainer_of(tmp_path, tokenizer, *splits)


def test_counts_are_those_of_what_is_left_and_old_runs_stay(tmp_path, tokenizer):
    pairs = [{"prompt": "p" * n, "completion": " yes"} for n in (5, 90, 6, 7)]
    path = str(write_rows(tmp_path / "a.jsonl", pairs))
    long = str(write_rows(tmp_path / "long.jsonl", pairs[1:2]))
    argv = ["--train_file", path, "--model_config", json.dumps(MODEL), "--tokenizer_name", tokenizer, *FAST]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_new_tokens", "2"]
    metrics = script.main([*argv, "--validation_file", path]).metrics
    assert (metrics["train_samples"], metrics["eval_samples"], metrics["train_eval_samples"]) == (3, 3, 3)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}
    with pytest.raises(InputError, match="long.jsonl: no example is left"):
        script.main([*argv, "--validation_file", long, "--overwrite_output_dir"])
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"messages": chat("a", "b")}, {"messages": []}],
            r"column 'messages' holds \[\] in row 1; should be a list of messages",
        ),
        (
            [{"messages": None}, {"messages": chat("a", "b")}],
            "column 'messages' holds None in row 0; should be a list",
        ),
        (
            [{"messages": chat("a", "b")}, {"messages": ["hello"]}],
            "the message 'hello' in row 1; should be an object with role",
        ),
        ([{"messages": [{"content": "x"}]}], "in row 0; should be an object with role and content"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}], "'prompt' holds None in row 1"),
        (
            [{"prompt": chat("a"), "completion": chat("b")}, {"prompt": "a", "completion": "b"}],
            "'a' in row 1; should be a list",
        ),
        ([{"text": "a"}, {"text": 3}], "'text' holds 3 in row 1"),
        ([{"body": "a"}], "neither prompt and completion"),
    ],
)
def test_rows_that_are_something_else_are_named(rows, message):
    table = Table("train.jsonl", {name: [row.get(name) for row in rows] for name in rows[0]})
    with pytest.raises(InputError, match=message) as caught:
        clm_examples.examples(table, "text")
    assert "train.jsonl" in str(caught.value)


def test_a_chat_that_the_template_refuses_is_named(tmp_path, tokenizer):
    rows = [{"prompt": chat("a"), "completion": chat("b")}] * 2 + [{"prompt": [], "completion": chat("b")}]
    with pytest.raises(InputError, match=r"column 'prompt' holds \[\] in row 2"):
        trainer_of(tmp_path, tokenizer, rows)


def test_tools_and_options_of_the_template_are_handed_on(tmp_path, tokenizer, caplog):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "int"}}}}]
    options = {"chat_template_kwargs": {"mood": "good"}}
    rows = [{"messages": chat("a", "b"), "tools": tools, "source": 1} | options] * 2
    rows.append({"messages": chat("c", "d"), "tools": None, "source": 2} | options)
    with caplog.at_level(logging.INFO, "hf_dualadam"):
        trainer = trainer_of(tmp_path, tokenizer, rows, rows[:1])
    texts = [trainer.processing_class.decode(ids) for ids in trainer.train_dataset["input_ids"]]
    assert texts[0].startswith("tools 1 mood good user: a") and texts[2].startswith("mood good user: c")
    assert "source are not" in caplog.text


def test_tools_keep_their_shape():
    tools = [[{"name": "f", "parameters": {"x": 1}}], [{"name": "g"}], None, '[{"name": "h"}]']
    table = Table("t", {"messages": [chat("a", "b")] * 4, "tools": tools})
    kept = clm_examples.examples(table, "text")["tools"][:]
    assert [value and json.loads(value) for value in kept] == [*tools[:3], [{"name": "h"}]]


def test_options_of_the_template_have_the_same_keys_in_all_rows():
    table = Table("t", {"messages": [chat("a", "b")] * 2, "chat_template_kwargs": [{"mood": "good"}, {}]})
    with pytest.raises(InputError, match="holds {} in row 1; should be an object with the keys of row 0, mood"):
        clm_examples.examples(table, "text")


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("a\nb\n\nc\n", ["a\nb", "c"]),
        ("a\nb\n \t\nc", ["a\nb", "c"]),
        ("\ufeffa\nb\nc\n", ["a", "b", "c"]),
        ("\n\n  a\n\n", ["  a"]),
        ("a\r\nb\r\n\r\nc", ["a\nb", "c"]),
    ],
)
def test_text_files_hold_paragraphs_or_lines(tmp_path, content, texts):
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert clm_examples.read_text(tmp_path / "a.txt").columns["text"] == texts
    flat = clm_examples.read_text(tmp_path / "a.txt", keep_linebreaks=False).columns["text"]
    assert flat == [text.replace("\n", " ") for text in texts]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_text_files_without_text_are_named(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match="a.txt: "):
        clm_examples.read_text(tmp_path / "a.txt")


def test_blocks_are_for_plain_texts(tmp_path, tokenizer):
    with pytest.raises(InputError, match="block_size: allowed only for plain texts"):
        trainer_of(tmp_path, tokenizer, [{"prompt": "a", "completion": "b"}] * 3, None, "--block_size", "8")
    with pytest.raises(InputError, match="block_size: allowed only for plain texts that are joined"):
        trainer_of(tmp_path, tokenizer, [{"text": "a"}] * 3, None, "--block_size", "8", "--packing", "false")


def test_micro_batches_give_the_loss_and_gradient_of_the_whole(tmp_path, tokenizer):
    rows = [{"text": "x" * (5 + 6 * n)} for n in range(8)]
    logs = []
    for per_device, accumulation in ((8, 1), (2, 4), (3, 3)):
        options = ["--packing", "false", "--max_steps", "1", "--logging_steps", "1", "--max_grad_norm", "0.5"]
        options += [
            "--per_device_train_batch_size",
            str(per_device),
            "--gradient_accumulation_steps",
            str(accumulation),
        ]
        trainer = trainer_of(tmp_path, tokenizer, rows, rows[:1], *options, "--eval_strategy", "no")
        trainer.train()
        logs.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    for name in ("loss", "grad_norm", "inverse_share"):
        assert [log[name] for log in logs] == pytest.approx([logs[0][name]] * 3, rel=1e-3), name


def test_new_models_hold_all_tokens(tmp_path, tokenizer):
    options = ["--model_config", json.dumps(MODEL | {"vocab_size": 100})]
    with pytest.raises(InputError, match="the tokenizer has 258 tokens, but the model only 100"):
        trainer_of(tmp_path, tokenizer, [{"text": "a"}] * 3, None, *options)


def test_language_models_do_not_predict(tmp_path, tokenizer):
    write_rows(tmp_path / "a.jsonl", [{"text": "a b c"}] * 3)
    argv = ["--train_file", str(tmp_path / "a.jsonl"), "--model_config", json.dumps(MODEL), "--do_predict"]
    with pytest.raises(InputError, match="do_predict: not for .* generation_prompts"):
        script.main([*argv, "--tokenizer_name", tokenizer, "--output_dir", str(tmp_path / "out")])


def test_samples_that_cannot_be_shown_are_skipped_and_said(tmp_path, tokenizer, caplog, capsys):
    rows = [
        {"messages": chat("hello", "there")},
        {"messages": chat("only one")},
        {"messages": [*chat("with null"), {"role": "assistant", "content": None}]},
        {"messages": [*chat("in parts"), {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]},
    ]
    rows = [{"messages": row["messages"]} for row in rows]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    argv = ["--train_file", str(path), "--validation_file", str(path), "--model_config", json.dumps(MODEL)]
    argv += ["--tokenizer_name", tokenizer, *FAST, "--max_new_tokens", "2", "--generation_samples", "4"]
    script.main([*argv, "--output_dir", str(tmp_path / "out")])
    samples = read_json(tmp_path / "out" / "generation_results.json")
    assert [sample["reference"] for sample in samples] == ["there", ""]
    assert "1 of 3 samples are skipped: an empty prompt" in caplog.text
    assert "loss " in capsys.readouterr().out
    tokenized = clm.AutoTokenizer.from_pretrained(tokenizer)
    assert generation.prompt_and_reference(rows[3], tokenized)["reference"] == "x"


def test_a_failing_sample_generator_does_not_fail_the_run(tmp_path, tokenizer, monkeypatch, caplog):
    write_rows(tmp_path / "a.jsonl", [{"text": "some text to learn"}] * 4)
    monkeypatch.setitem(script.main.__globals__, "generate_samples", lambda *args, **kwargs: 1 / 0)
    argv = ["--train_file", str(tmp_path / "a.jsonl"), "--model_config", json.dumps(MODEL)]
    finished = script.main([*argv, "--tokenizer_name", tokenizer, *FAST, "--output_dir", str(tmp_path / "out")])
    assert "samples: skipped: ZeroDivisionError" in caplog.text and finished.metrics["eval_perplexity"] > 1
