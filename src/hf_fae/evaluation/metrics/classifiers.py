"""Classification from features: k-NN, linear probes, and DINOv2's released classifier.

The protocols are those of DINOv2 (arXiv 2304.07193, evaluation scripts of its repository). Accuracies are in [0, 1].
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ...latents import check_finite
from ...utils.randomness import mix_seed
from ..options import check_positive


__all__ = [
    "LEARNING_RATES",
    "NEIGHBOURS",
    "POOLINGS",
    "LinearProbe",
    "knn_accuracy",
    "linear_probe",
    "pool_tokens",
    "released_head_accuracy",
    "released_head_logits",
    "standard_error",
]

POOLINGS = ("mean", "quadrants", "flatten")
# Both as in DINOv2. Learning rates are for batches of 256.
NEIGHBOURS = (10, 20, 100, 200)
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_EPS = 1e-6  # of the BatchNorm in MAE's linear probe
_QUERIES, _KEYS, _ROWS = 4096, 32768, 8192  # rows per block


def pool_tokens(tokens: torch.Tensor, grid: tuple[int, int], pooling: str) -> torch.Tensor:
    """Pool tokens to one vector per image.

    Args:
        tokens: (B, N, C), in row order.
        grid: height and width, N in all.
        pooling: "mean" (B, C); "quadrants" (B, 4C), the means of a 2 x 2 grid; "flatten" (B, N * C), all tokens, as
            MAETok (arXiv 2502.03444) probes latents: 128 x 32 = 4,096 inputs.

    Raises:
        ValueError: a grid with another number of cells, or an unknown pooling.
    """
    if grid[0] * grid[1] != tokens.shape[1]:
        raise ValueError(f"grid must have {tokens.shape[1]} cells as there are tokens, got {tuple(grid)}")
    if pooling == "mean":
        return tokens.mean(1)
    if pooling == "quadrants":
        maps = tokens.transpose(1, 2).unflatten(2, tuple(grid))
        return F.adaptive_avg_pool2d(maps, 2).flatten(1)
    if pooling == "flatten":
        return tokens.flatten(1)
    raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")


def standard_error(accuracy: float, count: int) -> float:
    """Standard error of an accuracy measured on `count` images: sqrt(p (1 - p) / n)."""
    return (accuracy * (1 - accuracy) / count) ** 0.5


def knn_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    features: torch.Tensor,
    labels: torch.Tensor,
    k: tuple[int, ...] | list[int] = NEIGHBOURS,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """Top-1 of DINOv2's weighted k-NN: the k nearest by cosine vote with exp(cosine / temperature).

    Args:
        train_features, train_labels: (N, D) and (N,) long, on any device; moved to `device` in blocks.
        features, labels: (M, D) and (M,).
        k: values above N are skipped.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite values, no k from 1 to N, or a temperature that is not
            positive.
    """
    _check("train_features", train_features, train_labels)
    _check("features", features, labels, train_features.shape[1])
    kept = sorted({count for count in k if count <= len(train_features)})
    if not kept or kept[0] < 1:
        raise ValueError(f"k must be from 1 to the {len(train_features)} train_features, got {list(k)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    classes, correct = _count_classes(train_labels, labels), dict.fromkeys(kept, 0)
    for queries, targets in zip(features.split(_QUERIES), labels.split(_QUERIES), strict=True):
        queries = F.normalize(queries.to(device).float(), dim=1)
        cosines, neighbours = (torch.empty(len(queries), 0, device=device, dtype=d) for d in (torch.float, torch.long))
        for start in range(0, len(train_features), _KEYS):
            keys = F.normalize(train_features[start : start + _KEYS].to(device).float(), dim=1)
            numbers = torch.arange(start, start + len(keys), device=device).expand(len(queries), -1)
            cosines, order = torch.cat([cosines, queries @ keys.T], 1).topk(min(kept[-1], start + len(keys)), dim=1)
            neighbours = torch.cat([neighbours, numbers], 1).gather(1, order)
        cosines, voters = cosines.cpu().double(), train_labels.cpu()[neighbours.cpu()]
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        for count in kept:
            votes = weights.new_zeros(len(queries), classes)
            votes.scatter_add_(1, voters[:, :count], weights[:, :count])
            correct[count] += int((votes.argmax(1) == targets.cpu()).sum())
    return {count: hits / len(features) for count, hits in correct.items()}


@dataclass
class LinearProbe:
    """The result of a sweep of linear classifiers.

    Attributes:
        accuracies: pooling -> learning rate (of batches of 256) -> top-1.
        pooling, learning_rate, accuracy: of the best one; the first of ties.
    """

    accuracies: dict[str, dict[float, float]]

    def __post_init__(self):
        found = [(top1, pooling, rate) for pooling, rates in self.accuracies.items() for rate, top1 in rates.items()]
        self.accuracy, self.pooling, self.learning_rate = max(found, key=lambda head: head[0])


def linear_probe(
    train: dict[str, torch.Tensor],
    train_labels: torch.Tensor,
    validation: dict[str, torch.Tensor],
    labels: torch.Tensor,
    *,
    learning_rates: tuple[float, ...] | list[float] = LEARNING_RATES,
    steps: int = 12_500,
    batch_size: int = 1024,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LinearProbe:
    """DINOv2's linear probe: a classifier for each pooling and learning rate, all trained on the same batches.

    SGD with momentum 0.9, without weight decay; learning rates of `rate * batch_size / 256` with cosine decay to 0;
    weights start from N(0, 0.01^2), biases from 0. Inputs are standardised per dimension by mean and variance of the
    training set, as by MAE's BatchNorm without affine. Unlike in DINOv2, images are not augmented and class tokens are
    not used.

    As in DINOv2, the best head is chosen on the validation set, which is slightly optimistic; `accuracies` has all.

    Args:
        train, validation: pooling -> (N, D) and (M, D), on any device; batches are moved to `device`.
        train_labels, labels: (N,) and (M,) long.
        steps, batch_size: by default DINOv2's for ImageNet, ten epochs.
        seed: of batch order and initial weights.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite values, no pooling or others in `validation`, no learning
            rate, or counts below 1.
    """
    check_positive(steps=steps, batch_size=batch_size)
    if not learning_rates or min(learning_rates) <= 0:
        raise ValueError(f"learning_rates must be positive numbers, got {list(learning_rates)}")
    if not train or train.keys() != validation.keys():
        raise ValueError(f"validation must have the poolings of train, {list(train)}, got {list(validation)}")
    for name, features in train.items():
        _check(f"train[{name!r}]", features, train_labels)
        _check(f"validation[{name!r}]", validation[name], labels, features.shape[1])
    from tqdm import tqdm

    classes = _count_classes(train_labels, labels)
    rates = torch.tensor(learning_rates, device=device) * batch_size / 256
    heads = {name: _Heads(features, classes, rates, seed, device) for name, features in train.items()}
    orders = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for step in tqdm(range(steps), desc="linear probe", unit="step", leave=False):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(train_labels), generator=orders)])
        batch, order = order[:batch_size], order[batch_size:]
        targets = train_labels[batch].to(device)
        for name, head in heads.items():
            head.step(train[name][batch].to(device), targets, step / steps)
    return LinearProbe(
        {
            name: dict(zip(learning_rates, head.accuracies(validation[name], labels), strict=True))
            for name, head in heads.items()
        }
    )


class _Heads:
    """The heads of one pooling as one matrix: R learning rates times K classes."""

    def __init__(self, features, classes, rates, seed, device):
        self.mean, self.scale = (values.to(device) for values in _standardisation(features))
        self.rates, self.classes = rates, classes
        # Every head starts from the same weights.
        weight = torch.randn(classes, features.shape[1], generator=torch.Generator().manual_seed(mix_seed(seed, 1)))
        self.weight = (0.01 * weight).repeat(len(rates), 1).to(device)
        self.bias = torch.zeros(len(rates) * classes, device=device)
        self.weight_momentum, self.bias_momentum = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, features):
        """Logits (B, R, K), and the standardised input (B, D)."""
        inputs = (features.float() - self.mean) * self.scale
        return F.linear(inputs, self.weight, self.bias).unflatten(1, (-1, self.classes)), inputs

    def step(self, features, targets, progress):
        """One step of every head on its mean cross-entropy, whose gradient is softmax - one-hot."""
        logits, inputs = self.logits(features)
        slopes = logits.softmax(-1)
        slopes -= F.one_hot(targets, self.classes)[:, None]
        slopes = slopes.flatten(1) / len(targets)
        rates = (self.rates * (1 + math.cos(math.pi * progress)) / 2).repeat_interleave(self.classes)
        self.weight_momentum.mul_(0.9).addmm_(slopes.T, inputs)
        self.bias_momentum.mul_(0.9).add_(slopes.sum(0))
        self.weight.addcmul_(rates[:, None], self.weight_momentum, value=-1)
        self.bias.addcmul_(rates, self.bias_momentum, value=-1)

    def accuracies(self, features, labels):
        """Top-1 for each learning rate."""
        hits = 0
        for rows, targets in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
            predicted = self.logits(rows.to(self.mean.device))[0].argmax(-1).cpu()
            hits = hits + (predicted == targets.cpu()[:, None]).sum(0)
        return (hits.double() / len(labels)).tolist()


def released_head_logits(model: nn.Module, class_tokens: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (B, K) of DINOv2's released classifier, from the class token and the mean of the patch tokens.

    Args:
        model: transformers' `Dinov2ForImageClassification` or `Dinov2WithRegistersForImageClassification`.
        class_tokens: (B, C), after the final norm.
        tokens: (B, N, C) patch tokens, or their means (B, 1, C).

    Raises:
        ValueError: another model, or tokens of another width.
    """
    if model.config.model_type not in ("dinov2", "dinov2_with_registers") or not hasattr(model, "classifier"):
        raise ValueError(f"model must be an image classifier of DINOv2, got a {type(model).__name__}")
    width = model.config.hidden_size
    if class_tokens.shape[-1] != width or tokens.shape[-1] != width:
        widths = f"{class_tokens.shape[-1]} and {tokens.shape[-1]}"
        raise ValueError(f"class_tokens and tokens must have the classifier's width {width}, got {widths}")
    return model.classifier(torch.cat([class_tokens, tokens.mean(1)], dim=1).to(model.dtype))


@torch.no_grad()
def released_head_accuracy(
    model: nn.Module, class_tokens: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor
) -> float:
    """Top-1 of FAE's training-free probe (arXiv 2512.07829, table 1), on reconstructed patch tokens.

    Class tokens are the encoder's own, as no tokenizer reconstructs them: the number is optimistic, comparable only
    with that of the original patch tokens.

    Args:
        model, class_tokens, tokens: as in `released_head_logits`, on any device.
        labels: (B,) long, the model's class ids.
    """
    batches = zip(class_tokens.split(_ROWS), tokens.split(_ROWS), labels.split(_ROWS), strict=True)
    hits = 0
    for class_token, token, label in batches:
        predicted = released_head_logits(model, class_token.to(model.device), token.to(model.device)).argmax(1)
        hits += int((predicted.cpu() == label.cpu()).sum())
    return hits / len(labels)


def _check(name, features, labels, width=None):
    if features.ndim != 2 or (width is not None and features.shape[1] != width) or not len(features):
        raise ValueError(f"{name} must have shape (N, {width or 'D'}) with N > 0, got {tuple(features.shape)}")
    if labels.shape != features.shape[:1] or labels.min() < 0:
        raise ValueError(f"labels of {name} must be {len(features)} class ids, got shape {tuple(labels.shape)}")
    check_finite(name, features)


def _count_classes(*labels):
    return 1 + max(int(values.max()) for values in labels)


def _standardisation(features):
    """Mean and reciprocal standard deviation (D,) of each dimension, fp32, computed in fp64."""
    mean = sum(rows.double().sum(0) for rows in features.split(_ROWS)) / len(features)
    variance = sum((rows.double() - mean).square().sum(0) for rows in features.split(_ROWS)) / len(features)
    return mean.float(), (variance + _EPS).rsqrt().float()
