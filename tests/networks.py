"""Small networks of every kind that can be pruned, with random but seeded weights, and a naive second opinion on them.

Weights have the scale that keeps activations of order one; the statistics of batch norms are random too, so that a
batch norm that is folded wrongly cannot pass for one that does nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUNDING = 1 + 1e-9


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a network with random weights and statistics; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(normal(parameter.shape) * (1.5 / parameter[0].numel()) ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * normal(parameter.shape))
            else:
                parameter.copy_(1 + 0.2 * normal(parameter.shape))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.copy_(0.3 * normal(module.running_mean.shape))
                module.running_var.copy_(0.5 + normal(module.running_var.shape).square())
    return model.eval()


def lenet5() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4),
    )  # fmt: skip


class Block(nn.Module):
    """ResNet-18's: two 3x3 convolutions, the second's ReLU behind the addition; a 1x1 shortcut where sizes change."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, 1, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        Block(3, 3, 1), Block(3, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


class PreActivation(nn.Module):
    """A residual block with its ReLUs before the layers: what the first layer gives goes past one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.two(F.relu(self.one(F.relu(h))))
        return self.head(F.relu(h))


def mobilenet() -> nn.Module:
    """Depthwise and pointwise convolutions; one block of the second version, whose ReLU6 is no ReLU."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, 1, 1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 5, stride=2), nn.ReLU(), nn.Conv1d(4, 5, 3, padding="same", dilation=2), nn.BatchNorm1d(5),
        nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(25, 3),
    )  # fmt: skip


class Branches(nn.Module):
    """Two ways from one layer, joined by concatenation; behind one lies a ReLU of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.left = nn.Linear(8, 5)
        self.right = nn.Linear(8, 4)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(torch.cat([F.relu(self.left(x)), torch.tanh(self.right(x))], dim=1))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)


class Attention(nn.Module):
    """A transformer block written out: one head by matmul and softmax, a ReLU feed-forward, both behind a norm.

    Its causal mask has the dtype of the scores and the least number of that, as masks of language models do.
    """

    def __init__(self, width: int = 6, hidden: int = 10) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        scores = torch.matmul(self.q(h), self.k(h).transpose(-2, -1)) / h.shape[-1] ** 0.5
        least = torch.finfo(scores.dtype).min
        mask = torch.full((x.shape[1], x.shape[1]), least, dtype=scores.dtype).triu(1)
        x = x + self.out(torch.softmax(scores + mask, dim=-1) @ self.v(h))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Flow(nn.Module):
    """Python decides: a loop over layers, a flag, a shape, a value."""

    def __init__(self, skip: bool = True) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.wide, self.narrow = nn.Linear(6, 5), nn.Linear(4, 5)
        self.last, self.never = nn.Linear(5, 3), nn.Linear(5, 3)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for index, step in enumerate(self.steps):
            h = step(h)
            if index < 2:
                h = F.relu(h)
            if self.skip and index == 1:
                h = h + x
        h = self.wide(h) if x.shape[1] > 4 else self.narrow(h)
        h = h.clamp(min=0)
        return self.last(h) if x.abs().mean() < 100 else self.never(h)


def opt() -> nn.Module:
    """OPT with tied embeddings, a token of 20."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, ffn_dim=12, num_attention_heads=2, word_embed_proj_dim=8,
        max_position_embeddings=16, dropout=0.1, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM(config)


def rows_of(*shape: int, samples: int) -> Callable[[], list[Any]]:
    """Return a maker of three batches of unequal size."""

    def make() -> list[Any]:
        x = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(7))
        return [x[:5], x[5 : samples // 2], x[samples // 2 :]]

    return make


def tokens() -> list[dict[str, Tensor]]:
    """Batches as a tokenizer gives them; the last tokens of some samples are padding."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(3, 20, (24, 6), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in ((3, 2), (10, 1), (17, 3)):
        ids[row, 6 - padding :] = 1
        mask[row, 6 - padding :] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(9), mask.split(9), strict=True)]


MAKERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "lenet5": (lenet5, rows_of(1, 16, 16, samples=60)),
    "vgg": (vgg, rows_of(2, 8, 8, samples=60)),
    "resnet": (resnet, rows_of(2, 8, 8, samples=24)),
    "pre-activation": (PreActivation, rows_of(5, samples=50)),
    "mobilenet": (mobilenet, rows_of(2, 8, 8, samples=24)),
    "conv1d": (conv1d, rows_of(2, 24, samples=60)),
    "branches": (Branches, rows_of(6, samples=60)),
    "encoder": (encoder, rows_of(4, 8, samples=24)),
    "attention": (Attention, rows_of(4, 6, samples=24)),
    "flow": (Flow, rows_of(6, samples=50)),
    "opt": (opt, tokens),
}


def network_of(name: str) -> nn.Module:
    """Return one of them, filled."""
    return seeded(MAKERS[name][0](), seed=sum(map(ord, name)))


def batches_of(name: str) -> list[Any]:
    """Return its samples."""
    return MAKERS[name][1]()


def call(model: nn.Module, batches: Sequence[Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """Run a copy of a model on every batch in a dtype and join the outputs."""
    twin = copy.deepcopy(model).to(dtype).eval()
    pieces = []
    # with gradients on, attention takes no other way than the one that is written down
    with torch.enable_grad():
        for batch in batches:
            if isinstance(batch, Mapping):
                pieces.append(twin(**batch).logits.detach())
            else:
                pieces.append(twin(batch.to(dtype)).detach())
    return torch.cat(pieces)


def seen(model: nn.Module, batches: Sequence[Any], modules: Sequence[str]) -> dict[str, Tensor]:
    """Return what single modules give, in float64, by hooks on a copy."""
    twin = copy.deepcopy(model).double().eval()
    found: dict[str, list[Tensor]] = {name: [] for name in modules}

    def note(name: str, value: Any) -> None:
        # the first of several is what attention gives; copied, because a ReLU behind may work in place
        found[name].append((value[0] if isinstance(value, tuple) else value).detach().clone())

    for name in modules:
        twin.get_submodule(name).register_forward_hook(lambda _module, _given, value, name=name: note(name, value))
    call(twin, batches)
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def assert_bounds_hold(ledger: Any) -> None:
    """Hold every error in a ledger against every bound on it."""
    for record in ledger.records:
        if record.promised is not None and record.rows == record.total_rows:
            assert record.measured <= record.promised * ROUNDING, f"{record.name}: promise"
        for name, bound in record.bounds.items():
            assert record.network_error <= bound * ROUNDING, f"{record.name}: {name}"
    assert "telescoped" in ledger.bounds
    assert ledger.bound == min(ledger.bounds.values())
    for name, bound in ledger.bounds.items():
        assert ledger.measured <= bound * ROUNDING, f"output: {name}"
