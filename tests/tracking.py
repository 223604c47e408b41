"""How far 8-bit moments take an update away from that of float32 moments, on gradients of real models."""

import collections
import pathlib
from typing import NamedTuple

import pytest
import torch

from hf_dualadam import DualAdam
from hf_dualadam.states import MOMENT_FORMATS

ROOT = pathlib.Path(__file__).parents[1]
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Error(NamedTuple):
    """Errors of one tensor: relative errors of m/d and of m*d, the largest |m/d|, and the median drift of log2 v."""

    update: float
    inverse: float
    largest: float
    drift: float


def compare(exact, coded, step):
    """The :class:`Error` of a tensor's decoded moments, both given as (m, v)."""
    ours, theirs = ((m, (v / (1 - BETA2**step)).sqrt() + EPS) for m, v in (exact, coded))
    there = exact[1] > 0
    drift = (coded[1][there].clamp_min(1e-38) / exact[1][there]).log2().median().item() if there.any() else 0.0
    return Error(
        update=_relative(ours[0] / ours[1], theirs[0] / theirs[1]),
        inverse=_relative(ours[0] * ours[1], theirs[0] * theirs[1]),
        largest=(theirs[0] / theirs[1]).abs().max().item(),
        drift=drift,
    )


def _relative(exact, coded):
    return ((coded - exact).norm() / exact.norm().clamp_min(1e-38)).item()


def track(model, loss_at, steps, lr, **options):
    """Train with float32 moments and feed the same gradients to an optimizer with ``options``: errors by tensor.

    Args:
        model: what is trained.
        loss_at: ``loss_at(step)`` is the loss of a batch.
        steps: number of steps.
        lr: learning rate of the training.
        options: of the optimizer that is measured.
    """
    params = list(model.parameters())
    shadows = [torch.nn.Parameter(p.detach().clone()) for p in params]
    exact = DualAdam(params, lr, switch_rate=1.0)
    coded = DualAdam(shadows, lr, switch_rate=1.0, **options)
    for step in range(1, steps + 1):
        loss_at(step).backward()
        for p, shadow in zip(params, shadows):
            shadow.grad = p.grad
        exact.step()
        coded.step()
        exact.zero_grad()
    errors = []
    for (name, p), shadow in zip(model.named_parameters(), shadows):
        if "in_proj_bias" not in name:  # the gradients of the keys' biases are 0 up to rounding
            errors.append(compare(exact.moments(p), coded.moments(shadow), steps))
    return errors


def share_in_eight_bits(model):
    """The fraction of a model's parameters that have 8-bit moments."""
    sizes = [(p.numel(), MOMENT_FORMATS[8].fits(p)) for p in model.parameters()]
    return sum(n for n, fits in sizes if fits) / sum(n for n, _ in sizes)


class DigitsViT(torch.nn.Module):
    """A vision transformer for 8x8 digits."""

    def __init__(self, width=64):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.position = torch.nn.Linear(4, width), torch.nn.Parameter(torch.randn(17, width) * 0.02)
        self.cls = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.norm, self.head = torch.nn.LayerNorm(width), torch.nn.Linear(width, 10)
        layer = torch.nn.TransformerEncoderLayer(width, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        """Logits of 10 digits."""
        x = self.embed(x.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(x), 16, 4))
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.encoder(x)[:, 0]))


def digits_loss(model):
    """``loss_at`` of batches of 64 digits."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32).view(-1, 8, 8), torch.tensor(y)
    generator = torch.Generator().manual_seed(0)

    def loss_at(step):
        rows = torch.randint(0, 1400, (64,), generator=generator)
        return torch.nn.functional.cross_entropy(model(x[rows]), y[rows])

    return loss_at


def words_model(source, width=64):
    """A bag of words and its ``loss_at``: most rows of the embedding have no gradient in a step.

    Args:
        source: ``docstrings``, of torch and of the standard library, told apart; or ``sst2``, skipped if absent.
        width: of the embedding.
    """
    sentences, labels = _docstrings() if source == "docstrings" else _sst2()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    count = collections.Counter(word for sentence in sentences for word in sentence)
    index = {word: i for i, (word, _) in enumerate(count.most_common(4000))}
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.EmbeddingBag(4001, width),
            "a": torch.nn.Linear(width, 64),
            "b": torch.nn.Linear(64, 2),
        }
    )
    torch.nn.init.normal_(model["embedding"].weight, std=0.1)

    def loss_at(step):
        rows = [order[i % len(order)] for i in range((step - 1) * 32, step * 32)]
        bags = [torch.tensor([index.get(w, 4000) for w in sentences[r]] or [4000]) for r in rows]
        offsets = torch.tensor([0, *(len(bag) for bag in bags[:-1])]).cumsum(0)
        hidden = torch.relu(model["a"](model["embedding"](torch.cat(bags), offsets)))
        return torch.nn.functional.cross_entropy(model["b"](hidden), torch.tensor([labels[r] for r in rows]))

    return model, loss_at


def _docstrings():
    import argparse
    import asyncio
    import collections
    import email
    import logging
    import statistics
    import unittest

    sentences, labels = [], []
    for label, modules in enumerate(([torch, torch.nn], [argparse, asyncio, collections, email, logging, statistics])):
        modules = modules if label == 0 else [*modules, unittest, pathlib]
        for module in modules:
            for name in sorted(dir(module)):
                for part in str(getattr(getattr(module, name), "__doc__", None) or "").split(". "):
                    words = [word for word in part.lower().split() if "torch" not in word]
                    if 4 <= len(words) <= 40:
                        sentences.append(words)
                        labels.append(label)
    return sentences, labels


def _sst2():
    path = ROOT.parent / "shared" / "data" / "glue" / "sst2" / "train.parquet"
    if not path.exists():
        pytest.skip("no SST-2 here")
    import pyarrow.parquet as pq

    table = pq.read_table(path).to_pydict()
    return [sentence.split() for sentence in table["sentence"]], table["label"]
