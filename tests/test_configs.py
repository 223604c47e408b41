"""Every config loads; files and command lines are read strictly."""

import json
import re
from dataclasses import dataclass, field

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from tiny import ROOT
from transformers import Trainer, TrainingArguments

from hf_dualadam import DualAdam
from hf_dualadam.finetuning.config import InputError, _load_yaml, parse
from hf_dualadam.finetuning.glue import TASKS, GlueArguments
from hf_dualadam.finetuning.images import ImageArguments
from hf_dualadam.finetuning.models import ModelArguments, load_config
from hf_dualadam.finetuning.training import RunArguments

CONFIGS = sorted(
    path for folder in ("glue", "vision", "quickstart") for path in (ROOT / "configs" / folder).glob("*.yaml")
)
CONFIGS = [path for path in CONFIGS if path.stem != "clm"]
LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@dataclass
class Options:
    task: str = "none"
    mapping: dict[str, int] | None = None
    names: list[str] | None = None
    count: int | None = None
    strict: bool | None = None
    share: float = field(default=0.5, metadata={"help": "100 % or less"})


def read(tmp_path, text, *argv):
    (tmp_path / "config.yaml").write_text(text)
    return parse((Options, TrainingArguments), [str(tmp_path / "config.yaml"), *argv])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_loads_and_its_optimizer_builds(path):
    data_class = GlueArguments if "glue" in (path.parent.name, path.stem) else ImageArguments
    model_args, data_args, _, args = parse((ModelArguments, data_class, RunArguments, TrainingArguments), [str(path)])
    text = path.read_text()
    assert text.startswith("# ") and "Takes" in text.split("\n\n")[0]
    values = yaml.safe_load(text)
    assert isinstance(values["learning_rate"], float) and values["output_dir"].startswith("outputs/")
    assert args.do_train and args.do_eval and args.report_to == []
    optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = optimizer_cls([torch.nn.Parameter(torch.ones(2))], **kwargs)
    assert isinstance(optimizer, DualAdam) and optimizer.param_groups[0]["lr"] == values["learning_rate"]
    if model_args.model_config:
        assert load_config(model_args).hidden_size == values["model_config"]["hidden_size"]
    if path.parent.name == "glue":
        assert data_args.task_name == path.stem


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_every_launch_config_loads_and_names_options_of_the_launcher(path):
    config = load_config_from_file(str(path))
    engines = {"one_gpu": "NO", "several_gpus": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == engines.get(path.stem, "DEEPSPEED") and not config.use_cpu
    options = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config.deepspeed_config or {}) | set(config.fsdp_config or {}) <= set(options)
    if path.stem.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
        assert config.deepspeed_config["offload_optimizer_device"] == "none"
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    (script,) = re.findall(r"configs/accelerate/(\S+) (scripts/\S+)", path.read_text())
    assert script[0] == path.name and (ROOT / script[1]).is_file()


def test_there_is_a_config_for_every_glue_task():
    assert {path.stem for path in CONFIGS if path.parent.name == "glue"} == set(TASKS)


def test_file_and_command_line_say_the_same(tmp_path):
    text = "task: a\nmapping: {x: 1}\nnames: [p, q]\ncount: 3\nshare: 1\nlearning_rate: 2.0e-5\nseed: 7\nstrict: true"
    by_file = read(tmp_path, text)
    argv = (
        "--task a --mapping {x:\x001} --names p q --count 3 --share 1 --learning_rate 2e-5 --seed 7 --strict".split()
    )
    by_line = parse((Options, TrainingArguments), [part.replace("\0", " ") for part in argv])
    assert by_file[0] == by_line[0] == Options("a", {"x": 1}, ["p", "q"], 3, True, 1)
    assert by_file[1].learning_rate == by_line[1].learning_rate == 2e-5 and by_line[1].seed == 7


def test_command_line_wins_over_the_file(tmp_path):
    options, args = read(tmp_path, "task: a\nlearning_rate: 1.0\nseed: 3", "--task", "b", "--seed", "4")
    assert (options.task, args.learning_rate, args.seed) == ("b", 1.0, 4)


def test_defaults_are_dualadam_training_and_evaluation():
    _, args = parse((Options, TrainingArguments), [])
    assert (args.optim, args.optim_args) == ("dualadam", "switch_fraction=0.16")
    assert args.do_train and args.do_eval and not args.do_predict
    _, args = parse((Options, TrainingArguments), ["--do_eval", "--optim", "sgd"])
    assert args.do_eval and not args.do_train and args.optim_args is None


def test_optim_args_of_the_file_stay_with_its_optimizer(tmp_path):
    text = "optim: dualadam\noptim_args: switch_rate=0.2"
    assert read(tmp_path, text)[1].optim_args == "switch_rate=0.2"
    assert read(tmp_path, text, "--optim", "adamw_torch")[1].optim_args is None
    assert read(tmp_path, text, "--optim", "sgd", "--optim_args", "momentum=0.9")[1].optim_args == "momentum=0.9"


@pytest.mark.parametrize("option", ["--warmup_ratio", "--warmup_steps"])
def test_warmup_share_under_either_name(tmp_path, option):
    for args in (parse((TrainingArguments,), [option, "0.25"])[0], read(tmp_path, f"{option[2:]}: 0.25")[1]):
        assert args.get_warmup_steps(100) == 25
    assert parse((TrainingArguments,), ["--warmup_steps", "7"])[0].get_warmup_steps(100) == 7


@pytest.mark.parametrize("value", ["true", "path/to/checkpoint-1"])
def test_resume_is_a_switch_or_a_path(tmp_path, value):
    assert read(tmp_path, f"resume_from_checkpoint: {value}")[1].resume_from_checkpoint == value
    assert read(tmp_path, "", "--resume_from_checkpoint", value)[1].resume_from_checkpoint == value
    assert read(tmp_path, "resume_from_checkpoint: false")[1].resume_from_checkpoint is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: '2e-5'", "learning_rate: '2e-5' is text, but should be a number .write it without quotes"),
        ("learning_rate: 2e", "learning_rate: '2e' is text"),
        ("seed: 1_0", "seed: '1_0' is text"),
        ("seed: 1:30", "seed: '1:30' is text"),
        ("seed: 1e3", "seed: 1000.0 is a number, but should be a whole number"),
        ("learning_rate: 1_000", "'1_000' is text, but should be a number .numbers are written as 1000, 0.5 or 5e-5"),
        ("learning_rate: nan", "'nan' is text, but should be a number .numbers are written as"),
        ("output_dir: ''", "output_dir: '' is blank; name a folder"),
        ("output_dir: ' '", "output_dir: ' ' is blank; name a folder"),
        ("task: 1e3", "task: 1000.0 is a number, but should be text .put it in quotes"),
        ("task: true", "task: True is true or false, but should be text .put it in quotes"),
        ("count: yes", "count: 'yes' is text"),
        ("lerning_rate: 1.0", "unknown option 'lerning_rate', did you mean learning_rate"),
        ("task: 3", "task: 3 is a whole number, but should be text"),
        ("count: 1.5", "count: 1.5 is a number, but should be a whole number or null"),
        ("count: true", "count: True is true or false"),
        ("seed: null", "seed: None is null"),
        ("mapping: {x: y}", "mapping: .* is a mapping, but"),
        ("names: p", "names: 'p' is text, but should be a list or null"),
        ("eval_strategy: false", "eval_strategy: False.*quotes"),
        ("optim: adamm", "optim: 'adamm' is not one of .*dualadam"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type: 'cosin' is not one of"),
        ("learning_rate: .nan", "learning_rate: nan is not a finite number"),
        ("learning_rate: -1.0", "learning_rate: -1.0 is out of range"),
        ("num_train_epochs: 0", "num_train_epochs: 0 is out of range"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size: 0 is out of range"),
        ("seed: 99999999999999999999", "seed: 9+ is out of range"),
        ("optim_args: switch=0.1", "unknown key 'switch'.*switch_rate"),
        ("optim_args: switch_rate=2", "switch_rate=2 - should be a number in"),
        ("eval_strategy: steps\neval_steps: 3\nload_best_model_at_end: true\nsave_strategy: epoch", "load_best_model"),
        ("task: a\ntask: b", "key 'task' is given twice"),
        ("- task", "should hold `key: value` lines, but holds a list"),
        ("task: [", "cannot be read as YAML"),
        ("task: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("1: x", "unknown option '1'"),
    ],
)
def test_bad_files_are_refused_with_one_clear_message(tmp_path, text, message):
    with pytest.raises(InputError, match="(?s)" + message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("5e-05", 5e-05),
        ("2e-5", 2e-5),
        ("+1E2", 100.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("1e0", 1.0),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-3", -3),
        ("1_0", "1_0"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("null", None),
        ("~", None),
        ("'5e-05'", "5e-05"),
        ("true", True),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written, value):
    read = _load_yaml(f"key: {written}")["key"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("written", ["yes", "On", "true"])
def test_yes_is_true_where_a_truth_value_belongs(tmp_path, written):
    assert read(tmp_path, f"strict: {written}\nsave_strategy: no")[0].strict is True


def test_a_json_file_is_read_as_json(tmp_path):
    values = {"learning_rate": 5e-05, "seed": 3, "task": "no", "mapping": {"x": 1}, "count": None, "strict": True}
    (tmp_path / "args.json").write_text(json.dumps(values))
    options, args = parse((Options, TrainingArguments), [str(tmp_path / "args.json"), "--seed", "4"])
    assert options == Options("no", {"x": 1}, strict=True) and (args.learning_rate, args.seed) == (5e-05, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1, "seed": 2}', "'seed' is given twice"),
        ('{"seed": 1,}', "cannot be read as JSON"),
        ("[1]", "holds a list"),
        ('{"sed": 1}', "did you mean seed"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"learning_rate": NaN}', "nan is not a finite number"),
    ],
)
def test_bad_json_is_refused_with_one_clear_message(tmp_path, text, message):
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(InputError, match=message):
        parse((Options, TrainingArguments), [str(tmp_path / "args.json")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no/such.yaml"], "no such config file"),
        (["--lerning-rate", "1"], "unknown option 'lerning_rate', did you mean learning_rate"),
        (["--task", "a", "stray"], "'stray' belongs to no option"),
        (["--seed", "1.5"], "seed.*invalid int value: '1.5'"),
        (["--learning_rate"], "learning_rate.*expected"),
        (["--mapping", "{x: ]"], "cannot be read as YAML"),
        (["--mapping", "x"], "mapping: 'x' is text"),
    ],
)
def test_bad_command_lines_are_refused_with_one_clear_message(argv, message):
    with pytest.raises(InputError, match=message):
        parse((Options, TrainingArguments), argv)


def test_unreadable_file_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00task: a")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        parse((Options,), [str(tmp_path / "config.yaml")])


def test_required_option_is_named():
    @dataclass
    class Needs:
        task: str

    with pytest.raises(InputError, match="task: required"):
        parse((Needs,), [])


def test_help_lists_options_with_defaults(capsys):
    with pytest.raises(SystemExit):
        parse((Options, TrainingArguments), ["--help"], description="What it does")
    printed = capsys.readouterr().out
    for part in ("What it does", "--share", "100 % or less (default: 0.5)", "dualadam", "--warmup_ratio"):
        assert part in printed
