"""Samples from a trained language model. One that fails is skipped with a warning; it never fails the run."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from . import data
from .training import Run

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 24  # length of the prompt taken from a held-out text
FILE = "generation_results.json"


def generate_samples(
    run: Run, *, prompts: list[str] | None, samples: int, max_new_tokens: int
) -> list[dict[str, str]]:
    """Complete prompts with the trained model, and write them to generation_results.json in the output folder.

    Args:
        run: a finished run of a language model.
        prompts: by default from held-out examples.
        samples: largest number of held-out examples; 0 for none (``prompts`` are used anyway).
        max_new_tokens: length of a completion in tokens.

    Returns:
        ``prompt``, ``generated``, and for held-out examples ``reference``, as text.
    """
    trainer, tokenizer = run.trainer, run.trainer.processing_class
    held_out = run.task.eval_datasets.get("")
    rows = data.sample(held_out, samples) if held_out is not None and samples and not prompts else []
    wanted = [lambda text=prompt: {"prompt": text} for prompt in prompts or ()]
    wanted += [lambda row=row: prompt_and_reference(row, tokenizer) for row in rows]
    set_seed(trainer.args.seed)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    shown: list[dict[str, str]] = []
    reasons: list[str] = []
    for make in wanted:
        try:
            sample = make()
            sample["generated"] = _complete(model, tokenizer, sample["prompt"], max_new_tokens)
            shown.append(sample)
        except Exception as error:  # templates and models raise many types
            reasons.append(" ".join(str(error).split())[:200] or type(error).__name__)
    if reasons:
        logger.warning(f"{len(reasons)} of {len(wanted)} samples are skipped: {reasons[0]}")
    if shown and trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / FILE
        path.write_text(json.dumps(shown, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")
    return shown


def _complete(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise ValueError("an empty prompt")
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(output[0, length:], skip_special_tokens=True)


def prompt_and_reference(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Split a held-out example into a prompt and the reference completion.

    Raises:
        ValueError: the example has an empty prompt.
    """
    if "messages" in row:
        row = row | {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    if "prompt" in row:
        prompt, completion = row["prompt"], row["completion"]
        if not prompt:
            raise ValueError("an empty prompt")
        if isinstance(prompt, list):
            tools = row.get("tools")
            prompt = tokenizer.apply_chat_template(
                prompt,
                tokenize=False,
                add_generation_prompt=True,
                tools=json.loads(tools) if tools else None,
                **(row.get("chat_template_kwargs") or {}),
            )
            completion = "\n".join(_content(message) for message in completion)
        return {"prompt": prompt, "reference": completion}
    text = next(value for value in row.values() if isinstance(value, str))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = min(PROMPT_TOKENS, max(1, len(tokens) // 2))
    return {"prompt": tokenizer.decode(tokens[:start]), "reference": tokenizer.decode(tokens[start:])}


def _content(message: dict[str, Any]) -> str:
    """The text of a message, which may be null or a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""
