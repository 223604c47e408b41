"""A training loop with Accelerate in which DualAdam replaces AdamW.

    python scripts/accelerate_loop.py --mixed_precision bf16 --gradient_accumulation_steps 2
    accelerate launch scripts/accelerate_loop.py

A small network learns the 8x8 digits of scikit-learn: 1,437 training images, 360 held out. Takes seconds on a CPU.
"""

import argparse

from hf_dualadam.extras import require_or_exit

require_or_exit("finetune")

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from hf_dualadam import DualAdam


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no", help="fp16 needs a GPU")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    args = parser.parse_args(argv)

    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        cpu=args.cpu,
    )
    set_seed(0)
    images, labels = load_digits(return_X_y=True)
    arrays = train_test_split(images.astype("float32") / 16, labels, test_size=0.2, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, arrays)
    train = DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(test_x, test_y), batch_size=256)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

    train, test = accelerator.prepare(train, test)  # first, since it determines how many batches each process gets
    steps = args.epochs * -(-len(train) // args.gradient_accumulation_steps)
    switch_rate = min(1.0, 1 / (0.16 * steps))  # the inverse phase is the first 16 % of the steps
    optimizer = DualAdam(model.parameters(), lr=args.lr, weight_decay=0.01, switch_rate=switch_rate)
    model, optimizer = accelerator.prepare(model, optimizer)

    for epoch in range(args.epochs):
        model.train()
        for x, y in train:
            with accelerator.accumulate(model):  # the optimizer steps only after the last batch of each group
                loss = functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            correct = torch.cat([accelerator.gather_for_metrics(model(x).argmax(-1) == y) for x, y in test])
        accuracy = correct.float().mean().item()
        accelerator.print(f"epoch {epoch + 1}: training loss {loss.item():.4f}, held-out accuracy {accuracy:.4f}")
    return accuracy, optimizer


if __name__ == "__main__":
    main()
