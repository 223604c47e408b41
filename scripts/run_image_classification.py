"""Fine-tune an image classifier or train one from scratch, and measure how well it generalizes.

    python scripts/run_image_classification.py configs/vision/vit_small_cifar10.yaml --optim adamw_torch
    python scripts/run_image_classification.py configs/quickstart/vision.yaml --output_dir outputs/vision

The YAML file is optional; its keys are the options below, and options on the command line override it. Without
do_train, do_eval and do_predict, the script trains and evaluates; optim defaults to dualadam with
switch_fraction=0.16. Images are read with Pillow; torchvision is not needed.
"""

from hf_dualadam.extras import require_or_exit

require_or_exit("finetune")

from hf_dualadam.finetuning.config import parse, run_main, training_defaults
from hf_dualadam.finetuning.tasks import task_kind
from hf_dualadam.finetuning.training import RunArguments, check_output_dir, run, splits_needed, summary


def defaults(given):
    values = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 64, "output_dir": "outputs/images"}
    return training_defaults(given) | values


def main(argv=None):
    kind = task_kind("image_classification")
    *own, run_args, args = parse(
        (*kind.argument_classes, RunArguments, kind.training_arguments),
        argv,
        defaults=defaults,
        description=__doc__,
    )
    check_output_dir(args, run_args.overwrite_output_dir)
    task = kind.build(*own, training_args=args, splits=splits_needed(args))
    finished = run(task, args, **run_args.options())
    if finished.trainer.is_world_process_zero():
        print(summary(finished))
    return finished


if __name__ == "__main__":
    run_main(main)
