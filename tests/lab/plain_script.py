"""A Trainer script that does not use hf_dualadam; its model has 15 weights and trains in a fraction of a second."""

from dataclasses import dataclass

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class DataArguments:
    """Options for the data, and for saving the metrics or crashing."""

    examples: int = 64
    save: bool = False
    crash: bool = False


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x, labels):
        logits = self.layer(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def make(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    noisy = x[:, :3] + 0.5 * torch.randn(count, 3, generator=generator)
    return [{"x": row, "labels": label} for row, label in zip(x, noisy.argmax(1), strict=True)]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main():
    data, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    sets = {"train_dataset": make(data.examples, 0), "eval_dataset": make(60, 1)}
    trainer = Trainer(Model(), args, compute_metrics=accuracy, **sets)
    trainer.train()
    if data.crash:
        raise RuntimeError("out of luck")
    metrics = trainer.evaluate()
    if data.save:
        trainer.save_metrics("eval", metrics)
        trainer.save_metrics("predict", trainer.predict(make(60, 2), metric_key_prefix="predict").metrics)


if __name__ == "__main__":
    main()
