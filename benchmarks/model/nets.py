"""Networks that tests and benchmarks prune: factories without arguments that must be given.

All take images in [0, 1], as `nettrim.data.load` gives them, and normalise them in a first step without parameters.
Their weights are drawn from torch's global generator; `benchmarks.model.train_nets` trains them.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

#: mean and standard deviation over all pixels of the training images, of all three channels together for CIFAR-10
MNIST, CIFAR10 = (0.1307, 0.3081), (0.4734, 0.2516)


class Normalise(nn.Module):
    """Subtract a mean and divide by a standard deviation, the same for all pixels and channels.

    Plain numbers and no buffers: a state dict holds nothing of it, and a traced forward shows a subtraction and a
    division by constants.

    Parameters
    ----------
    mean, deviation : float
        `deviation` is not zero.
    """

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, images: Tensor) -> Tensor:
        """Return (images - mean) / deviation, of the same shape."""
        return (images - self.mean) / self.deviation

    def extra_repr(self) -> str:
        """Return what is printed between the brackets."""
        return f"mean={self.mean:g}, deviation={self.deviation:g}"


def lenet5() -> nn.Sequential:
    """Return LeNet-5 in the form that the pruning literature means by the name: 20-50-500-10, 431,080 parameters.

    The layout is that of Caffe's MNIST example, after LeCun, Bottou, Bengio and Haffner (1998): valid 5x5 convolutions,
    each with a ReLU and 2x2 max pooling, then 500 neurons with a ReLU, then 10 scores. Caffe's own has no ReLU behind
    its convolutions; here every layer but the last has one.

    Returns
    -------
    nn.Sequential
        Maps (B, 1, 28, 28) in [0, 1] to (B, 10). The weights are those of `conv1` (20, 1, 5, 5), `conv2`
        (50, 20, 5, 5), `fc1` (500, 800) and `fc2` (10, 500), all with biases.
    """
    return nn.Sequential(
        OrderedDict(
            normalise=Normalise(*MNIST),
            conv1=nn.Conv2d(1, 20, 5), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500), relu3=nn.ReLU(),
            fc2=nn.Linear(500, 10),
        )
    )  # fmt: skip


def mlp_mnist() -> nn.Sequential:
    """Return LeNet-300-100 for MNIST, 784-300-100-10, untrained: 266,610 parameters.

    The fully connected network of LeCun, Bottou, Bengio and Haffner (1998), with ReLUs.
    `benchmarks.model.lenet` has the same layers with weights that were published.

    Returns
    -------
    nn.Sequential
        Maps (B, 1, 28, 28) in [0, 1] to (B, 10). Its layers are `fc1` (300, 784), `fc2` (100, 300) and `fc3` (10, 100),
        all with biases.
    """
    return nn.Sequential(
        OrderedDict(
            normalise=Normalise(*MNIST),
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 300), relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100), relu2=nn.ReLU(),
            fc3=nn.Linear(100, 10),
        )
    )  # fmt: skip


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their input; the ReLU acts on the sum (He et al. 2016, Figure 2).

    Where the shape changes, the input goes through a 1x1 convolution with batch norm of its own, `shortcut` (option B
    of the paper; its own CIFAR-10 networks pad with zeros instead).

    Parameters
    ----------
    channels_in, channels_out : int
    stride : int
        Of the first convolution and of the shortcut.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
                    bn=nn.BatchNorm2d(channels_out),
                )
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) to (B, channels_out, H / stride, W / stride), rounded up."""
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(inputs)))))
        outputs: Tensor = self.relu2(inner + self.shortcut(inputs))
        return outputs


def resnet_cifar(width: int = 16, blocks: int = 1) -> nn.Sequential:
    """Return a ResNet for CIFAR-10 of 6 * blocks + 2 layers: He, Zhang, Ren and Sun (2016), section 4.2.

    A 3x3 convolution, then three stages of `blocks` basic blocks at 32, 16 and 8 pixels with `width`, 2 * `width` and
    4 * `width` channels, then the mean over all pixels and one Linear layer. Convolutions have no bias and are followed
    by batch norm.

    Parameters
    ----------
    width : int
        Channels of the first stage, at least 1.
    blocks : int
        n of the paper, at least 1: 1 is ResNet-8, 3 is ResNet-20.

    Returns
    -------
    nn.Sequential
        Maps (B, 3, 32, 32) in [0, 1] to (B, 10). Its layers are `conv`, `stage1.0.conv1`, ..., `stage3.0.shortcut.conv`
        and `fc`.
    """
    stages = [
        nn.Sequential(BasicBlock(before, after, stride), *(BasicBlock(after, after) for _ in range(blocks - 1)))
        for before, after, stride in ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
    ]
    return nn.Sequential(
        OrderedDict(
            normalise=Normalise(*CIFAR10),
            conv=nn.Conv2d(3, width, 3, padding=1, bias=False), bn=nn.BatchNorm2d(width), relu=nn.ReLU(),
            stage1=stages[0], stage2=stages[1], stage3=stages[2],
            pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
            fc=nn.Linear(4 * width, 10),
        )
    )  # fmt: skip


def vgg_bn_small(width: int = 32) -> nn.Sequential:
    """Return a small VGG for CIFAR-10: 32-32-M-64-64-M-128-128-M and one Linear layer, with batch norm.

    3x3 convolutions in blocks of two between 2x2 max pooling (M), after Simonyan and Zisserman (2015), with the batch
    norm of Ioffe and Szegedy (2015) between each convolution and its ReLU, as in torchvision's `vgg*_bn`. Convolutions
    have no bias.

    Parameters
    ----------
    width : int
        Channels of the first block, at least 1; the others have twice and four times as many.

    Returns
    -------
    nn.Sequential
        Maps (B, 3, 32, 32) in [0, 1] to (B, 10). Its layers are `conv1` ... `conv6` and `fc`.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict(normalise=Normalise(*CIFAR10))
    before = 3
    for block, channels in enumerate((width, 2 * width, 4 * width), 1):
        _add_convolutions(modules, before, channels, count=2)
        modules[f"pool{block}"] = nn.MaxPool2d(2)
        before = channels
    modules["flatten"] = nn.Flatten()
    modules["fc"] = nn.Linear(before * 4 * 4, 10)
    return nn.Sequential(modules)


def plain_cifar(width: int = 8) -> nn.Sequential:
    """Return a plain network for CIFAR-10 with more layers than it needs: 8 x4 - M - 16 x4 - M - 32 x4, mean, Linear.

    3x3 convolutions with batch norm and ReLU, three stages of four with 2x2 max pooling (M) between them, then the mean
    over all pixels and one Linear layer: a VGG whose stages are equally long. The last three convolutions of every
    stage map as many channels to as many, so that their neighbours fit each other without them. Convolutions have no
    bias.

    Parameters
    ----------
    width : int
        Channels of the first stage, at least 1; the others have twice and four times as many.

    Returns
    -------
    nn.Sequential
        Maps (B, 3, 32, 32) in [0, 1] to (B, 10). Its layers are `conv1` ... `conv12` and `fc`.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict(normalise=Normalise(*CIFAR10))
    before = 3
    for stage, channels in enumerate((width, 2 * width, 4 * width), 1):
        if stage > 1:
            modules[f"pool{stage - 1}"] = nn.MaxPool2d(2)
        _add_convolutions(modules, before, channels, count=4)
        before = channels
    modules["mean"] = nn.AdaptiveAvgPool2d(1)
    modules["flatten"] = nn.Flatten()
    modules["fc"] = nn.Linear(before, 10)
    return nn.Sequential(modules)


def _add_convolutions(modules: OrderedDict[str, nn.Module], before: int, channels: int, count: int) -> None:
    """Append `count` 3x3 convolutions with batch norm and ReLU, numbered on from those that are there."""
    number = sum(name.startswith("conv") for name in modules)
    for _ in range(count):
        number += 1
        modules[f"conv{number}"] = nn.Conv2d(before, channels, 3, padding=1, bias=False)
        modules[f"bn{number}"] = nn.BatchNorm2d(channels)
        modules[f"relu{number}"] = nn.ReLU()
        before = channels
