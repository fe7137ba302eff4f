"""L-OBS against a slow obvious reference, and against what its authors published."""

import numpy as np
import pytest
import torch

from nettrim.errors import ProblemError
from nettrim.methods import LObs
from nettrim.methods.base import LayerTask


def task(weight, bias, inputs, sparsity):
    return LayerTask(
        name="fc", relu=True, last=False, clean=True, weight=weight, bias=bias, inputs=inputs,
        outputs=inputs @ weight.T, amount="sparsity", value=sparsity, dtype=torch.float64,
    )  # fmt: skip


def slow_reference(weight, inputs, damping, remove, protect):
    """The paper's loop: one removal at a time, the whole row updated, removed entries set to zero at once."""
    w = weight.clone()
    inverse = torch.linalg.inv(inputs.T @ inputs / inputs.shape[0] + damping * torch.eye(inputs.shape[1]).double())
    score = w**2 / (2 * inverse.diagonal())
    score[:, protect] = torch.inf
    for flat in torch.argsort(score.flatten(), stable=True)[:remove].tolist():
        m, q = divmod(flat, w.shape[1])
        w[m] -= w[m, q] / inverse[q, q] * inverse[:, q]
        w[m, q] = 0.0
    return w


@pytest.mark.parametrize("bias", ["kept", "pooled"])
def test_equals_one_removal_at_a_time(bias):
    x = torch.randn(50, 7, dtype=torch.float64)
    w, b = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    result = LObs(bias=bias).prune_layer(task(w, b, x, 0.6))
    ones = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    protect = [7] if bias == "kept" else []
    expected = slow_reference(torch.cat([w, b[:, None]], 1), ones, 1e-6, int(28 * 0.6), protect)
    # the reference lets removed weights grow again, and they are removed at the end as in the released code
    found = torch.cat([result.weight, result.bias[:, None]], 1)
    kept = found != 0
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-9, atol=1e-12)


def test_exact_count_with_kept_biases():
    w = torch.randn(5, 9, dtype=torch.float64)
    result = LObs().prune_layer(task(w, torch.randn(5, dtype=torch.float64), torch.randn(30, 9).double(), 0.8))
    assert int((result.weight == 0).sum()) == 36


def test_refuses_an_unknown_policy():
    with pytest.raises(ProblemError, match="kept or pooled"):
        LObs(bias="both")


@pytest.mark.data
@pytest.mark.parametrize(("layer", "error"), [(1, 96.9901), (2, 390.321), (3, 1293.01)])
def test_reproduces_the_weights_that_the_authors_shipped(data_directory, layer, error):
    """Their pruned LeNet-300-100: the last 55,000 training images, 80 % of every layer, biases in the pool."""
    from nettrim.data import load

    folder = data_directory / "lenet300-100"
    x = load(f"mnist:{data_directory / 'mnist'}").train.inputs[5000:].double().reshape(55_000, -1)
    arrays = [
        (
            torch.from_numpy(np.load(folder / f"w_layer{i}.npy")).double(),
            np.load(folder / f"b_layer{i}.npy").reshape(-1),
        )
        for i in (1, 2, 3)
    ]
    for weight, bias in arrays[: layer - 1]:
        x = (x @ weight + torch.from_numpy(bias).double()).clamp(min=0)
    weight, bias = arrays[layer - 1]
    result = LObs(bias="pooled").prune_layer(task(weight.T.contiguous(), torch.from_numpy(bias).double(), x, 0.8))
    shipped = torch.from_numpy(np.load(folder / "pruned-by-authors" / f"w_layer{layer}.npy")).double().T
    shipped_bias = torch.from_numpy(np.load(folder / "pruned-by-authors" / f"b_layer{layer}.npy")).double().reshape(-1)
    assert int(((shipped != 0) != (result.weight != 0)).sum()) == 0
    assert int(((shipped_bias != 0) != (result.bias != 0)).sum()) == 0
    assert float((result.weight - shipped).norm() / shipped.norm()) < 1e-6
    assert result.facts["E"] == pytest.approx(error, rel=5e-6)  # stated to six digits
