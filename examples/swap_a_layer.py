"""Swap the LSTM of an existing PyTorch model for llm_ext.LSTM: the same weights, the same results."""

import torch
from torch import Tensor, nn

import llm_ext


class Tagger(nn.Module):
    """An ordinary PyTorch model: it scores 10 tags for each token of a sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 64)
        self.lstm = nn.LSTM(64, 128, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.lstm(self.embedding(tokens))
        scores: Tensor = self.head(h)
        return scores


def main() -> None:
    torch.manual_seed(0)
    model, tokens = Tagger(), torch.randint(1000, (16, 40))
    before = model(tokens)

    llm_ext.convert(model)

    after = model(tokens)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    print(f"scores {list(after.shape)}, largest difference {(after - before).abs().max():.1e}")


if __name__ == "__main__":
    main()
