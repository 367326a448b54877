"""A PyTorch network on handwritten digits: the usual loop, with an optimizer whose arithmetic is a server's.

Start a server with `kedge-server serve --listen 127.0.0.1:50051`, then this with KEDGE_ADDRESS=127.0.0.1:50051. With
`--quorum 2` start it twice: a step is then the mean of two workers' gradients. It ends with the accuracy of the slow
weights on digits that were not trained on.
"""

import argparse
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

import kedge
import kedge.adapters.torch
from kedge import optim
from kedge.adapters.torch import RemoteOptimizer

BATCH_SIZE = 32
TEST_COUNT = 360


def load() -> tuple[Dataset, Dataset]:
    """Images of shape [64] with their labels: those to train with, and those to test with."""
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    counts = [len(digits) - TEST_COUNT, TEST_COUNT]
    train_digits, test_digits = random_split(digits, counts, generator=torch.Generator().manual_seed(0))
    return train_digits, test_digits


def batches(digits: Dataset) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random minibatches without end."""
    loader = DataLoader(digits, batch_size=BATCH_SIZE, shuffle=True)
    while True:
        yield from loader


def make_model() -> torch.nn.Module:
    """The network. All workers begin with the weights of the one that creates the run."""
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))


def train(model: torch.nn.Module, digits: Dataset, optimizer: RemoteOptimizer, steps: int) -> None:
    """Contributes until the run has made so many steps."""
    for images, labels in batches(digits):
        if optimizer.worker.step_number >= steps:
            return
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step(loss=loss, example_count=len(labels))
        if optimizer.worker.step_number % 100 == 0:
            rate = optimizer.param_groups[0]["lr"]
            print(f"step {optimizer.worker.step_number}: loss {loss:.3f}, rate {rate:g}", flush=True)


def accuracy(model: torch.nn.Module, digits: Dataset) -> float:
    """The share of images that the network reads right."""
    images, labels = next(iter(DataLoader(digits, batch_size=len(digits))))
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).float().mean())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train on digits against the server at KEDGE_ADDRESS.")
    parser.add_argument("--steps", type=int, default=500, help="stop when the run has made so many steps")
    parser.add_argument("--quorum", type=int, default=1, help="how many workers' gradients make a step")
    arguments = parser.parse_args()
    train_digits, test_digits = load()
    model = make_model()
    schedule = optim.StepLR(3e-3, step_size=250, gamma=0.3)
    with (
        kedge.connect() as client,
        RemoteOptimizer.create(
            model,
            client,
            "torch-digits",
            optim.Lookahead(optim.AdamW(lr=schedule), sync_period=5, alpha=0.5),
            aggregation=kedge.Synchronous(quorum=arguments.quorum),
            groups=[optim.Group("*.bias", weight_decay=0.0)],
        ) as optimizer,
    ):
        train(model, train_digits, optimizer, arguments.steps)
        model.load_state_dict(kedge.adapters.torch.pull(optimizer.run, "slow"))
    print(f"slow weights: accuracy {accuracy(model, test_digits):.3f}")


if __name__ == "__main__":
    main()
