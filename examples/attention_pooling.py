"""Classify sequences with AttentionPool, which learns to find the one vector that determines the class."""

import torch
from torch import Tensor, nn

from llm_ext import AttentionPool

CLASSES, FEATURES, LENGTH = 4, 16, 30


def make_batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return noise [size, LENGTH, FEATURES] with one marked vector per row, its class, and its index."""
    e, label = torch.randn(size, LENGTH, FEATURES), torch.randint(CLASSES, (size,))
    index = torch.randint(LENGTH, (size,))
    e[torch.arange(size), index] += 4 * nn.functional.one_hot(label, FEATURES)  # the class
    e[torch.arange(size), index, -1] += 6  # the mark
    return e, label, index


def main() -> None:
    torch.manual_seed(0)
    pool, head = AttentionPool(FEATURES, attn_dim=8, score="tanh"), nn.Linear(FEATURES, CLASSES)
    optimizer = torch.optim.Adam([*pool.parameters(), *head.parameters()], lr=2e-2)
    for _ in range(300):
        e, label, _ = make_batch(64)
        loss = nn.functional.cross_entropy(head(pool(e)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    e, label, index = make_batch(1000)
    c, weights = pool(e, need_weights=True)
    accuracy = (head(c).argmax(1) == label).float().mean()
    found = (weights.argmax(1) == index).float().mean()
    print(f"accuracy {accuracy:.3f}, attention is largest at the marked vector in {100 * found:.0f} % of the rows")


if __name__ == "__main__":
    main()
