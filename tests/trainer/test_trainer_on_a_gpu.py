"""Trainer with DualAdam on a GPU: mixed precision, the kernel's formats, exact resume."""

import pytest
import torch
from test_trainer import TinyModel, _data
from transformers import Trainer, TrainingArguments

from hf_dualadam.kernels import cuda

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


class WiderModel(TinyModel):
    """With a matrix that is large enough for 8-bit moments."""

    def __init__(self):
        super().__init__()
        layer = torch.nn.Linear(128, 128)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 128), torch.nn.Tanh(), layer, torch.nn.Linear(128, 1))


def _train(folder, resume=None, **options):
    defaults = {"optim": "dualadam", "per_device_train_batch_size": 8, "max_steps": 12, "logging_steps": 4}
    defaults |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2}
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    torch.manual_seed(0)
    trainer = Trainer(WiderModel(), arguments, train_dataset=_data(), eval_dataset=_data(16))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"fp16": True},
        {"optim": "invadam"},
        {"optim_args": "normalize_inverse=true"},
        {"optim_args": "state_bits=8"},
        {"optim_args": "state_bits=8,release_gradients=true", "max_grad_norm": 0.0},
    ],
    ids=str,
)
def test_training_takes_the_kernel_and_resumes_exactly(options, tmp_path):
    whole = _train(tmp_path / "whole", save_strategy="steps", save_steps=4, **options)
    optimizer = whole.optimizer.optimizer
    assert next(iter(optimizer.param_groups[0]["params"])).is_cuda
    parts = [part for plan in optimizer._plans.values() for part in plan.parts]
    assert parts and all(isinstance(part, cuda.Part) for part in parts)
    assert all(torch.isfinite(p).all() for p in whole.model.parameters())
    resumed = _train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-8"), **options)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
