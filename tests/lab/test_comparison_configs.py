"""Every comparison in configs/compare loads, and its tasks' arguments are those of their kind."""

import dataclasses

import pytest
from tiny import ROOT

pytest.importorskip("optuna")
pytest.importorskip("pytorch_optimizer")

from transformers import AutoConfig, AutoModelForImageClassification

from hf_dualadam.finetuning.config import from_values, parse
from hf_dualadam.finetuning.tasks import task_kind
from hf_dualadam.lab.comparison import ComparisonArguments, make_comparison

CONFIGS = sorted((ROOT / "configs" / "compare").glob("*.yaml"))


def load(path):
    (arguments,) = parse((ComparisonArguments,), [str(path)], defaults=lambda given: {})
    return make_comparison(arguments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_comparison_loads_with_known_arguments(path, tmp_path):
    comparison = load(path)
    assert comparison.name == path.stem and f"configs/compare/{path.name}" in path.read_text()
    for task in comparison.tasks.values():
        kind = task_kind(task.script)
        known = [{field.name for field in dataclasses.fields(cls) if field.init} for cls in kind.argument_classes]
        given = task.arguments | ({"data_dir": str(tmp_path)} if "data_dir" in task.arguments else {})
        own = {name: value for name, value in given.items() if any(name in names for names in known)}
        training = {name: value for name, value in given.items() if name not in own}
        from_values(kind.argument_classes, own, defaults=lambda given: {})
        from_values(
            (kind.training_arguments,),
            training | {"output_dir": str(tmp_path), "use_cpu": True},
            defaults=lambda given: {},
        )


def test_the_papers_models_are_of_the_papers_size():
    sizes = {}
    for name in ("paper-resnet18", "paper-vit"):
        comparison = load(ROOT / "configs" / "compare" / f"{name}.yaml")
        arguments = comparison.tasks["cifar10"].arguments
        settings = dict(arguments["model_config"])
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForImageClassification.from_config(config)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        # 200 epochs of 50,000 images, and an inverse phase of 1 / 8e-5 steps
        assert abs(arguments["max_steps"] * arguments["per_device_train_batch_size"] / 50_000 - 200) < 0.5
        assert abs(comparison.optimizers["dualadam"].switch_fraction * arguments["max_steps"] - 1 / 8e-5) < 20
    assert sizes["paper-resnet18"] == pytest.approx(11.2, abs=0.1)  # torchvision's ResNet-18: 11.7 with 1,000 classes
    assert sizes["paper-vit"] == pytest.approx(21.3, abs=0.1)
