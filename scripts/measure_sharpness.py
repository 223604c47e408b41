"""Measure how sharp the minimum of a saved model is, and draw a slice of its loss surface.

    python scripts/measure_sharpness.py outputs/sst2 --script glue --task_name sst2 --data_dir path/to/sst2
    python scripts/measure_sharpness.py outputs/vit --script image_classification --data_dir path/to/images
    python scripts/measure_sharpness.py outputs/clm --script clm --train_file path/to/texts.txt

CHECKPOINT is a folder written by a script or by ``save_pretrained``: a model, or an adapter (then only the adapter's
weights are measured). The data options are those of the script that ``--script`` names. Writes sharpness.json and
loss_slice.png next to the model, or to --output_dir: loss, largest Hessian eigenvalue, trace, loss rise in a ball, and
the loss along the top eigenvector and a random direction, all in float32.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hf_dualadam.extras import require_or_exit

require_or_exit("compare")

import numpy as np
from matplotlib.figure import Figure
from transformers import TrainingArguments

from hf_dualadam.finetuning.config import InputError, parse, run_main
from hf_dualadam.finetuning.models import ModelArguments
from hf_dualadam.finetuning.tasks import KINDS, task_kind
from hf_dualadam.finetuning.training import check_writable, make_trainer, refuse_several_processes
from hf_dualadam.lab.sharpness import loss_slice, measure_sharpness

POINTS = 21
# One Lanczos step sees the curvature along a single direction; thousands of steps lose orthogonality.
RANGES = {
    "examples": (1, 2**31),
    "batch_size": (1, 2**31),
    "lanczos_steps": (2, 1000),
    "trace_samples": (1, 100_000),
    "rho": (1e-6, 1e3),
    "slice_radius": (1e-6, 1e3),
}


NOT_TRAINED = {"report_to": "none", "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False}


@dataclass
class SharpnessArguments:
    """What to measure, and where to write the results."""

    script: str = field(default="glue", metadata={"help": f"Script whose data options apply: {', '.join(KINDS)}."})
    split: str = field(default="train", metadata={"help": "Split whose loss is measured: train or validation."})
    examples: int = field(default=256, metadata={"help": "Use the first N examples of the split."})
    batch_size: int = field(default=32, metadata={"help": "Examples per batch; changes memory, not results."})
    rho: float = field(default=0.05, metadata={"help": "Radius of the ball."})
    lanczos_steps: int = field(default=15, metadata={"help": "Hessian-vector products for the largest eigenvalue."})
    trace_samples: int = field(default=10, metadata={"help": "Hessian-vector products for the trace."})
    slice_radius: float = field(default=0.5, metadata={"help": "Half the length of the slice."})
    output_dir: str | None = field(default=None, metadata={"help": "By default the checkpoint's folder."})

    def __post_init__(self):
        """Check the ranges."""
        if self.split not in ("train", "validation"):
            raise InputError(f"split: {self.split!r} is not one of train, validation")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name}: {getattr(self, name)} is out of range; should be {low:g} to {high:g}")


def draw(distances, slices, path, title):
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=110)
    axes = figure.subplots()
    for (name, losses), style in zip(slices.items(), ("-o", "--s")):
        axes.plot(distances, losses, style, markersize=3, label=name)
    axes.set(xlabel="distance from the model [norm of the weights' change]", ylabel="loss [nats]", title=title)
    axes.grid(alpha=0.3)
    axes.legend(title="along the")
    figure.savefig(path)


def read_options(argv):
    """The options, and those of the script whose task is measured."""
    argv = list(sys.argv[1:] if argv is None else argv)
    checkpoint = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    if checkpoint is None or not checkpoint.is_dir():
        raise InputError(f"CHECKPOINT: {checkpoint} - should be the folder of a saved model, and come first")
    name = "glue"
    for option, value in zip(argv, [*argv[1:], None], strict=True):
        if option.startswith("--script="):
            name = option.partition("=")[2]
        elif option == "--script" and value is not None:
            name = value
    kind = task_kind(name)
    own_arguments = kind.training_arguments is not TrainingArguments  # such as TRL's, which set how texts are cut
    classes = (*kind.argument_classes, *([kind.training_arguments] if own_arguments else []))
    options, *own = parse(
        (SharpnessArguments, *classes), argv, defaults=lambda given: NOT_TRAINED, description=__doc__
    )
    training_args = own.pop() if own_arguments else TrainingArguments("unused", **NOT_TRAINED)
    training_args.per_device_eval_batch_size = options.batch_size
    own = [
        dataclasses.replace(given, model_name_or_path=str(checkpoint), model_config=None)
        if isinstance(given, ModelArguments)
        else given
        for given in own
    ]
    return checkpoint, options, kind, own, training_args


def main(argv=None):
    checkpoint, options, kind, own, training_args = read_options(argv)
    refuse_several_processes("measure_sharpness.py")
    folder = Path(options.output_dir or checkpoint)
    check_writable(folder)
    task = kind.build(*own, training_args=training_args, splits=[options.split])
    dataset = task.train_dataset if options.split == "train" else next(iter(task.eval_datasets.values()))
    dataset = dataset.select(range(min(options.examples, len(dataset))))
    task = dataclasses.replace(task, eval_datasets={"": dataset})
    trainer = make_trainer(task, training_args, task.build_model(trained=True).float())
    batches = list(trainer.get_eval_dataloader(task.eval_view(dataset)))
    model = trainer.model
    figures = measure_sharpness(
        model, batches, rho=options.rho, lanczos_steps=options.lanczos_steps, trace_samples=options.trace_samples
    )
    distances = np.linspace(-options.slice_radius, options.slice_radius, POINTS).tolist()
    slices = loss_slice(model, batches, distances, lanczos_steps=options.lanczos_steps)
    folder.mkdir(parents=True, exist_ok=True)
    result = figures._asdict() | {"examples": len(dataset), "split": options.split, "rho": options.rho}
    result = {name: finite(value) for name, value in (result | {"slice": slices, "distances": distances}).items()}
    (folder / "sharpness.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    draw(distances, slices, folder / "loss_slice.png", f"{task.name}: {options.split} loss around {checkpoint.name}")
    for name, value in figures._asdict().items():
        print(f"{name:24}{value:12.5g}")
    print(f"files: {folder / 'sharpness.json'}, {folder / 'loss_slice.png'}")


def finite(value):
    """Replace non-finite numbers by None, since JSON has no NaN (the error of a single trace sample is NaN)."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    run_main(main)
