"""DualAdam and InvAdam in Trainer: names, options, planned steps, resume, logs and warnings."""

import dataclasses
import fractions
import json
import logging
import math
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import HfArgumentParser, SchedulerType, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_dualadam
from hf_dualadam import DualAdam, InvAdam
from hf_dualadam.functional import inverse_weight
from hf_dualadam.optimizers import OPTIMIZERS
from hf_dualadam.trainer import OPTIM_ARGS, DualAdamCallback, parse_optim_args
from hf_dualadam.trainer.callback import last_inverse_step, switch_rate


class TinyModel(torch.nn.Module):
    """A regression that Trainer can run."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def forward(self, x, labels=None):
        logits = self.layers(x).squeeze(-1)
        return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}


def _data(rows=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, generator=generator)
    return [{"x": a, "labels": b} for a, b in zip(x, (x**2).sum(1))]


def _arguments(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "optim": "dualadam",
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    }
    return TrainingArguments(**{**defaults, **options})


def _skip_unless_trainer_can_resume():
    if torch.__version__ < (2, 6):
        pytest.skip("needs torch 2.6: transformers loads no optimizer.pt with an older one")


def _train(folder, resume=None, **options):
    trainer = Trainer(TinyModel(), _arguments(folder, **options), train_dataset=_data(), eval_dataset=_data(16))
    if resume:
        _skip_unless_trainer_can_resume()
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def _optimizer(trainer):
    return trainer.optimizer.optimizer


@pytest.mark.parametrize("name", ["dualadam", "invadam"])
def test_arguments_print_serialize_and_come_back(name, tmp_path):
    args = _arguments(tmp_path, optim=name)
    assert args.optim == name == OptimizerNames(name).value
    assert name in repr(args).lower() and json.loads(args.to_json_string())["optim"] == name
    assert pickle.loads(pickle.dumps(args)).optim == name
    assert dataclasses.replace(args, seed=1).optim == name
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).optim == name
    assert args.to_sanitized_dict()["optim"] == name


def test_command_line_takes_and_lists_the_names(tmp_path, capsys):
    parser = HfArgumentParser(TrainingArguments)
    arguments = ["--output_dir", str(tmp_path), "--optim", "invadam", "--optim_args", "normalize_inverse=true"]
    (args,) = parser.parse_args_into_dataclasses(arguments)
    assert args.optim == "invadam"
    choices = next(action.choices for action in parser._actions if action.dest == "optim")
    assert {"dualadam", "invadam"} <= set(choices)
    assert "dualadam" in parser.format_help()


def test_register_may_be_called_again():
    members = list(OptimizerNames)
    hf_dualadam.register()
    hf_dualadam.register()
    assert list(OptimizerNames) == members and OptimizerNames.DUALADAM is OptimizerNames("dualadam")


def test_set_optimizer(tmp_path):
    args = _arguments(tmp_path, optim="adamw_torch")
    args.set_optimizer(name="dualadam", learning_rate=0.5, beta1=0.8, args="switch_rate=0.25")
    group = _optimizer(_run_with(args)).param_groups[0]
    assert group["switch_rate"] == 0.25 and group["betas"] == (0.8, 0.999) and group["initial_lr"] == 0.5


def _run_with(args):
    trainer = Trainer(TinyModel(), args, train_dataset=_data())
    trainer.train()
    return trainer


def test_hyper_parameters_and_groups_are_adamws(tmp_path):
    options = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    ours = _optimizer(_train(tmp_path, **options, optim_args="switch_rate=0.5, normalize_inverse=True"))
    theirs = _optimizer(_train(tmp_path, **options, optim="adamw_torch"))
    assert type(ours) is DualAdam
    for group, other in zip(ours.param_groups, theirs.param_groups):
        for name in ("betas", "eps", "weight_decay", "initial_lr"):
            assert group[name] == other[name]
        assert [p.shape for p in group["params"]] == [p.shape for p in other["params"]]
        assert group["switch_rate"] == 0.5 and group["normalize_inverse"] is True


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (None, {}),
        ("", {}),
        ("switch_rate=1e-4", {"switch_rate": 1e-4}),
        (" switch_fraction = 0.5 , normalize_inverse=False", {"switch_fraction": 0.5, "normalize_inverse": False}),
        ("normalize_inverse=true,foreach=FALSE,fused=1", {"normalize_inverse": True, "foreach": False, "fused": True}),
    ],
)
def test_optim_args_are_parsed_by_type(text, parsed):
    assert parse_optim_args(text) == parsed


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("alhpa=1", "unknown key 'alhpa' for DualAdam - should be one of switch_rate, switch_fraction, normalize"),
        ("switch_rate=1.5", r"switch_rate=1.5 - should be a number in \[0, 1\]"),
        ("switch_rate=nan", "switch_rate=nan"),
        ("switch_rate=fast", "switch_rate=fast"),
        ("switch_fraction=0", r"switch_fraction=0 - should be a number in \(0, 1\]"),
        ("switch_fraction=2", "switch_fraction=2"),
        ("normalize_inverse=maybe", "normalize_inverse=maybe - should be true or false"),
        ("fused", "'fused' in 'fused' - should be key=value"),
        ("fused=true,", "should be key=value"),
        ("switch_rate=0.1,switch_rate=0.2", "switch_rate is given twice"),
        ("switch_rate=0.1,switch_fraction=0.2", "both switch_rate and switch_fraction"),
        ("foreach=true,fused=true", "both foreach and fused"),
    ],
)
def test_bad_optim_args_stop_at_the_trainer(text, match, tmp_path):
    with pytest.raises(ValueError, match=f"Invalid optim_args: .*{match}"):
        Trainer(TinyModel(), _arguments(tmp_path, optim_args=text), train_dataset=_data())


@pytest.mark.parametrize("key", ["switch_rate", "switch_fraction"])
def test_invadam_has_no_switch(key, tmp_path):
    with pytest.raises(ValueError, match=f"unknown key '{key}' for InvAdam - should be one of normalize_inverse") as e:
        Trainer(TinyModel(), _arguments(tmp_path, optim="invadam", optim_args=f"{key}=0.1"))
    assert "It belongs to DualAdam: set optim_args together with optim, in a hyper-parameter search" in str(e.value)


def test_search_over_optimizers_and_their_options(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seen = []

    class Remembering(Trainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            seen.append((type(optimizer).__name__, optimizer.param_groups[0]["normalize_inverse"]))
            return optimizer

    def space(optim):
        choices = {"dualadam": "switch_fraction=0.5", "invadam": "normalize_inverse=true"}
        return lambda trial: {"optim": optim, "optim_args": choices[optim]}

    args = _arguments(tmp_path, optim_args="switch_fraction=0.5", max_steps=2)
    trainer = Remembering(model_init=TinyModel, args=args, train_dataset=_data(), eval_dataset=_data(16))
    for optim in ("dualadam", "invadam"):
        trainer.hyperparameter_search(hp_space=space(optim), n_trials=1, compute_objective=lambda m: m["eval_loss"])
    assert seen == [("DualAdam", False), ("InvAdam", True)]
    with pytest.raises(ValueError, match="It belongs to DualAdam: set optim_args together with optim"):
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"optim": "invadam", "optim_args": "switch_fraction=0.5"}, n_trials=1
        )


class _Signs(torch.optim.Optimizer):
    """A third optimizer, with its own options."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0, *, foreach=None):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "foreach": foreach})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad.sign(), alpha=group["lr"])


def test_another_optimizer_needs_one_entry_in_the_table(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(OPTIMIZERS, "signs", _Signs)
    hf_dualadam.register()
    parser = HfArgumentParser(TrainingArguments)
    options = [
        "--optim",
        "signs",
        "--optim_args",
        "foreach=true",
        "--use_cpu",
        "--max_steps",
        "3",
        "--report_to",
        "none",
    ]
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--save_strategy", "no", *options])
    trainer = _run_with(args)
    assert type(_optimizer(trainer)) is _Signs and _optimizer(trainer).param_groups[0]["foreach"] is True
    assert not [r for r in caplog.records if r.name.startswith("hf_dualadam")]
    for bad, match in (("fused=true", "'fused' for _Signs - should be one of foreach"), ("foreach=2", "foreach=2")):
        with pytest.raises(ValueError, match=match):
            Trainer(TinyModel(), _arguments(tmp_path, optim="signs", optim_args=bad), train_dataset=_data())


def test_every_option_is_described():
    assert all(option.allowed and option.meaning for option in OPTIM_ARGS.values())


@pytest.mark.parametrize("options", [{"max_steps": 12}, {"max_steps": -1, "num_train_epochs": 2}])
def test_switch_fraction_is_of_the_planned_steps(options, tmp_path):
    trainer = _train(tmp_path, optim_args="switch_fraction=0.25", **options)
    group = _optimizer(trainer).param_groups[0]
    assert group["switch_rate"] == pytest.approx(1 / (0.25 * trainer.state.max_steps))
    assert not {"switch_fraction", "planned_steps"} & group.keys()


@pytest.mark.parametrize(
    "options",
    [
        {"optim_args": "switch_fraction=0.9"},
        {"optim_args": "switch_rate=0.1,normalize_inverse=true", "gradient_accumulation_steps": 2},
        {"optim": "invadam", "bf16": True},
    ],
)
def test_interrupted_run_ends_with_the_same_weights(options, tmp_path):
    straight = _train(tmp_path / "straight", **options)
    _train(tmp_path / "cut", save_strategy="steps", save_steps=5, **options)
    resumed = _train(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-5"), **options)
    assert torch.equal(_weights(straight), _weights(resumed))
    groups = [_optimizer(t).param_groups[0] for t in (straight, resumed)]
    assert groups[0]["switch_rate"] == groups[1]["switch_rate"]


def test_resumed_run_keeps_its_switch_and_says_so_where_it_is_not_what_was_asked(tmp_path, caplog, recwarn):
    options = {"optim_args": "switch_fraction=0.5"}
    first = _train(tmp_path, save_strategy="steps", save_steps=6, **options)
    checkpoint = str(tmp_path / "checkpoint-6")
    same = _train(tmp_path, resume=checkpoint, **options)
    rate = _optimizer(first).param_groups[0]["switch_rate"]
    assert _optimizer(same).param_groups[0]["switch_rate"] == rate
    assert not [w for w in recwarn if "replaces options" in str(w.message)] and "keeps the switch" not in caplog.text
    longer = _train(tmp_path, resume=checkpoint, max_steps=20, **options)
    assert _optimizer(longer).param_groups[0]["switch_rate"] == rate
    assert "keeps the switch of its checkpoint: alpha is 0 from step 6 of 20 on" in caplog.text
    assert "while switch_fraction=0.5 asks for step 10" in caplog.text
    caplog.clear()
    _train(tmp_path, resume=checkpoint, optim_args="switch_fraction=0.25")
    assert "alpha is 0 from step 6 of 12 on, while switch_fraction=0.25 asks for step 3" in caplog.text
    with pytest.warns(UserWarning, match="initial_lr: 0.01 instead of 0.5.*switch_rate: 0.16.* instead of 0.25"):
        _train(tmp_path, resume=checkpoint, optim_args="switch_rate=0.25", learning_rate=0.5)


def test_checkpoint_with_the_plan_of_an_older_version_loads(tmp_path):
    _train(tmp_path, save_strategy="steps", save_steps=6, optim_args="switch_fraction=0.5")
    path = tmp_path / "checkpoint-6" / "optimizer.pt"
    saved = torch.load(path, weights_only=True)
    for group in saved["param_groups"]:
        group.update(switch_fraction=0.5, planned_steps=12, switch_rate=1 / 6)
    torch.save(saved, path)
    group = _optimizer(
        _train(tmp_path, resume=str(path.parent), optim_args="switch_fraction=0.5", max_steps=20)
    ).param_groups[0]
    assert group["switch_rate"] == 1 / 6 and not {"switch_fraction", "planned_steps"} & group.keys()


class _OutOfMemoryAbove(TinyModel):
    """Fails like a GPU with a batch that is too large, from the given call on."""

    def __init__(self, rows, calls=0):
        super().__init__()
        self.rows, self.calls = rows, calls

    def forward(self, x, labels=None):
        self.calls -= 1
        if len(x) > self.rows and self.calls < 0:
            raise RuntimeError("CUDA out of memory.")
        return super().forward(x, labels)


@pytest.mark.parametrize("calls", [0, 3])
def test_switch_follows_the_plan_when_the_batch_size_is_found(calls, tmp_path, caplog):
    args = _arguments(
        tmp_path,
        optim_args="switch_fraction=0.5",
        auto_find_batch_size=True,
        per_device_train_batch_size=32,
        max_steps=-1,
        num_train_epochs=4,
        logging_steps=1,
    )
    trainer = Trainer(_OutOfMemoryAbove(8, calls), args, train_dataset=_data())
    trainer.train()
    steps = trainer.state.max_steps
    assert steps > 16  # more than the initial plan of 2 batches per epoch
    assert _optimizer(trainer).param_groups[0]["switch_rate"] == pytest.approx(2 / steps)
    inverse = sum(entry["alpha"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    assert inverse == steps // 2 - 1 - calls
    assert caplog.text.count("made 3 steps before this training") == (calls == 3)


def test_second_training_plans_anew_and_says_what_is_left_of_the_phase(tmp_path, caplog):
    trainer = _train(tmp_path, optim_args="switch_fraction=0.5")
    trainer.args.max_steps = 40
    trainer.train()
    assert _optimizer(trainer).param_groups[0]["switch_rate"] == pytest.approx(1 / 20)
    assert "made 12 steps before this training, and they count towards the switch" in caplog.text
    assert "7 of 40 steps have an inverse part, while switch_fraction=0.5 asks for 19" in caplog.text


def test_model_init_starts_the_phase_afresh(tmp_path, caplog):
    args = _arguments(tmp_path, optim_args="switch_fraction=0.5", logging_steps=1)
    trainer = Trainer(model_init=TinyModel, args=args, train_dataset=_data())
    for steps in (12, 20):
        args.max_steps = steps
        trainer.train()
        alphas = [entry["alpha"] for entry in trainer.state.log_history if "loss" in entry]
        assert sum(alpha > 0 for alpha in alphas) == steps // 2 - 1
    assert "count towards the switch" not in caplog.text


class _OwnScheduler(Trainer):
    """Does not pass on the number of planned steps."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer or self.optimizer, 1.0)
        self._created_lr_scheduler = True
        return self.lr_scheduler


def test_switch_fraction_works_with_a_scheduler_of_ones_own(tmp_path):
    _skip_unless_trainer_can_resume()
    options = {"optim_args": "switch_fraction=0.5", "save_strategy": "steps", "save_steps": 6}
    rates = []
    for steps, resume in ((12, None), (20, tmp_path / "checkpoint-6")):
        args = _arguments(tmp_path, max_steps=steps, **options)
        trainer = _OwnScheduler(TinyModel(), args, train_dataset=_data())
        trainer.train(resume_from_checkpoint=resume and str(resume))
        rates.append(_optimizer(trainer).param_groups[0]["switch_rate"])
    assert rates[0] == rates[1] == pytest.approx(1 / 6)


class _OwnGroups(Trainer):
    """Gives the last layer no inverse phase."""

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.shape[0] == 8]
        last = [p for p in self.model.parameters() if p.shape[0] == 1]
        if len(optimizer.param_groups) == 2:
            optimizer.add_param_group({"params": last, "switch_rate": 1.0})
        return optimizer


def test_groups_with_a_rate_of_their_own_keep_it(tmp_path):
    trainer = _OwnGroups(TinyModel(), _arguments(tmp_path, optim_args="switch_fraction=0.5"), train_dataset=_data())
    trainer.train()
    rates = [group["switch_rate"] for group in _optimizer(trainer).param_groups]
    assert rates == [pytest.approx(1 / 6), pytest.approx(1 / 6), 1.0]


@pytest.mark.parametrize(
    ("optim_args", "steps", "warning"),
    [
        ("switch_fraction=0.2", 8, "switch_fraction=0.2 of 8 steps leaves no step for the inverse phase"),
        ("switch_fraction=0.01", 8, "leaves no step for the inverse phase"),
        ("switch_rate=0.6", 8, "switch_rate=0.6 leaves no step for the inverse phase"),
        ("switch_fraction=0.25", 8, None),
        ("switch_rate=1", 8, None),
        ("switch_rate=0.5", 8, None),
    ],
)
def test_warns_of_a_phase_without_a_step(optim_args, steps, warning, tmp_path, caplog):
    trainer = _train(tmp_path, optim_args=optim_args, max_steps=steps, logging_steps=1)
    assert (warning or "has no such warning") in caplog.text + "has no such warning"
    assert ("leaves no step" in caplog.text) == (warning is not None)
    assert (trainer.state.log_history[0]["alpha"] == 0) == (warning is not None or optim_args == "switch_rate=1")


@pytest.mark.parametrize("steps", [4, 6, 10, 20, 26, 98, 140, 1000, 12345])
@pytest.mark.parametrize("fraction", [0.1, 0.16, 0.3, 0.5, 0.7, 1.0])
def test_rounding_does_not_end_the_phase_early(fraction, steps):
    rate = switch_rate(fraction, steps)
    length = fractions.Fraction(str(fraction)) * steps  # without rounding
    last = math.floor(length) - 1  # the last step at which 1 - t / length >= 1 / length
    assert last_inverse_step(rate) == max(last, 0)
    if last > 0:
        assert inverse_weight(last, rate) == pytest.approx(float(1 - last / length), abs=1e-8)


def test_checkpoints_of_adamw_and_back_are_noticed(tmp_path, caplog):
    for name, other in (("adamw_torch", "dualadam"), ("dualadam", "adamw_torch")):
        _train(tmp_path / name, optim=name, save_strategy="steps", save_steps=6)
        checkpoint = str(tmp_path / name / "checkpoint-6")
        if other == "dualadam":
            with pytest.warns(UserWarning, match="saved by another optimizer, not by DualAdam"):
                trainer = _train(tmp_path / other, resume=checkpoint, optim=other, optim_args="switch_fraction=0.5")
            assert _optimizer(trainer).param_groups[0]["switch_rate"] == pytest.approx(1 / 6)
        else:
            _train(tmp_path / other, resume=checkpoint, optim=other)
    assert "continues with AdamW from a checkpoint of DualAdam: it keeps moments and step counts" in caplog.text
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    sgd.param_groups[0]["optimizer"] = "DualAdam"  # as torch loads it
    DualAdamCallback().on_train_begin(_arguments(tmp_path, optim="sgd"), None, None, optimizer=sgd)
    assert "continues with SGD from a checkpoint of DualAdam: it does not use their moments" in caplog.text


def test_checkpoint_loads_without_the_package(tmp_path):
    _train(tmp_path, save_strategy="steps", save_steps=6, optim_args="switch_fraction=0.5")
    script = (
        "import sys, torch; folder = sys.argv[1]\n"
        "args = torch.load(folder + '/training_args.bin', weights_only=False)\n"
        "state = torch.load(folder + '/optimizer.pt', weights_only=True)\n"
        "assert args.optim == 'dualadam' and args.to_dict()['optim'] == 'dualadam'\n"
        "assert state['param_groups'][0]['optimizer'] == 'DualAdam'\n"
        "assert 'hf_dualadam' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "checkpoint-6")], check=True, cwd=tmp_path)


def test_logs_show_the_inverse_part(tmp_path):
    trainer = _train(tmp_path, optim_args="switch_rate=0.125", eval_strategy="steps", eval_steps=6)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["alpha"] for entry in logs] == [0.5, 0.0, 0.0]
    assert logs[0]["inverse_share"] > 0 and logs[1]["inverse_share"] == 0.0
    assert all(entry["inverse_rms_ratio"] > 0 for entry in logs)
    assert not any("alpha" in entry for entry in trainer.state.log_history if "eval_loss" in entry)


def test_inverse_share_is_that_of_the_last_update(tmp_path):
    trainer = _train(
        tmp_path, max_steps=1, logging_steps=1, optim_args="switch_rate=0.25", lr_scheduler_type="constant"
    )
    entry = trainer.state.log_history[0]
    moments = [_optimizer(trainer).state[p] for p in trainer.model.parameters()]
    m_hat = torch.cat([state["exp_avg"].flatten() / 0.1 for state in moments])
    d = torch.cat([(state["exp_avg_sq"] / 0.001).sqrt().flatten() for state in moments]) + 1e-8
    adam, inverse = m_hat / d, m_hat * d
    update = 0.25 * adam + 0.75 * inverse
    assert entry["inverse_share"] == pytest.approx((0.75 * inverse.norm() / update.norm()).item(), rel=1e-4)
    assert entry["inverse_rms_ratio"] == pytest.approx((inverse.norm() / adam.norm()).item(), rel=1e-4)


def test_normalized_inverse_logs_what_it_does(tmp_path):
    trainer = _train(tmp_path, optim="invadam", optim_args="normalize_inverse=true")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["alpha"] == 1.0 and entry["inverse_share"] == pytest.approx(1.0) for entry in logs)


class _Renaming(Trainer):
    """Renames what it logs, as setfit and others do."""

    names = "embedding_{}"

    def log(self, logs, *args, **kwargs):
        prefixes = ("eval_", "train_", "test_")
        names = (key if key.startswith(prefixes) else self.names.format(key) for key in logs)
        super().log(dict(zip(names, logs.values())), *args, **kwargs)


@pytest.mark.parametrize("names", ["embedding_{}", "train/{}", "{}"])
def test_figures_are_in_every_training_log_whatever_it_is_called(names, tmp_path, caplog):
    args = _arguments(tmp_path, eval_strategy="steps", eval_steps=3, learning_rate=1e30, max_grad_norm=0.0)
    trainer = _Renaming(TinyModel(), args, train_dataset=_data(), eval_dataset=_data(16))
    trainer.names = names
    trainer.train()
    trainer.evaluate(metric_key_prefix="test")
    training = [entry for entry in trainer.state.log_history if names.format("loss") in entry]
    assert len(training) == 3 and all("alpha" in entry and "inverse_share" in entry for entry in training)
    assert not any("alpha" in entry for entry in trainer.state.log_history if names.format("loss") not in entry)
    assert "has diverged by step" in caplog.text


def test_an_optimizer_handed_over_instead_of_the_one_named_is_said(tmp_path, caplog):
    model = TinyModel()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    Trainer(model, _arguments(tmp_path), train_dataset=_data(), optimizers=(sgd, None)).train()
    assert "optim=dualadam is not used: this Trainer was created with another optimizer, SGD." in caplog.text


def test_adamw_runs_are_left_alone(tmp_path):
    trainer = _train(tmp_path, optim="adamw_torch")
    assert not any("alpha" in entry for entry in trainer.state.log_history)


def test_warns_when_the_inverse_part_is_too_small_to_matter(tmp_path, caplog):
    _train(tmp_path, max_grad_norm=1e-3)
    assert caplog.text.count("too small to matter") == 1


def test_warns_before_and_when_invadam_diverges(tmp_path, caplog):
    _train(tmp_path, optim="invadam", learning_rate=0.5, logging_steps=1, max_grad_norm=0.0)
    assert "large enough to diverge" in caplog.text
    _train(tmp_path, optim="invadam", learning_rate=1e30, logging_steps=1, max_grad_norm=0.0)
    assert "InvAdam has diverged by step" in caplog.text and "normalize_inverse=true" in caplog.text


def test_stays_silent_on_a_healthy_run(tmp_path, caplog):
    _train(tmp_path, optim_args="normalize_inverse=true", learning_rate=1e-3)
    assert not [r for r in caplog.records if r.name.startswith("hf_dualadam") and r.levelno >= logging.WARNING]


@pytest.mark.parametrize("scheduler", [s.value for s in SchedulerType])
def test_every_scheduler_drives_it_as_it_drives_adamw(scheduler, tmp_path):
    kwargs = {
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 4},
    }.get(scheduler, {})
    options = {"eval_strategy": "steps", "eval_steps": 4} if scheduler in ("reduce_lr_on_plateau", "greedy") else {}
    options |= {"lr_scheduler_type": scheduler, "lr_scheduler_kwargs": kwargs, "warmup_steps": 2, "max_steps": 8}
    ours = _train(tmp_path / "ours", optim="dualadam", optim_args="switch_rate=1", **options)  # alpha is 0 at step 1
    adamw = _train(tmp_path / "adamw", optim="adamw_torch", **options)
    torch.testing.assert_close(_weights(ours), _weights(adamw))
    assert not torch.equal(_weights(ours), torch.cat([p.detach().flatten() for p in TinyModel().parameters()]))


def test_skipped_step_advances_nothing():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = DualAdam([param], lr=0.1, switch_rate=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    steps = []
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(optimizer.state[param]["step"].item())
    assert steps == [1, 1, 2] and torch.isfinite(param).all()


def test_optimizer_handed_to_trainer_is_logged_too(tmp_path):
    model = TinyModel()
    optimizer = InvAdam(model.parameters(), lr=0.01)
    args = _arguments(tmp_path, optim="adamw_torch")
    trainer = Trainer(model, args, train_dataset=_data(), optimizers=(optimizer, None))
    trainer.train()
    assert trainer.state.log_history[0]["alpha"] == 1.0


class _Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_deepspeed_offload_that_replaced_the_optimizer_stops(tmp_path):
    replaced = type("DeepSpeedCPUAdam", (), {"__module__": "deepspeed.ops.adam.cpu_adam", "param_groups": []})()
    with pytest.raises(RuntimeError, match='replaced DualAdam by DeepSpeedCPUAdam: set "zero_force_ds_cpu_optimizer"'):
        DualAdamCallback().on_train_begin(_arguments(tmp_path), None, None, optimizer=_Wrapper(replaced))


def test_normalizing_under_zero_stops(tmp_path):
    inner = InvAdam([torch.nn.Parameter(torch.ones(2))], normalize_inverse=True)
    zero = type("DeepSpeedZeroOptimizer", (_Wrapper,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    with pytest.raises(RuntimeError, match="normalize_inverse needs whole tensors"):
        DualAdamCallback().on_train_begin(_arguments(tmp_path), None, None, optimizer=_Wrapper(zero(inner)))
