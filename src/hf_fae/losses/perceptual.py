"""Perceptual distances of images by frozen networks: LPIPS, class logits, and the features of any vision model."""

import os

import torch
from torch import nn
from torch.nn import functional as F

from ..encoders import VisionEncoder
from ..networks import TimmNetwork, load_hub_weights, read_config


__all__ = [
    "LPIPS",
    "EncoderLayers",
    "FeatureDistance",
    "LogitDistance",
    "WeightedDistance",
    "load_perceptual",
    "parse_term",
]


class _FrozenDistance(nn.Module):
    """A distance of images (B, 3, H, W) from targets of the same shape, both in [-1, 1]: a scalar from 0.

    Gradients reach the images only.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        """Stays in eval mode: batch norm statistics are part of the frozen network."""
        return super().train(False)


class FeatureDistance(_FrozenDistance):
    """Mean squared distance of two images' unit-normalised feature maps, over several stages of a frozen network.

    LPIPS without its learned weights (arXiv 1801.03924, eq. 1): at every position the feature vectors of a stage are
    scaled to length 1; their squared distances, each between 0 and 4, are averaged over positions, then over stages.

    Args:
        network: images (B, 3, H, W) in [-1, 1] -> list of maps (B, C, h, w) or tokens (B, N, C), differentiable.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str) -> "FeatureDistance":
        """From a timm model (its `features_only` stages) or a transformers vision model (four layers).

        Images are normalised with the model's own mean and std, and resized only where its input size is fixed.

        Args:
            pretrained_model_name_or_path: Hub id or local folder.

        Raises:
            ValueError: its `config.json` is neither timm's nor transformers'.
        """
        path, config = str(pretrained_model_name_or_path), read_config(pretrained_model_name_or_path)
        if "architecture" in config:
            network = TimmNetwork(path, features_only=True)
            # A third faster with EfficientNet-Lite0 on a CPU.
            return cls(network.to(memory_format=torch.channels_last))
        if "model_type" in config:
            return cls(EncoderLayers(VisionEncoder.from_pretrained(path, dtype=torch.float32)))
        raise ValueError(f"{path!r} must be a timm or a transformers model, but its config.json names no architecture")

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Features (B, positions, channels) of length 1, fp32, of images (B, 3, H, W) in [-1, 1], stage by stage."""
        stages = [stage.flatten(2).transpose(1, 2) if stage.ndim == 4 else stage for stage in self.network(images)]
        # In fp32: half precision overflows in the squares, and loses small differences of vectors of length 1.
        return [F.normalize(stage.float(), dim=-1) for stage in stages]

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The distance of images (B, 3, H, W) from targets of the same shape, both in [-1, 1]: a scalar in [0, 4].

        Gradients reach `images` only.
        """
        with torch.no_grad():
            targets = self.features(targets)
        pairs = zip(self.features(images), targets, strict=True)
        return torch.stack([(features - target).square().sum(-1).mean() for features, target in pairs]).mean()


class LogitDistance(_FrozenDistance):
    """Mean squared difference of two images' class logits.

    Args:
        network: images (B, 3, H, W) in [-1, 1] -> logits (B, classes), differentiable.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str) -> "LogitDistance":
        """From a timm classifier, at its own input size and with its own mean and std.

        Args:
            pretrained_model_name_or_path: Hub id or local folder.

        Raises:
            ValueError: it is not a timm model, or has no classes.
        """
        path = str(pretrained_model_name_or_path)
        if "architecture" not in read_config(path):
            raise ValueError(f"{path!r} must be a timm model, but its config.json names no architecture")
        network = TimmNetwork(path)
        if not network.model.num_classes:
            raise ValueError(f"{path!r} must be a classifier, but its config.json gives it no classes")
        return cls(network)

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The distance of images (B, 3, H, W) from targets of the same shape, both in [-1, 1]: a scalar from 0.

        Gradients reach `images` only.
        """
        with torch.no_grad():
            targets = self.network(targets).float()
        return F.mse_loss(self.network(images).float(), targets)


class LPIPS(_FrozenDistance):
    """The learned perceptual distance on VGG16 (arXiv 1801.03924), as computed by torchmetrics.

    Args:
        network: torchmetrics' network with its weights: (images, targets) in [-1, 1] -> (B, 1, 1, 1).
    """

    @classmethod
    def from_pretrained(cls, vgg16: str | None = None) -> "LPIPS":
        """With the learned heads from torchmetrics, and VGG16 from torchvision.

        Args:
            vgg16: a file with VGG16's ImageNet weights under torchvision's names, safetensors or a torch state dict;
                by default torchvision's own, downloaded into the cache of torch.hub.

        Raises:
            ValueError: the file lacks weights of VGG16.
            OSError: the file does not exist, or nothing is cached and the download fails.
        """
        from accelerate import init_empty_weights
        from torchmetrics.functional.image import lpips
        from torchvision.models import VGG16_Weights

        backbone = load_hub_weights(VGG16_Weights.IMAGENET1K_V1.url, vgg16, "vgg16", "lpips:FILE=WEIGHT")
        heads = os.path.join(os.path.dirname(lpips.__file__), "lpips_models", "vgg.pth")
        state = torch.load(heads, map_location="cpu", weights_only=True)
        with init_empty_weights():  # torchmetrics also builds VGG16's classifier, which it drops
            network = lpips._LPIPS(pretrained=False, net="vgg", pnet_rand=True)
        for name, parameter in network.net.named_parameters():
            source = f"features.{name.partition('.')[2]}"  # "slice2.5.weight" is torchvision's "features.5.weight"
            if source not in backbone or backbone[source].shape != parameter.shape:
                raise ValueError(
                    f"vgg16={vgg16!r} must hold torchvision's VGG16, but {source} of shape "
                    f"{tuple(parameter.shape)} is not in it"
                )
            state[f"net.{name}"] = backbone[source].float()
        # Not strict: the network has its heads under two names.
        network.load_state_dict(state, strict=False, assign=True)
        return cls(network)

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The distance of images (B, 3, H, W) from targets of the same shape, both in [-1, 1]: a scalar from 0.

        Gradients reach `images` only.
        """
        return self.distances(images, targets).mean()

    def distances(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As `forward`, for each image separately: (B,)."""
        return self.network(images, targets.detach()).float().flatten()


class WeightedDistance(nn.Module):
    """The weighted average of distances.

    Args:
        distances: modules (images, targets) -> scalar.
        weights: one for each, positive.
    """

    def __init__(self, distances: list[nn.Module], weights: list[float]):
        super().__init__()
        self.distances, self.weights = nn.ModuleList(distances), weights

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The distance of images (B, 3, H, W) from targets of the same shape, both in [-1, 1]: a scalar from 0."""
        pairs = zip(self.distances, self.weights, strict=True)
        return sum(weight * distance(images, targets) for distance, weight in pairs) / sum(self.weights)


_KINDS = {"lpips": LPIPS, "logits": LogitDistance, "features": FeatureDistance}


def load_perceptual(terms: list[str]) -> WeightedDistance:
    """The weighted average of perceptual distances, each given as "KIND=WEIGHT" or "KIND:SOURCE=WEIGHT".

    TiTok's recipe is `["lpips=1.0", "logits:timm/convnext_small.fb_in1k=0.1"]` with an overall weight of 1.1.

    Args:
        terms: KIND is `lpips` (SOURCE: a file with VGG16, by default torchvision's), `logits` (SOURCE: a timm
            classifier) or `features` (SOURCE: a timm or transformers model); SOURCE is a Hub id or a local path.

    Raises:
        ValueError: no terms, a term of another form, or a source that does not fit its kind.
        OSError: a source is not found.
    """
    if not terms:
        raise ValueError("terms must name at least one distance, got none")
    parsed = [_parse(term) for term in terms]  # all, before anything is loaded
    distances = [_KINDS[kind].from_pretrained(*source) for kind, source, _ in parsed]
    return WeightedDistance(distances, [weight for *_, weight in parsed])


def parse_term(term: str) -> tuple[str, str | None, float] | None:
    """(kind, source or None, weight) of "KIND=WEIGHT" or "KIND:SOURCE=WEIGHT"; None for any other text."""
    name, _, weight = term.rpartition("=")
    kind, colon, source = name.partition(":")
    try:
        weight = float(weight)
    except ValueError:
        return None
    if not 0 < weight < float("inf") or not kind or bool(colon) != bool(source):
        return None
    return kind, source or None, weight


def _parse(term):
    """(kind, [source] or [], weight) of "KIND:SOURCE=WEIGHT"."""
    kind, source, weight = parse_term(term) or (None, None, None)
    if kind not in _KINDS:
        raise ValueError(
            f"terms must be KIND:SOURCE=WEIGHT with a kind of {', '.join(_KINDS)} and a positive weight, got {term!r}"
        )
    if kind != "lpips" and not source:
        raise ValueError(f"terms must name a model for {kind} ({kind}:MODEL=WEIGHT), got {term!r}")
    return kind, [source] if source else [], weight


class EncoderLayers(nn.Module):
    """Patch tokens at the ends of the four quarters of a frozen encoder's layers, differentiable in the images.

    Args:
        encoder: any encoder.
        with_embeddings: put the input of the first layer in front of them.
    """

    count = 4

    def __init__(self, encoder: VisionEncoder, with_embeddings: bool = False):
        super().__init__()
        self.encoder, self.with_embeddings = encoder, with_embeddings

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Tensors (B, N, C), the last layer's last, before the final norm, of images (B, 3, H, W) in [-1, 1]."""
        embeddings, *states = self.encoder.compute_features(images, output_hidden_states=True).hidden_states
        quarters = [states[-(-len(states) * quarter // self.count) - 1] for quarter in range(1, self.count + 1)]
        return [embeddings, *quarters] if self.with_embeddings else quarters
