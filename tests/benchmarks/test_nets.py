"""The networks: their layers are the papers', and training them leaves weights that can be read."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from benchmarks.model import train_nets
from benchmarks.model.nets import (
    CIFAR10,
    MNIST,
    BasicBlock,
    Normalise,
    lenet5,
    mlp_mnist,
    plain_cifar,
    resnet_cifar,
    vgg_bn_small,
)
from benchmarks.model.train_nets import NETS, Recipe, ShiftAndMirror, main, make, measure, one_cycle, train_net
from nettrim.data import Data, Split, load
from nettrim.errors import DataError, ProblemError
from nettrim.loading import load_model
from nettrim.pipeline.files import digest_tensors

SHAPES = dict.fromkeys(NETS, (3, 32, 32)) | {"lenet5": (1, 28, 28), "mlp": (1, 28, 28)}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def unsettled(model):
    """Give every batch norm statistics, scales and offsets that are not those of an identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.double().eval()


def normed(x, bn):
    shape = (1, -1, 1, 1)
    deviation = (bn.running_var + bn.eps).sqrt().view(shape)
    return (x - bn.running_mean.view(shape)) / deviation * bn.weight.view(shape) + bn.bias.view(shape)


def block_by_hand(block, x, stride):
    y = normed(F.conv2d(x, block.conv1.weight, stride=stride, padding=1), block.bn1).clamp(min=0)
    y = normed(F.conv2d(y, block.conv2.weight, padding=1), block.bn2)
    if "shortcut.conv.weight" in dict(block.named_parameters()):
        x = normed(F.conv2d(x, block.shortcut.conv.weight, stride=stride), block.shortcut.bn)
    return (y + x).clamp(min=0)


def random_data(shape, train=96, test=20, classes=10):
    generator = torch.Generator().manual_seed(7)

    def split(name, count):
        images = torch.rand(count, *shape, generator=generator)
        return Split(name, images, torch.randint(classes, (count,), generator=generator))

    return Data("random", split("train", train), split("test", test))


def npz(path, data):
    np.savez(
        path, inputs=data.train.inputs.numpy(), labels=data.train.labels.numpy(),
        test_inputs=data.test.inputs.numpy(), test_labels=data.test.labels.numpy(),
    )  # fmt: skip
    return str(path)


def run(out, net, data, *arguments):
    main(["--net", net, "--data", data, "--out", str(out), "--epochs", "2", *arguments])
    return load_file(out), json.loads(out.with_suffix(".json").read_text())


# the networks


def test_lenet5_is_what_its_layers_say():
    model = lenet5().double()
    layers = {name: tuple(module.weight.shape) for name, module in model.named_children() if hasattr(module, "weight")}
    assert layers == {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}
    assert parameters(model) == 431_080
    images = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    x = (images - 0.1307) / 0.3081
    x = F.max_pool2d(F.conv2d(x, model.conv1.weight, model.conv1.bias).clamp(min=0), 2)
    x = F.max_pool2d(F.conv2d(x, model.conv2.weight, model.conv2.bias).clamp(min=0), 2)
    x = (x.reshape(3, 800) @ model.fc1.weight.T + model.fc1.bias).clamp(min=0)
    torch.testing.assert_close(model(images), x @ model.fc2.weight.T + model.fc2.bias)


@pytest.mark.parametrize(("channels_in", "channels_out", "stride"), [(4, 4, 1), (4, 8, 2), (4, 6, 1), (4, 4, 2)])
def test_a_block_adds_before_its_last_relu_and_projects_where_the_shape_changes(channels_in, channels_out, stride):
    block = unsettled(BasicBlock(channels_in, channels_out, stride))
    projected = "shortcut.conv.weight" in dict(block.named_parameters())
    assert projected == ((channels_in, stride) != (channels_out, 1))
    x = torch.randn(2, channels_in, 7, 8, dtype=torch.float64)
    found = block(x)
    assert found.shape == (2, channels_out, math.ceil(7 / stride), math.ceil(8 / stride))
    torch.testing.assert_close(found, block_by_hand(block, x, stride))


def test_a_resnet_is_its_blocks_in_a_row():
    model = unsettled(resnet_cifar(width=4, blocks=2))
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    x = normed(F.conv2d((images - CIFAR10[0]) / CIFAR10[1], model.conv.weight, padding=1), model.bn).clamp(min=0)
    for stage, stride in ((model.stage1, 1), (model.stage2, 2), (model.stage3, 2)):
        x = block_by_hand(stage[1], block_by_hand(stage[0], x, stride), 1)
    assert x.shape == (2, 16, 8, 8)
    torch.testing.assert_close(model(images), x.mean((2, 3)) @ model.fc.weight.T + model.fc.bias)


def test_a_resnet_has_the_layers_and_weights_of_the_paper():
    # He et al. 2016, Table 6: 0.27 million parameters for 20 layers, 0.85 for 56
    for blocks, millions in ((3, 0.27), (9, 0.85)):
        model = resnet_cifar(blocks=blocks)
        counted = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name
        ]
        assert len(counted) == 6 * blocks + 2
        assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.006)
    assert parameters(resnet_cifar()) == 78_042
    assert parameters(resnet_cifar(width=24)) > 2 * 78_042
    biases = [m for m in resnet_cifar().modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert not biases


def test_the_mlp_is_what_its_layers_say():
    model = mlp_mnist().double()
    layers = {name: tuple(module.weight.shape) for name, module in model.named_children() if hasattr(module, "weight")}
    assert layers == {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
    assert parameters(model) == 266_610
    images = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    x = (images.reshape(3, 784) - 0.1307) / 0.3081
    x = (x @ model.fc1.weight.T + model.fc1.bias).clamp(min=0)
    x = (x @ model.fc2.weight.T + model.fc2.bias).clamp(min=0)
    torch.testing.assert_close(model(images), x @ model.fc3.weight.T + model.fc3.bias)


@pytest.mark.parametrize(("width", "count"), [(32, 307_946), (16, 82_554), (3, 4_606)])
def test_vgg_is_what_its_layers_say(width, count):
    model = unsettled(vgg_bn_small(width))
    assert parameters(model) == count
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    x = (images - CIFAR10[0]) / CIFAR10[1]
    for number, wide in enumerate((1, 1, 2, 2, 4, 4), 1):
        conv, bn = model.get_submodule(f"conv{number}"), model.get_submodule(f"bn{number}")
        assert conv.bias is None
        x = normed(F.conv2d(x, conv.weight, padding=1), bn).clamp(min=0)
        assert x.shape[1] == wide * width
        if number % 2 == 0:
            x = F.max_pool2d(x, 2)
    torch.testing.assert_close(model(images), x.reshape(2, 64 * width) @ model.fc.weight.T + model.fc.bias)
    assert parameters(vgg_bn_small()) == 307_946


@pytest.mark.parametrize("width", [8, 5])
def test_the_plain_network_is_what_its_layers_say(width):
    model = unsettled(plain_cifar(width))
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    x = (images - CIFAR10[0]) / CIFAR10[1]
    fitting = []
    for number in range(1, 13):
        if number in (5, 9):
            x = F.max_pool2d(x, 2)
        conv, bn = model.get_submodule(f"conv{number}"), model.get_submodule(f"bn{number}")
        assert conv.bias is None
        if conv.in_channels == conv.out_channels:
            fitting.append(number)
        x = normed(F.conv2d(x, conv.weight, padding=1), bn).clamp(min=0)
        assert x.shape[1] == width * 2 ** ((number - 1) // 4)
    assert fitting == [2, 3, 4, 6, 7, 8, 10, 11, 12]
    assert x.shape[2:] == (8, 8)
    torch.testing.assert_close(model(images), x.mean((2, 3)) @ model.fc.weight.T + model.fc.bias)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 12
    assert parameters(plain_cifar()) == 43_042


@pytest.mark.parametrize("net", list(NETS))
def test_a_traced_net_needs_no_tensor_but_its_layers(net):
    model = make(net, 0).eval()
    assert not [name for name in model.state_dict() if "normalise" in name]
    traced = torch.fx.symbolic_trace(model)
    assert not [node for node in traced.graph.nodes if node.op == "get_attr"]
    images = torch.rand(2, *SHAPES[net])
    assert model(images).shape == (2, 10)
    assert torch.equal(traced(images), model(images))


def test_normalise_prints_its_numbers():
    assert repr(Normalise(0.5, 0.25)) == "Normalise(mean=0.5, deviation=0.25)"


@pytest.mark.data
@pytest.mark.parametrize(("name", "numbers", "slack"), [("mnist", MNIST, 1e-4), ("cifar10", CIFAR10, 2e-3)])
def test_the_normalisation_is_that_of_the_training_images(data_directory, name, numbers, slack):
    if not (data_directory / name).is_dir():
        pytest.skip(f"no {name} in {data_directory}")
    images = load(f"{name}:{data_directory / name}").train.inputs
    # CIFAR-10's are of all five batches, of which there may be fewer
    assert (images.mean().item(), images.std().item()) == pytest.approx(numbers, abs=slack)


# training


def test_augmented_images_are_crops_of_the_padded_ones_and_all_occur():
    augment = ShiftAndMirror(1)
    image = torch.arange(1.0, 25.0).reshape(2, 3, 4)
    padded = torch.zeros(2, 5, 6)
    padded[:, 1:-1, 1:-1] = image
    allowed = {}
    for down in range(3):
        for right in range(3):
            crop = padded[:, down : down + 3, right : right + 4]
            allowed[tuple(crop.flatten().tolist())] = (down, right, False)
            allowed[tuple(crop.flip(2).flatten().tolist())] = (down, right, True)
    assert len(allowed) == 18
    images = image.expand(3600, 2, 3, 4)
    seen = Counter(allowed[tuple(crop.flatten().tolist())] for crop in augment(images))
    assert len(seen) == 18
    # 200 each, with a standard deviation of 13.7
    assert all(120 < count < 280 for count in seen.values())
    assert augment.eval()(images) is images


def test_every_image_is_augmented_from_itself():
    images = torch.arange(1.0, 6.0)[:, None, None, None].expand(5, 3, 8, 8)
    found = ShiftAndMirror(2)(images)
    assert found.shape == images.shape
    assert torch.equal(found.amax((1, 2, 3)), torch.arange(1.0, 6.0))
    assert torch.equal(found[:, :, 2:-2, 2:-2], images[:, :, 2:-2, 2:-2])


def test_the_learning_rate_rises_to_the_highest_and_falls_to_zero():
    shares = [one_cycle(step, steps=10, rise=0.4) for step in range(11)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[4:] == pytest.approx([(1 + math.cos(math.pi * k / 6)) / 2 for k in range(7)])
    assert shares[10] == 0
    assert one_cycle(0, steps=1, rise=0.2) == 1


def test_one_step_is_the_step_that_the_recipe_says():
    data = random_data((6,), train=8, classes=3)
    model = nn.Sequential(nn.Linear(6, 3)).double()
    data = replace(data, train=replace(data.train, inputs=data.train.inputs.double()),
                   test=replace(data.test, inputs=data.test.inputs.double()))  # fmt: skip
    recipe = Recipe(9, learning_rate=0.3, batch_size=8, weight_decay=0.1, label_smoothing=0.2, momentum=0.7)
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    ((loss, _),) = train_net(model, data, recipe, epochs=1, seed=0)
    targets = 0.8 * F.one_hot(data.train.labels, 3) + 0.2 / 3
    scores = data.train.inputs @ weight.T + bias
    assert loss == pytest.approx(-(targets * scores.log_softmax(1)).sum(1).mean().item())
    slope = (scores.softmax(1) - targets) / 8
    # Nesterov's first step is 1 + momentum times the gradient
    torch.testing.assert_close(
        model[0].weight.detach(), weight - 0.3 * 1.7 * (slope.T @ data.train.inputs + 0.1 * weight)
    )
    torch.testing.assert_close(model[0].bias.detach(), bias - 0.3 * 1.7 * (slope.sum(0) + 0.1 * bias))


def test_the_schedule_spans_all_epochs(monkeypatch):
    steps = []

    def spy(step, **settings):
        steps.append((step, settings["steps"]))
        return one_cycle(step, **settings)

    monkeypatch.setattr(train_nets, "one_cycle", spy)
    train_net(nn.Linear(6, 10), random_data((6,), train=20), Recipe(1, 0.1, batch_size=8), epochs=3, seed=0)
    assert steps == [(step, 9) for step in range(10)]


def test_training_learns_and_the_accuracy_is_of_the_test_images():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (400,), generator=generator)
    images = 0.2 * torch.rand(400, 1, 4, 4, generator=generator)
    images[labels == 1, :, 1:3, 1:3] += 0.8
    swapped = 1 - labels[300:]
    data = Data("spots", Split("train", images[:300], labels[:300]), Split("test", images[300:], swapped))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    history = train_net(model, data, Recipe(1, 0.5, batch_size=32, padding=1), epochs=8, seed=0)
    assert history[-1][0] < 0.5 * history[0][0]
    assert measure(model, images[:300], labels[:300]) > 0.97
    # the test labels are the wrong way round, so a good network is wrong on them
    assert history[-1][1] == measure(model, images[300:], swapped) < 0.03
    assert not model.training


def test_accuracy_is_over_all_blocks():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4))
    images, labels = torch.rand(1203, 3), torch.randint(4, (1203,))
    by_hand = sum(int(model(image[None]).argmax()) == int(label) for image, label in zip(images, labels, strict=True))
    assert measure(model, images, labels) == pytest.approx(by_hand / 1203)


@pytest.mark.parametrize("net", list(NETS))
def test_the_seed_decides_the_weights_and_leaves_the_callers_numbers(net):
    before = torch.get_rng_state()
    first, again, other = (digest_tensors(dict(make(net, seed).state_dict())) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("net", ["lenet5", "resnet8"])
def test_two_steps_leave_files_that_can_be_read(net, tmp_path, capsys):
    factory, recipe = NETS[net]
    data = random_data(SHAPES[net], train=recipe.batch_size)
    spec = npz(tmp_path / "data.npz", data)
    state, record = run(tmp_path / "new" / "net.safetensors", net, spec)
    assert record["net"] == net
    assert record["data"] == "data.npz"
    assert record["images"] == {"train": recipe.batch_size, "test": 20}
    assert record["settings"]["epochs"] == len(record["epochs"]) == 2
    assert record["settings"]["learning_rate"] == recipe.learning_rate
    assert record["seed"] == 0
    assert record["seconds"] > 0
    assert record["host"]["threads"] == 1
    assert record["weights"] == digest_tensors(state) != digest_tensors(dict(make(net, 0).state_dict()))
    counters = [tensor.item() for name, tensor in state.items() if name.endswith("num_batches_tracked")]
    assert counters == ([2] * 9 if net == "resnet8" else [])
    model = load_model(f"benchmarks.model.nets:{factory.__name__}", str(tmp_path / "new" / "net.safetensors"))
    assert measure(model.eval(), data.test.inputs, data.test.labels) == record["accuracy"]
    assert record["accuracy"] == record["epochs"][-1]["accuracy"]
    printed = capsys.readouterr().out
    assert f"epoch 2: loss {record['epochs'][1]['loss']:.4f}" in printed
    assert f"{100 * record['accuracy']:.2f} % of the test images" in printed


def test_the_same_seed_trains_the_same_weights(tmp_path):
    spec = npz(tmp_path / "data.npz", random_data(SHAPES["resnet8"], train=24))
    runs = {name: run(tmp_path / f"{name}.safetensors", "resnet8", spec, "--seed", seed)[1]
            for name, seed in (("first", "3"), ("again", "3"), ("other", "4"))}  # fmt: skip
    assert runs["first"]["weights"] == runs["again"]["weights"] != runs["other"]["weights"]
    assert runs["first"]["epochs"] == runs["again"]["epochs"]


def test_the_training_seed_shuffles_each_epoch_anew():
    seen = []

    class Watching(nn.Linear):
        def forward(self, inputs):
            if self.training:
                seen.append(inputs[:, 0].tolist())
            return super().forward(inputs)

    data = random_data((6,), train=12)
    for seed in (0, 1):
        train_net(Watching(6, 10), data, Recipe(1, 0.1, batch_size=12), epochs=2, seed=seed)
    assert len({tuple(order) for order in seen}) == len(seen) == 4
    assert len({tuple(sorted(order)) for order in seen}) == 1


def test_what_cannot_be_trained_is_refused(tmp_path):
    data = random_data((6,))
    recipe = Recipe(1, 0.1, batch_size=8)
    for broken in (
        replace(data, test=None),
        replace(data, train=replace(data.train, labels=None)),
        replace(data, test=replace(data.test, labels=None)),
    ):
        with pytest.raises(DataError, match="lack labels or a test split"):
            train_net(nn.Linear(6, 10), broken, recipe, epochs=1, seed=0)
    with pytest.raises(ProblemError, match="epochs is 0"):
        train_net(nn.Linear(6, 10), data, recipe, epochs=0, seed=0)
    with pytest.raises(ProblemError, match="fails on inputs of shape"):
        train_net(lenet5(), data, recipe, epochs=1, seed=0)
    with pytest.raises(SystemExit):
        main(["--net", "lenet5", "--data", npz(tmp_path / "data.npz", data), "--out", str(tmp_path / "net.pt")])
    assert not list(tmp_path.glob("net*"))
