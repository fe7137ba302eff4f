"""Probes say what scikit-learn says, on samples that they did not see, and err as the differences do."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from nettrim.errors import MissingExtraError, ProblemError
from nettrim.methods import probes
from nettrim.methods.probes import ProbeCurve, probe


def graded(samples: int = 300, classes: int = 4):
    """Three sets of features, of which each tells the classes apart better than the one before."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (samples,), generator=generator)
    means = torch.randn(classes, 6, generator=generator)
    features = {}
    for name, level in (("f0", 0.2), ("f1", 0.5), ("f2", 1.5)):
        features[name] = 3 * (level * means[labels] + torch.randn(samples, 6, generator=generator)) + 7
    return features, labels


def directly(features, labels, train, test, regularisation):
    x = features.double().numpy()
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = labels.numpy()
    model = LogisticRegression(C=1 / (regularisation * len(train)), tol=1e-8, max_iter=5000).fit(x[train], y[train])
    chances = model.predict_proba(x[test])
    return chances, y[test]


def test_a_curve_is_that_of_scikit_learn():
    features, labels = graded()
    curve = probe(features, labels, seeds=2, regularisation=1e-2, held=0.3, seed=5)
    right, losses = {}, {}
    for name, values in features.items():
        for number in range(2):
            train, test = probes._split(labels.numpy(), 0.3, 5 + number)
            chances, wanted = directly(values, labels, train, test, 1e-2)
            right[name, number] = (chances.argmax(1) == wanted).astype(float)
            losses[name, number] = -np.log(chances[np.arange(len(wanted)), wanted])
    assert [point.name for point in curve.points] == list(features)
    assert (curve.trained, curve.held, curve.seeds, curve.unconverged) == (len(train), len(test), 2, 0)
    for k, point in enumerate(curve.points):
        both = [right[point.name, number] for number in range(2)]
        assert point.score == pytest.approx(np.mean([each.mean() for each in both]), abs=1e-12)
        assert point.loss == pytest.approx(np.mean([losses[point.name, n].mean() for n in range(2)]), rel=1e-3)
        means = [each.mean() for each in both]
        binomial = np.mean([np.sqrt(mean * (1 - mean) / len(test)) for mean in means])
        assert point.score_error == pytest.approx(max(binomial, np.std(means, ddof=1) / np.sqrt(2)), abs=1e-12)
        assert point.width == 6
        if k:
            before = curve.points[k - 1]
            paired = [right[point.name, n] - right[before.name, n] for n in range(2)]
            assert point.gain == pytest.approx(point.score - before.score, abs=1e-12)
            assert point.loss_gain == pytest.approx(before.loss - point.loss, abs=1e-12)
            within = np.mean([each.std() / np.sqrt(len(test)) for each in paired])
            over = np.std([each.mean() for each in paired], ddof=1) / np.sqrt(2)
            assert point.gain_error == pytest.approx(max(within, over), abs=1e-12)
    assert curve.points[0].gain == curve.points[0].gain_error == curve.points[0].loss_gain == 0
    assert curve.points[2].score > 0.9
    assert curve.points[1].gain > 0.1


def test_gains_of_like_features_are_surer_than_scores():
    """The differences are of the same samples: most of the chance in a score falls out of a gain."""
    features, labels = graded()
    first = features["f1"]
    curve = probe({"one": first, "two": first + 0.1 * features["f0"]}, labels)
    assert curve.points[1].gain_error < 0.6 * curve.points[1].score_error
    same = probe({"one": first, "two": first.clone()}, labels)
    assert same.points[1].gain == same.points[1].gain_error == same.points[1].loss_gain == 0


def test_labels_that_are_noise_give_chance():
    generator = torch.Generator().manual_seed(2)
    features, labels = torch.randn(1500, 8, generator=generator), torch.randint(5, (1500,), generator=generator)
    point = probe({"noise": features}, labels, seeds=4).points[0]
    assert abs(point.score - 0.2) < 4 * point.score_error
    assert point.loss > np.log(5) - 3 * point.loss_error


def test_what_is_trained_on_is_not_evaluated_on():
    labels = np.array([0] * 50 + [1] * 10 + [2] * 2 + [9])
    seen = []
    for seed in range(3):
        train, test = probes._split(labels, 0.3, seed)
        assert sorted([*train, *test]) == list(range(63))
        assert [int((labels[test] == c).sum()) for c in (0, 1, 2, 9)] == [15, 3, 1, 0]
        seen.append(tuple(test))
    assert len(set(seen)) == 3
    several = np.random.default_rng(0).integers(0, 2, (40, 3))
    train, test = probes._split(several, 0.25, 1)
    assert len(test) == 10
    assert sorted([*train, *test]) == list(range(40))


def test_several_labels_to_a_sample():
    features, classes = graded()
    labels = torch.stack([classes == 0, classes % 2 == 0, torch.zeros(300).bool()], dim=1)
    curve = probe(features, labels, seeds=1, regularisation=1e-2, seed=3)
    assert curve.measure == "mean average precision"
    train, test = probes._split(labels.numpy(), 0.3, 3)
    for k, values in enumerate(features.values()):
        precisions = []
        for column in range(2):  # the third is never there
            chances, wanted = directly(values, labels[:, column].long(), train, test, 1e-2)
            precisions.append(average_precision_score(wanted, chances[:, 1]))
        assert curve.points[k].score == pytest.approx(np.mean(precisions), rel=1e-3)
        assert curve.points[k].score_error == pytest.approx(np.std(precisions) / np.sqrt(2), rel=1e-2)
    assert curve.points[2].score > curve.points[0].score + 0.2
    same = probe(features, labels.float(), seeds=1, regularisation=1e-2, seed=3)
    assert same.points == curve.points


def test_constant_features_and_rare_classes_are_no_trouble():
    labels = torch.tensor([0, 1] * 40 + [2])
    features = torch.cat([labels[:, None] + 0.1 * torch.randn(81, 1), torch.full((81, 1), 1e6)], dim=1)
    assert probe({"a": features}, labels).points[0].score > 0.95
    dead = probe({"a": torch.zeros(81, 3)}, labels).points[0]
    assert dead.score == pytest.approx(0.5, abs=0.05)


def test_fits_that_are_cut_short_are_counted_and_not_warned_of(monkeypatch):
    features, labels = graded()
    monkeypatch.setattr(probes, "_ITERATIONS", 2)
    assert probe(features, labels, seeds=2).unconverged == 6


def test_a_curve_can_be_stored():
    features, labels = graded()
    curve = probe(features, labels, seeds=1)
    assert ProbeCurve.of_dict(json.loads(json.dumps(curve.as_dict()))) == curve
    assert probe(features, labels, seeds=1).points == curve.points
    assert probe(features, labels, seeds=1, seed=1).points != curve.points


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(20).long(), "all labels are 0"),
        (torch.arange(20).double(), "integer classes"),
        (torch.randint(7, (20, 4)) + 2, r"shape \(20, 4\)"),
        (torch.arange(19), "features are of 20 samples and labels of 19"),
        (torch.arange(20), "leaves none"),
    ],
)
def test_labels_that_are_no_labels_are_refused(labels, message):
    with pytest.raises(ProblemError, match=message):
        probe({"a": torch.randn(20, 3)}, labels)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingExtraError, match=r"nettrim\[demo\]"):
        probe({"a": torch.randn(20, 3)}, torch.arange(20) % 2)
