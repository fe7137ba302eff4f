"""Train a network of `benchmarks.model.nets` from scratch, and store its weights with how they came about.

    python -m benchmarks.model.train_nets --net resnet8 --data cifar10:DIR --out FILE.safetensors

SGD with Nesterov momentum and a learning rate that rises and falls once; for CIFAR-10 with smoothed labels and images
shifted and mirrored at random. The weights are those after the last epoch: the test images only measure. It runs on one
thread of the CPU, so that the same seed gives the same weights again. Beside FILE.safetensors lies FILE.json: settings,
accuracies, seconds, host.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.model.nets import lenet5, mlp_mnist, plain_cifar, resnet_cifar, vgg_bn_small
from nettrim.data import Data, load
from nettrim.errors import DataError
from nettrim.network.training import check_classes, check_count, run_epochs
from nettrim.pipeline.evaluate import accuracy
from nettrim.pipeline.files import describe_place, digest_tensors

_BLOCK = 500  # images in one pass without gradients


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes
    ----------
    epochs : int
        Unless the command line says otherwise.
    learning_rate : float
        The highest one.
    batch_size : int
        Images in one step.
    weight_decay : float
        Quadratic penalty on all parameters.
    label_smoothing : float
        Share of the target that is spread over all classes (Szegedy et al. 2016, section 7).
    padding : int
        Pixels by which images are shifted at most; with any they are also mirrored. 0 leaves images as they are.
    momentum : float
        Nesterov's.
    rise : float
        Share of the steps in which the learning rate rises.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    padding: int = 0
    momentum: float = 0.9
    rise: float = 0.2


# for narrow networks, whose training takes minutes; small steps' noise costs less than fewer steps would
_SHORT = Recipe(epochs=16, learning_rate=0.1, batch_size=64, label_smoothing=0.05, padding=4)

#: name -> factory, recipe
NETS: dict[str, tuple[Callable[[], nn.Module], Recipe]] = {
    "lenet5": (lenet5, Recipe(epochs=8, learning_rate=0.05, batch_size=64)),
    "resnet8": (resnet_cifar, Recipe(epochs=60, learning_rate=0.2, batch_size=128, label_smoothing=0.05, padding=4)),
    "vgg": (vgg_bn_small, Recipe(epochs=20, learning_rate=0.1, batch_size=128, label_smoothing=0.1, padding=4)),
    "vgg_w16": (partial(vgg_bn_small, width=16), _SHORT),
    "plain_w8": (plain_cifar, _SHORT),
    "resnet32_w8": (partial(resnet_cifar, width=8, blocks=5), replace(_SHORT, epochs=9)),
    "mlp": (mlp_mnist, Recipe(epochs=5, learning_rate=0.05, batch_size=64)),
}


class ShiftAndMirror(nn.Module):
    """Augment images in training mode: each is padded with zeros, cropped to its size at random, and mirrored or not.

    He et al. (2016), section 4.2. In evaluation mode images pass as they are.

    Parameters
    ----------
    padding : int
        Pixels on every side, and so the largest shift.
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape; draws from torch's global generator."""
        if not self.training:
            return images
        count, _, height, width = images.shape
        device = images.device
        down, right = torch.randint(2 * self.padding + 1, (2, count, 1), device=device)
        rows = down + torch.arange(height, device=device)
        columns = right + torch.arange(width, device=device)
        mirrored = torch.rand(count, 1, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        which = torch.arange(count, device=device)[:, None, None]
        # gathered with the channels last and left so in memory: convolutions on a CPU are faster for it
        padded = F.pad(images, (self.padding,) * 4).permute(0, 2, 3, 1)
        return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def one_cycle(step: int, *, steps: int, rise: float) -> float:
    """Return the share of the highest learning rate at one step: up along a line, down to zero along a cosine.

    One cycle as in Smith and Topin (2018), with the cosine of Loshchilov and Hutter (2017) for the way down.

    Parameters
    ----------
    step : int
        0 ... `steps`.
    steps : int
        Of the whole training.
    rise : float
        Share of the steps on the way up, in [0, 1).
    """
    top = int(rise * steps)
    if step < top:
        return (step + 1) / (top + 1)
    return (1 + math.cos(math.pi * (step - top) / (steps - top))) / 2


def make(net: str, seed: int) -> nn.Module:
    """Return an untrained network of `NETS`, its weights decided by the seed; the caller's random numbers stay."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return NETS[net][0]()


def train_net(model: nn.Module, data: Data, recipe: Recipe, *, epochs: int, seed: int) -> list[tuple[float, float]]:
    """Train a network in place, and print the test accuracy after every epoch.

    Parameters
    ----------
    model : nn.Module
        Maps (B, ...) to (B, C) scores. Left in evaluation mode.
    data : Data
        With labels in both splits.
    recipe : Recipe
        Its `epochs` are not read.
    epochs : int
        Passes over the training images, at least 1.
    seed : int
        Decides shuffling and augmentation.

    Returns
    -------
    list of (float, float)
        Mean training loss and test accuracy, a fraction, of each epoch.

    Raises
    ------
    DataError
        The data have no test split or no labels.
    ProblemError
        `epochs` is out of range, the model does not fit the data, or the loss ceases to be finite.
    """
    check_count("epochs", epochs)
    if data.test is None or data.train.labels is None or data.test.labels is None:
        raise DataError(f"data {data.name!r} lack labels or a test split; pass data that have both")
    check_classes(model, data.train.inputs, data.train.labels)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay,
        nesterov=True,
    )  # fmt: skip
    steps = epochs * math.ceil(len(data.train.inputs) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(one_cycle, steps=steps, rise=recipe.rise))
    loss = partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
    augmented = nn.Sequential(ShiftAndMirror(recipe.padding), model) if recipe.padding else model
    seeds = torch.randint(2**31, (epochs,), generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for epoch, epoch_seed in enumerate(tqdm(seeds, disable=None), 1):
        # one epoch to a call, because the accuracy is wanted in between; the optimiser and its schedule go on
        history = run_epochs(
            augmented, data.train.inputs, data.train.labels, loss, optimiser, schedule,
            epochs=1, batch_size=recipe.batch_size, seed=epoch_seed,
        )  # fmt: skip
        found.append((history.losses[0], measure(model, data.test.inputs, data.test.labels)))
        tqdm.write(f"epoch {epoch}: loss {found[-1][0]:.4f}, test accuracy {100 * found[-1][1]:.2f} %")
    return found


def measure(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of images that a network in evaluation mode classifies rightly."""
    with torch.no_grad():
        return accuracy(torch.cat([model(block) for block in torch.split(images, _BLOCK)]), labels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one network, write its weights and how they came about."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", required=True, choices=list(NETS))
    parser.add_argument("--data", required=True, help="mnist:DIR, cifar10:DIR or FILE.npz")
    parser.add_argument("--out", required=True, type=Path, help="FILE.safetensors; FILE.json is written beside it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="if not those of the net's recipe")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".safetensors":
        parser.error(f"--out {options.out} does not end in .safetensors")
    torch.set_num_threads(1)
    data = load(options.data)
    recipe = NETS[options.net][1]
    epochs = recipe.epochs if options.epochs is None else options.epochs
    model = make(options.net, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    history = train_net(model, data, recipe, epochs=epochs, seed=options.seed)
    seconds = time.monotonic() - began
    state = model.state_dict()
    save_file(state, options.out)
    record = {
        "net": options.net,
        "data": data.name,
        "images": {"train": len(data.train.inputs), "test": 0 if data.test is None else len(data.test.inputs)},
        "seed": options.seed,
        "settings": asdict(recipe) | {"epochs": epochs},
        "accuracy": history[-1][1],
        "epochs": [{"loss": loss, "accuracy": correct} for loss, correct in history],
        "seconds": seconds,
        "weights": digest_tensors(state),
    } | describe_place()
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{options.net}: {100 * history[-1][1]:.2f} % of the test images, {seconds:.0f} s, {options.out}")


if __name__ == "__main__":
    main()
