"""A tiny GPT on Python's own documentation: AdamW, SAM, late SAM and Functional SAM at equal cost.

    python examples/language_model.py              # a table of validation losses; --passes 300 --seeds 1: a quick look

Each method has the same number of gradient evaluations: where a step needs two, the training has half as many steps.
All have the same learning rate, warmup and cosine, each over its own steps. The text, 465,000 characters of language
reference (`pydoc_data.topics`), comes with Python; the last tenth is for validation.
"""

import argparse
import math
import pydoc_data.topics
import time
from statistics import mean

import torch
from torch import nn
from torch.nn import functional as F

from fastsam import FastSAM, functional_sam_closures, schedules

LAYERS, WIDTH, HEADS, LENGTH, BATCH_SIZE = 2, 64, 4, 64, 16
LR, WARMUP, WEIGHT_DECAY = 3e-3, 0.05, 0.1
LATE = 0.25

# Each: the fraction of the steps, the last ones, that perturb; whether by Functional SAM.
METHODS = {
    "AdamW": (0.0, False),
    "SAM": (1.0, False),
    "SAM, last quarter": (LATE, False),
    "Functional SAM": (1.0, True),
    "Functional SAM, last quarter": (LATE, True),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens, targets=None):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def load_text():
    """The characters as numbers: for training, for validation; and how many there are."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([alphabet[character] for character in text])
    train, validation = numbers.split([len(numbers) * 9 // 10, len(numbers) - len(numbers) * 9 // 10])
    return train, validation, len(alphabet)


def loss_of(logits, batch):
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


def draw_batch(text, generator):
    starts = torch.randint(len(text) - LENGTH, (BATCH_SIZE,), generator=generator)
    windows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def validate(model, text, windows=256):
    starts = torch.linspace(0, len(text) - LENGTH - 1, windows).long()
    losses = [
        loss_of(model(batch[:, :-1]), (None, batch[:, 1:]))
        for batch in torch.stack([text[start : start + LENGTH + 1] for start in starts]).split(64)
    ]
    return float(sum(losses)) / len(losses)


def train_model(fraction, is_functional, seed, passes, rho):
    """The validation loss after `passes` gradient evaluations."""
    train, validation, vocabulary = load_text()
    torch.manual_seed(seed)
    model, generator = GPT(vocabulary), torch.Generator().manual_seed(seed)
    steps = round(passes / (1 + fraction))
    optimizer = FastSAM(
        model.parameters(),
        torch.optim.AdamW,
        rho=rho,
        schedule=schedules.Late(fraction, steps),
        lr=LR,
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
    )

    def factor(step):
        done = step / steps
        return done / WARMUP if done < WARMUP else 0.5 + 0.5 * math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))

    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(steps):
        batch = draw_batch(train, generator)
        closure, ascent_closure = functional_sam_closures(model, loss_of, batch)
        # The first pass is the loss's gradient: plain SAM takes it twice.
        optimizer.step(closure if is_functional else ascent_closure, ascent_closure=ascent_closure)
        rates.step()
    return validate(model, validation)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--passes", type=int, default=400, help="gradient evaluations of each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rho", type=float, default=0.05)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(f"{options.passes} gradient evaluations of {BATCH_SIZE} x {LENGTH} characters, rho {options.rho:g}\n")
    print(f"{'method':30}  {'steps':>5}  validation loss: mean (min-max of {options.seeds} seeds)", flush=True)
    for name, (fraction, is_functional) in METHODS.items():
        runs = [(fraction, is_functional, seed, options.passes, options.rho) for seed in range(options.seeds)]
        losses = [train_model(*run) for run in runs]
        steps = round(options.passes / (1 + fraction))
        print(f"{name:30}  {steps:5}  {mean(losses):.3f} ({min(losses):.3f}-{max(losses):.3f})", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s on one thread")


if __name__ == "__main__":
    main()
