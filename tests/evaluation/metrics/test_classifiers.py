"""Probes of features with known classes, against loops, other optimisers and the classifiers themselves."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
)

from hf_fae.evaluation.metrics import classifiers as probes
from hf_fae.evaluation.metrics.classifiers import (
    knn_accuracy,
    linear_probe,
    pool_tokens,
    released_head_accuracy,
    released_head_logits,
    standard_error,
)
from hf_fae.utils.randomness import mix_seed


def blobs(count, classes=4, width=6, distance=20.0):
    """Features in clusters far apart, and their classes."""
    labels = torch.arange(count) % classes
    centres = distance * F.one_hot(labels, width)
    return torch.randn(count, width) + centres, labels


def test_poolings():
    tokens = torch.arange(2 * 24 * 3.0).view(2, 24, 3)
    assert torch.equal(pool_tokens(tokens, (4, 6), "mean"), tokens.mean(1))
    assert torch.equal(pool_tokens(tokens, (4, 6), "flatten"), tokens.reshape(2, 72))
    quadrants = pool_tokens(tokens, (4, 6), "quadrants").view(2, 3, 2, 2)
    maps = tokens.transpose(1, 2).reshape(2, 3, 4, 6)
    torch.testing.assert_close(quadrants[..., 1, 0], maps[..., 2:, :3].mean((2, 3)))
    torch.testing.assert_close(quadrants.mean((2, 3)), tokens.mean(1))
    # MAETok's latents, and those of FAE
    assert pool_tokens(torch.zeros(1, 128, 32), (1, 128), "flatten").shape == (1, 4096)
    assert pool_tokens(torch.zeros(1, 256, 32), (16, 16), "quadrants").shape == (1, 128)


@pytest.mark.parametrize(
    ("grid", "pooling", "message"),
    [((4, 5), "mean", r"24 cells as there are tokens, got \(4, 5\)"), ((4, 6), "max", "got 'max'")],
)
def test_poolings_refuse(grid, pooling, message):
    with pytest.raises(ValueError, match=message):
        pool_tokens(torch.zeros(2, 24, 3), grid, pooling)


@pytest.mark.parametrize("keys", [7, 32768])
def test_knn_is_that_of_a_loop(monkeypatch, keys):
    monkeypatch.setattr(probes, "_KEYS", keys)
    monkeypatch.setattr(probes, "_QUERIES", 11)
    train, train_labels = blobs(60, distance=1.0)
    features, labels = blobs(50, distance=1.0)
    found = knn_accuracy(train, train_labels, features, labels, k=(1, 5, 50, 61), temperature=0.1)
    assert found.keys() == {1, 5, 50}
    for k, accuracy in found.items():
        hits = 0
        for feature, label in zip(features.double(), labels, strict=True):
            cosines = [(float(F.cosine_similarity(feature, key, dim=0)), number) for number, key in enumerate(train)]
            votes = [0.0] * 4
            for cosine, number in sorted(cosines, reverse=True)[:k]:
                votes[train_labels[number]] += 2.718281828459045 ** (cosine / 0.1)
            hits += votes.index(max(votes)) == label
        assert accuracy == hits / 50
        assert accuracy < 1


def test_clusters_are_told_apart_and_chance_is_chance():
    train, train_labels = blobs(200)
    features, labels = blobs(400)
    assert set(knn_accuracy(train, train_labels, features, labels, k=(1, 10, 40)).values()) == {1.0}
    probe = linear_probe({"mean": train}, train_labels, {"mean": features}, labels, steps=100, batch_size=64)
    assert probe.accuracy == 1.0
    random = torch.randint(4, (200,)), torch.randint(4, (400,))
    error = standard_error(0.25, 400)
    assert error == pytest.approx(0.0216506, abs=1e-6)
    noise = torch.randn(200, 6), torch.randn(400, 6)
    for accuracy in knn_accuracy(noise[0], random[0], noise[1], random[1], k=(1, 20)).values():
        assert abs(accuracy - 0.25) < 4 * error
    rates = linear_probe({"mean": noise[0]}, random[0], {"mean": noise[1]}, random[1], steps=20, batch_size=64)
    assert all(abs(accuracy - 0.25) < 4 * error for accuracy in rates.accuracies["mean"].values())


def train_with_sgd(features, labels, rate, steps, batch_size, seed):
    """A linear layer, trained by torch's own optimiser and schedule on the same batches."""
    layer = nn.Linear(features.shape[1], int(labels.max()) + 1)
    generator = torch.Generator().manual_seed(mix_seed(seed, 1))
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(layer.weight.shape, generator=generator))
        layer.bias.zero_()
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6, momentum=None)
    norm.train()(features)
    norm.running_var = features.var(0, correction=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate * batch_size / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
    orders = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // len(features))
    order = torch.cat([torch.randperm(len(features), generator=orders) for _ in range(epochs)])
    for batch in order.split(batch_size)[:steps]:
        optimizer.zero_grad()
        F.cross_entropy(layer(norm.eval()(features[batch])), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return lambda inputs: layer(norm(inputs))


@pytest.mark.parametrize("batch_size", [16, 100])
def test_heads_are_those_of_an_optimizer(batch_size):
    """Also where a batch is larger than the train set."""
    train, train_labels = blobs(70, distance=1.0)
    features, labels = blobs(2000, distance=1.0)
    rates = (1e-3, 0.01, 0.1, 0.5, 5.0)
    arguments = {"learning_rates": rates, "steps": 15, "batch_size": batch_size, "seed": 3}
    found = linear_probe({"a": train}, train_labels, {"a": features}, labels, **arguments).accuracies["a"]
    assert len(set(found.values())) == len(rates)
    for rate in rates:
        logits = train_with_sgd(train, train_labels, rate, 15, batch_size, 3)(features)
        assert found[rate] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=1e-7)


def test_heads_do_not_depend_on_each_other():
    train, train_labels = blobs(70, distance=1.0)
    features, labels = blobs(500, distance=1.0)
    arguments = {"steps": 30, "batch_size": 32}
    both = linear_probe(
        {"a": train, "b": train[:, :3]}, train_labels, {"a": features, "b": features[:, :3]}, labels, **arguments
    )
    alone = linear_probe(
        {"b": train[:, :3]}, train_labels, {"b": features[:, :3]}, labels, learning_rates=[1e-3, 0.1], **arguments
    )
    assert alone.accuracies["b"] == {rate: both.accuracies["b"][rate] for rate in (1e-3, 0.1)}
    assert len(both.accuracies["a"]) == 13
    assert both.accuracy == max(max(rates.values()) for rates in both.accuracies.values())
    assert both.accuracies[both.pooling][both.learning_rate] == both.accuracy


def test_inputs_are_standardised():
    """Of any scale and offset, also dimensions that never change."""
    train, train_labels = blobs(70, distance=1.0)
    features, labels = blobs(500, distance=1.0)
    scale, offset = torch.tensor([1e-2, 1, 1e3, 50, 0, 7]), torch.arange(6.0)
    train[:, 4] = features[:, 4] = 1
    arguments = {"steps": 30, "batch_size": 32}
    plain = linear_probe({"a": train}, train_labels, {"a": features}, labels, **arguments)
    scaled = linear_probe(
        {"a": train * scale + offset}, train_labels, {"a": features * scale + offset}, labels, **arguments
    )
    for rate, accuracy in plain.accuracies["a"].items():
        assert abs(scaled.accuracies["a"][rate] - accuracy) < 0.01


CLASSIFIERS = {
    "dinov2": (Dinov2Config, Dinov2ForImageClassification, {}),
    "registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification, {"num_register_tokens": 3}),
}


@pytest.fixture(params=CLASSIFIERS)
def classifier(request):
    config, model, options = CLASSIFIERS[request.param]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    return model(config(**sizes, num_labels=5, **options)).eval()


def test_released_head_is_the_classifier(classifier):
    images = torch.randn(3, 3, 32, 32)
    backbone = getattr(classifier, classifier.base_model_prefix)
    with torch.no_grad():
        expected = classifier(images).logits
        states = backbone(images).last_hidden_state
        tokens = states[:, -16:]
        torch.testing.assert_close(released_head_logits(classifier, states[:, 0], tokens), expected)
        means = tokens.mean(1, keepdim=True)
        torch.testing.assert_close(released_head_logits(classifier, states[:, 0], means), expected)
    labels = expected.argmax(1)
    assert released_head_accuracy(classifier, states[:, 0], tokens, labels) == 1.0
    labels[1] = (labels[1] + 1) % 5
    assert released_head_accuracy(classifier, states[:, 0], tokens, labels) == pytest.approx(2 / 3)


def test_released_head_refuses(classifier):
    with pytest.raises(ValueError, match="width 16, got 16 and 8"):
        released_head_logits(classifier, torch.zeros(2, 16), torch.zeros(2, 4, 8))
    backbone = getattr(classifier, classifier.base_model_prefix)
    with pytest.raises(ValueError, match="must be an image classifier of DINOv2, got a Dinov2"):
        released_head_logits(backbone, torch.zeros(2, 16), torch.zeros(2, 4, 16))


def knn(**changed):
    values = {"train_features": torch.randn(20, 4), "train_labels": torch.zeros(20, dtype=torch.long)}
    values |= {"features": torch.randn(5, 4), "labels": torch.zeros(5, dtype=torch.long), "k": (1,), **changed}
    return knn_accuracy(**values)


def probe(train_width=4, width=4, names=("a", "a"), count=5, **changed):
    train, validation = {names[0]: torch.randn(20, train_width)}, {names[1]: torch.randn(count, width)}
    labels = torch.zeros(20, dtype=torch.long), torch.zeros(5, dtype=torch.long)
    return linear_probe(train, labels[0], validation, labels[1], **{"steps": 1, "batch_size": 2, **changed})


@pytest.mark.parametrize(
    ("call", "changed", "message"),
    [
        (knn, {"k": (21, 30)}, r"k must be from 1 to the 20 train_features, got \[21, 30\]"),
        (knn, {"k": (0, 3)}, r"got \[0, 3\]"),
        (knn, {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        (knn, {"features": torch.randn(5, 3)}, r"features must have shape \(N, 4\).*got \(5, 3\)"),
        (knn, {"train_features": torch.randn(0, 4)}, r"train_features .* got \(0, 4\)"),
        (
            knn,
            {"labels": torch.zeros(6, dtype=torch.long)},
            r"labels of features must be 5 class ids, got .*\(6,\)",
        ),
        (knn, {"train_features": torch.full((20, 4), torch.nan)}, "train_features must be finite"),
        (probe, {"width": 3}, r"validation\['a'\] must have shape \(N, 4\)"),
        (probe, {"names": ("a", "b")}, r"the poolings of train, \['a'\], got \['b'\]"),
        (probe, {"count": 4}, "must be 4 class ids"),
        (probe, {"learning_rates": ()}, r"learning_rates must be positive numbers, got \[\]"),
        (probe, {"learning_rates": (0.1, -1)}, r"got \[0.1, -1\]"),
        (probe, {"steps": 0}, "steps must be at least 1, got 0"),
        (probe, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_refuse(call, changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)
