"""Measure how sharp the minimum of a saved model is, and draw a slice of its loss surface.

    python scripts/measure_sharpness.py outputs/sst2 --script glue --task_name sst2 --data_dir path/to/sst2
    python scripts/measure_sharpness.py outputs/vit --script image_classification --data_dir path/to/images

CHECKPOINT is any folder that ``from_pretrained`` loads; the data options are those of run_glue.py or
run_image_classification.py. Writes sharpness.json and loss_slice.png next to the model, or to --output_dir: loss,
largest Hessian eigenvalue, trace, loss rise in a ball, and the loss along the top eigenvector and a random direction.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hf_dualadam.extras import require_or_exit

require_or_exit("compare")

import numpy as np
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from hf_dualadam.finetuning import glue, images
from hf_dualadam.finetuning.config import InputError, parse, run_main
from hf_dualadam.finetuning.models import ModelArguments
from hf_dualadam.lab.sharpness import loss_slice, measure_sharpness

BUILDERS = {"glue": (glue.GlueArguments, glue.build), "image_classification": (images.ImageArguments, images.build)}
POINTS = 21


@dataclass
class SharpnessArguments:
    """What is measured, and where the results go."""

    script: Literal["glue", "image_classification"] = field(
        default="glue", metadata={"help": "Whose data options are given."}
    )
    split: Literal["train", "validation"] = field(default="train", metadata={"help": "Whose loss is measured."})
    examples: int = field(default=256, metadata={"help": "Number of examples, the first of the split."})
    batch_size: int = field(default=32, metadata={"help": "Examples at a time; changes memory, not results."})
    rho: float = field(default=0.05, metadata={"help": "Radius of the ball."})
    lanczos_steps: int = field(default=15, metadata={"help": "Hessian-vector products for the largest eigenvalue."})
    trace_samples: int = field(default=10, metadata={"help": "Hessian-vector products for the trace."})
    slice_radius: float = field(default=0.5, metadata={"help": "Half the length of the slice."})
    output_dir: str | None = field(default=None, metadata={"help": "By default the checkpoint's folder."})

    def __post_init__(self):
        """Check the ranges."""
        for name in ("examples", "batch_size", "lanczos_steps", "trace_samples", "rho", "slice_radius"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}: {getattr(self, name)} - should be above 0")


def draw(distances, slices, path, title):
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=110)
    axes = figure.subplots()
    for (name, losses), style in zip(slices.items(), ("-o", "--s")):
        axes.plot(distances, losses, style, markersize=3, label=name)
    axes.set(xlabel="distance from the model [norm of the weights' change]", ylabel="loss [nats]", title=title)
    axes.grid(alpha=0.3)
    axes.legend(title="along the")
    figure.savefig(path)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    checkpoint = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    script = argv[argv.index("--script") + 1] if "--script" in argv[:-1] else "glue"
    data_cls, build = BUILDERS.get(script, BUILDERS["glue"])
    args, data_args = parse((SharpnessArguments, data_cls), argv, defaults=lambda given: {}, description=__doc__)
    if checkpoint is None or not checkpoint.is_dir():
        raise InputError(f"CHECKPOINT: {checkpoint} - should be the folder of a saved model, and come first")
    splits = ["train"] if args.split == "train" else ["train", "validation"]
    task = build(data_args, ModelArguments(model_name_or_path=str(checkpoint)), splits=splits)
    dataset = task.train_dataset if args.split == "train" else next(iter(task.eval_datasets.values()))
    examples = list(task.eval_view(dataset.select(range(min(args.examples, len(dataset))))))
    batches = list(DataLoader(examples, args.batch_size, collate_fn=task.data_collator))
    model = task.build_model()
    figures = measure_sharpness(
        model, batches, rho=args.rho, lanczos_steps=args.lanczos_steps, trace_samples=args.trace_samples
    )
    distances = np.linspace(-args.slice_radius, args.slice_radius, POINTS).tolist()
    slices = loss_slice(model, batches, distances, lanczos_steps=args.lanczos_steps)
    folder = Path(args.output_dir or checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    result = figures._asdict() | {"examples": len(examples), "split": args.split, "rho": args.rho, "slice": slices}
    (folder / "sharpness.json").write_text(json.dumps(result | {"distances": distances}, indent=2) + "\n")
    draw(distances, slices, folder / "loss_slice.png", f"{task.name}: {args.split} loss around {checkpoint.name}")
    for name, value in figures._asdict().items():
        print(f"{name:24}{value:12.5g}")
    print(f"files: {folder / 'sharpness.json'}, {folder / 'loss_slice.png'}")


if __name__ == "__main__":
    run_main(main)
