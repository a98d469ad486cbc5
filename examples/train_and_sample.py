"""Train a language model on characters of Shakespeare for a few seconds, and sample from it."""

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from llm_ext import LLM


def main(steps: int = 300) -> None:
    torch.manual_seed(0)
    text = (Path(__file__).parent / "shakespeare/input.txt").read_text()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(character) for character in text[:200_000]])

    V = len(characters)
    model = LLM(vocab_size=V, embedding_dim=32, hidden_dim=128, output_dim=V, n_layers=1, dropout=0.0, cell="gru")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - 65, (32, 1))
        chunk = ids[starts + torch.arange(65)]  # [32, 65]
        scores, _ = model(chunk[:, :-1])  # [32, 64, V]
        loss = cross_entropy(scores.flatten(0, 1), chunk[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f} nats per character")

    prompt = torch.tensor([characters.index(character) for character in "ROMEO:"])
    sampled = model.eval().generate(prompt, max_new_tokens=200, temperature=0.8)
    print("".join(characters[i] for i in sampled.tolist()))


if __name__ == "__main__":
    main()
