"""The examples in docs/programs.md run as printed if their packages are installed; so does TRL's command line."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import LAUNCHER, run
from tiny import CONFIG, save_bert
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- needs (.+?) -->\n```python\n(.*?)```", re.DOTALL)
EXAMPLES = BLOCK.findall((ROOT / "docs" / "programs.md").read_text())


def _importable(name):
    if importlib.util.find_spec(name) is None:
        return False
    # Some machines have timm, but no torchvision that can be imported.
    return name != "timm" or subprocess.run([sys.executable, "-c", "import timm"], capture_output=True).returncode == 0


def test_the_page_has_an_example_of_each():
    assert [needs.split()[0] for needs, _ in EXAMPLES] == ["timm", "lightning", "skorch", "setfit"]


@pytest.mark.parametrize(("needs", "code"), EXAMPLES, ids=[needs.split()[0] for needs, _ in EXAMPLES])
def test_example_runs_as_printed(needs, code, tmp_path):
    for name in needs.split():
        if not _importable(name):
            pytest.skip(f"{name} is not installed")
    (tmp_path / "example.py").write_text(code)
    result = run([sys.executable, "example.py"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_trls_command_line_trains_with_the_optimizer(tmp_path):
    pytest.importorskip("trl")
    save_bert(tmp_path / "llm")  # for its tokenizer
    LlamaForCausalLM(LlamaConfig(vocab_size=60, **CONFIG)).save_pretrained(tmp_path / "llm")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text('{"text": "the film is good and not bad"}\n' * 8)
    options = [
        "--optim",
        "dualadam",
        "--optim_args",
        "switch_fraction=0.5",
        "--max_steps",
        "4",
        "--logging_steps",
        "1",
    ]
    options += ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    options += ["--per_device_train_batch_size", "2", "--eos_token", "[SEP]", "--output_dir", "out"]
    model = ["--model_name_or_path", "llm", "--dataset_name", "texts"]
    result = run([*LAUNCHER, "-m", "trl.cli.main", "sft", *model, *options], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert os.path.isfile(tmp_path / "out" / "model.safetensors")
    assert "'alpha': '0.5'" in result.stdout
