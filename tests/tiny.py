"""Models and data small enough to train in a second, and the scripts as modules."""

import importlib.util
import json
import random
from pathlib import Path

import pandas as pd
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

ROOT = Path(__file__).parents[1]
WORDS = "the a film is good bad dull fine this that was not very and cat dog runs sleeps".split()
CONFIG = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, **CONFIG}
FAST = ["--use_cpu", "--max_steps", "3", "--disable_tqdm", "--per_device_train_batch_size", "4"]


def load_script(name):
    """``scripts/<name>.py`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_bert(folder, **settings):
    """A BERT with random weights and a WordPiece tokenizer of a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(chr, range(97, 123))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), vocab_file=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **CONFIG, **settings)
    BertModel(config).save_pretrained(folder)
    return folder


def sentence(generator):
    """A few random words."""
    return " ".join(generator.choices(WORDS, k=generator.randint(3, 8)))


def glue_rows(texts, labels, count, seed=0):
    """Rows with random texts and labels drawn from ``labels``, each at least once."""
    generator = random.Random(seed)
    drawn = [*labels, *generator.choices(labels, k=count - len(labels))]
    return [{**{text: sentence(generator) for text in texts}, "label": label} for label in drawn]


def write_rows(path, rows):
    """Write rows in the format of the file's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def read_json(path):
    """The content of a json file."""
    return json.loads(Path(path).read_text())
