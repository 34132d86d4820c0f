"""Images and masks as inputs of a pipeline: what inpainting and image-to-image share."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..latents import check_finite, encode_images, latent_size


__all__ = ["ImageInput", "ImageInputMixin"]

ImageInput = Image.Image | np.ndarray | torch.Tensor | list


class ImageInputMixin:
    """For a [`LatentPipeline`] whose calls accept `image`, `mask_image` and `image_latents`."""

    def prepare_image_latents(
        self,
        shape: tuple[int, int, int, int],
        size: tuple[int, int],
        image: ImageInput | None,
        image_latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Latents of `shape` (B, C, H, W) in fp32, of images or as given; one image serves the whole batch.

        Args:
            size: height and width of the images in pixels.

        Raises:
            ValueError: neither or both of image and latents, another size or number, or no tokenizer for an image.
        """
        if (image is None) == (image_latents is None):
            raise ValueError(
                "either image or image_latents must be given with mask_image or strength, "
                f"got {'neither' if image is None else 'both'}"
            )
        name = "image_latents"
        if image is not None:
            name, image_latents = "latents of image", self.encode_image(image, size)
        batch_size, *rest = shape
        if list(image_latents.shape[1:]) != rest or len(image_latents) not in (1, batch_size):
            raise ValueError(
                f"{name} must have shape (1 or {batch_size}, {', '.join(map(str, rest))}), "
                f"got {tuple(image_latents.shape)}"
            )
        check_finite(name, image_latents)
        return image_latents.to(self._execution_device, torch.float32).expand(shape)

    def encode_image(self, image: ImageInput, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Latents of images, the means of their posteriors.

        Args:
            size: height and width that the images must have; by default those of training.

        Raises:
            ValueError: no tokenizer, or images of another size.
        """
        if self.vae is None:
            raise ValueError("image must be None for a pipeline without vae, which accepts image_latents, got images")
        pixel_values, size = self.image_processor.preprocess(image), size or self.image_size
        if tuple(pixel_values.shape[2:]) != size:
            wanted, got = (" x ".join(map(str, sides)) for sides in (size, pixel_values.shape[2:]))
            raise ValueError(f"image must be {wanted} (height x width) as the output, got {got}")
        return encode_images(self.vae, pixel_values.to(self._execution_device, self.vae.dtype)).mean

    def prepare_mask(
        self,
        batch_size: int,
        mask_image: ImageInput,
        grid: tuple[int, int] | None = None,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """What to generate anew, (batch_size, rows * columns) bool: cells of the grid with a pixel of at least 1/2.

        Args:
            mask_image: white in images and 1 in tensors, of the size of the images or of the grid; for 1-D tokenizers
                of the grid alone.
            grid: rows and columns; by default those of the transformer's tokens.
            size: height and width of the images in pixels; by default those of training.

        Raises:
            ValueError: another type, size or number of masks.
        """
        grid, size, masks = grid or self.transformer.grid, size or self.image_size, _to_planes(mask_image)
        sizes = [grid]
        if self.vae is not None:
            if latent_size(self.vae, *size) == tuple(side // self.vae_scale_factor for side in size):
                sizes.append(size)
        if tuple(masks.shape[1:]) not in sizes or len(masks) not in (1, batch_size):
            allowed = " or ".join(str(each) for each in sizes)
            raise ValueError(
                f"mask_image must be 1 or {batch_size} of (height, width) {allowed}, got {tuple(masks.shape)}"
            )
        check_finite("mask_image", masks)
        is_unknown = F.adaptive_max_pool2d(masks[:, None], grid).flatten(1) >= 0.5
        return is_unknown.to(self._execution_device).expand(batch_size, -1)


def _to_planes(masks):
    """Masks (n, height, width) in fp32 from an image, an array or a tensor, or from a list of these."""
    planes = []
    for mask in masks if isinstance(masks, (list, tuple)) else [masks]:
        if isinstance(mask, Image.Image):
            mask = np.array(mask.convert("L"), dtype=np.float32) / 255
        if not isinstance(mask, (np.ndarray, torch.Tensor)):
            raise ValueError(f"mask_image must be images, arrays or tensors, got a {type(mask).__name__}")
        planes.append(torch.atleast_2d(torch.as_tensor(mask)).float()[None].flatten(0, -3))
    sizes = sorted({tuple(plane.shape[1:]) for plane in planes})
    if len(sizes) != 1:
        raise ValueError(f"mask_image must have masks of one (height, width), got {sizes}")
    return torch.cat(planes)
