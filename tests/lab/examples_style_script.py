"""Fine-tunes a text classifier like Transformers' example scripts: dataclasses, csv files, metrics saved to files."""

import sys
from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class DataTrainingArguments:
    train_file: str
    validation_file: str
    test_file: str
    max_seq_length: int = 16


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Folder or hub name"})


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    raw = load_dataset("csv", data_files=files, cache_dir=training_args.output_dir)
    data = raw.map(lambda rows: tokenizer(rows["sentence"], max_length=data_args.max_seq_length, truncation=True))
    model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, num_labels=2)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
    )
    if training_args.do_train:
        metrics = trainer.train().metrics
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.do_predict:
        metrics = trainer.predict(data["test"], metric_key_prefix="predict").metrics
        trainer.log_metrics("predict", metrics)
        trainer.save_metrics("predict", metrics)


if __name__ == "__main__":
    sys.exit(main())
