"""Fine-tune a model on a GLUE task (or on other texts) and see how well it generalizes.

    python scripts/run_glue.py configs/glue/sst2.yaml --learning_rate 5e-5 --optim adamw_torch
    python scripts/run_glue.py --task_name sst2 --data_dir path/to/sst2 --output_dir outputs/sst2

The YAML file is optional; its keys are the options below, and options given after it win. Without a model,
embedded/minilm (extra [quickstart]) is fine-tuned; without do_train, do_eval and do_predict, training and evaluation
are done; optim defaults to dualadam with an inverse phase of a tenth of the steps.
"""

from hf_dualadam.extras import require_or_exit

require_or_exit("finetune")

from transformers import TrainingArguments

from hf_dualadam.finetuning import glue
from hf_dualadam.finetuning.config import parse, run_main, training_defaults
from hf_dualadam.finetuning.models import ModelArguments
from hf_dualadam.finetuning.training import RunArguments, check_output_dir, run, splits_needed, summary


def defaults(given):
    values = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 64, "learning_rate": 1.0e-4}
    return training_defaults(given) | values | {"output_dir": f"outputs/{given.get('task_name', 'glue')}"}


def main(argv=None):
    model_args, glue_args, run_args, args = parse(
        (ModelArguments, glue.GlueArguments, RunArguments, TrainingArguments),
        argv,
        defaults=defaults,
        description=__doc__,
    )
    check_output_dir(args, run_args.overwrite_output_dir)
    half = args.fp16 or args.bf16
    task = glue.build(glue_args, model_args, splits=splits_needed(args), pad_to_multiple_of=8 if half else None)
    finished = run(task, args, **run_args.options())
    print(summary(finished))
    return finished


if __name__ == "__main__":
    run_main(main)
