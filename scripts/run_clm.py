"""Train a causal language model on text or instructions, and measure how well it generalizes.

    python scripts/run_clm.py configs/quickstart/clm.yaml
    python scripts/run_clm.py configs/clm/qwen_lora.yaml --train_file my_texts.jsonl --learning_rate 1e-4

The YAML file is optional; its keys are the options below, and options on the command line override it. Examples have a
column ``text``, or ``prompt`` and ``completion`` (only the completion is learned), or ``messages`` of a chat; a .txt
file holds texts separated by blank lines. Plain texts are joined into blocks of max_length (or block_size) tokens;
with packing=false each text is one example, truncated to max_length. Training uses TRL (extra [clm]), so the options
of SFTConfig apply: max_length, packing, completion_only_loss and so on. use_peft=true trains LoRA adapters, and
load_in_4bit=true quantizes the base model to 4 bits (bitsandbytes).
"""

from hf_dualadam.extras import require_or_exit

require_or_exit("clm")

import torch

from hf_dualadam.finetuning.config import parse, run_main, training_defaults
from hf_dualadam.finetuning.generation import generate_samples
from hf_dualadam.finetuning.tasks import task_kind
from hf_dualadam.finetuning.training import RunArguments, check_output_dir, decoration, run, splits_needed, summary


def defaults(given):
    # TRL's defaults are for large models on GPUs with bfloat16.
    on_gpu = torch.cuda.is_available()
    values = {"bf16": on_gpu and torch.cuda.is_bf16_supported(), "gradient_checkpointing": on_gpu}
    if given.get("packing") is False:
        values["join_texts"] = False  # keep texts separate
    return training_defaults(given) | values | {"output_dir": "outputs/clm"}


def main(argv=None):
    kind = task_kind("clm")
    *own, run_args, args = parse(
        (*kind.argument_classes, RunArguments, kind.training_arguments),
        argv,
        defaults=defaults,
        description=__doc__,
    )
    check_output_dir(args, run_args.overwrite_output_dir)
    task = kind.build(*own, training_args=args, splits=splits_needed(args))
    finished = run(task, args, **run_args.options())
    if (perplexity := finished.trainer.unigram_perplexity) is not None:
        finished.metrics["unigram_perplexity"] = perplexity
        finished.trainer.save_metrics("unigram", {"unigram_perplexity": perplexity})
    clm_args = own[0]
    samples = []
    with decoration("samples"):
        samples = generate_samples(
            finished,
            prompts=clm_args.generation_prompts,
            samples=clm_args.generation_samples,
            max_new_tokens=clm_args.max_new_tokens,
        )
    if finished.trainer.is_world_process_zero():
        for sample in samples:
            print(f"--- prompt:\n{sample['prompt']}\n--- completion:\n{sample['generated']}\n")
        print(summary(finished))
        if perplexity is not None:
            print(f"perplexity of a unigram model on the same tokens: {perplexity:.1f}")
    return finished


if __name__ == "__main__":
    run_main(main)
