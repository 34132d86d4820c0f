"""DiffAugment (arXiv 2006.10738): differentiable random augmentation of a discriminator's inputs."""

import torch

from ..utils.randomness import ImageRandom


__all__ = ["DiffAugment"]


class DiffAugment:
    """Random colour, translation and cutout, different for every image; the defaults are RAE's.

    A strength of 0 disables an augmentation.

    Args:
        brightness: an offset from -brightness to brightness.
        saturation: a factor from 1 - saturation to 1 + saturation, on distances from the pixel's grey.
        contrast: a factor from 1 - contrast to 1 + contrast, on distances from the image's mean.
        translation: a shift in whole pixels, up to this share of the side, padded with zeros.
        cutout: side of a square of zeros, as a share of the image's sides, centred anywhere in it.

    Raises:
        ValueError: a strength outside [0, 1].
    """

    def __init__(
        self,
        brightness: float = 0.5,
        saturation: float = 1.0,
        contrast: float = 0.5,
        translation: float = 0.125,
        cutout: float = 0.0,
    ):
        self.strengths = {
            "brightness": brightness,
            "saturation": saturation,
            "contrast": contrast,
            "translation": translation,
            "cutout": cutout,
        }
        for name, strength in self.strengths.items():
            if not 0 <= strength <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {strength}")

    def __repr__(self) -> str:
        return f"DiffAugment({', '.join(f'{name}={value}' for name, value in self.strengths.items())})"

    def __call__(self, images: torch.Tensor, random: ImageRandom) -> torch.Tensor:
        """Augmented images (B, 3, H, W), fp32 and unclamped, of images in about [-1, 1]; differentiable.

        It consumes seven random numbers per image, whatever is enabled.
        """
        strength, images = self.strengths, images.float()
        colour, shift, center = random.uniform(len(images), 7).to(images.device).split([3, 2, 2], dim=1)
        brightness, saturation, contrast = (2 * colour - 1).view(-1, 3, 1, 1, 1).unbind(1)
        images = images + strength["brightness"] * brightness
        images = torch.lerp(images.mean(1, keepdim=True), images, 1 + strength["saturation"] * saturation)
        images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, 1 + strength["contrast"] * contrast)
        if strength["translation"]:
            images = _translate(images, strength["translation"], shift)
        if strength["cutout"]:
            images = images * _outside(images, strength["cutout"], center)
        return images


def _translate(images, share, numbers):
    """Images shifted down and right by whole pixels, uniformly from -share to share; numbers (B, 2) in [0, 1)."""
    for dim, number in zip((2, 3), numbers.unbind(1)):
        side = images.shape[dim]
        limit = round(share * side)
        shift = (number * (2 * limit + 1)).long() - limit
        source = torch.arange(side, device=images.device) - shift[:, None]  # (B, side)
        shape = [len(images), 1, 1, 1]
        shape[dim] = side
        inside = ((source >= 0) & (source < side)).view(shape)
        images = images.gather(dim, source.clamp(0, side - 1).view(shape).expand_as(images)) * inside
    return images


def _outside(images, share, center):
    """A mask (B, 1, H, W): 0 in a rectangle of `share` of both sides around `center` (B, 2) in [0, 1), else 1."""
    inside = []
    for side, position in zip(images.shape[2:], center.unbind(1)):
        width = round(share * side)
        start = (position * side).long()[:, None] - width // 2
        cells = torch.arange(side, device=images.device)
        inside.append((cells >= start) & (cells < start + width))
    rows, columns = inside
    return (~(rows[:, None, :, None] & columns[:, None, None, :])).to(images.dtype)
