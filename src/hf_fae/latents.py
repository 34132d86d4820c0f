"""Contract 2: what all tokenizers share. Normalised latents, and images larger than memory in slices and tiles.

A tokenizer of ours normalises its latents itself. For diffusers' own autoencoders (`AutoencoderKL`), whose users have
to do it, the functions here do: their callers never see a scaling factor.
"""

from collections.abc import Callable

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin, DiagonalGaussianDistribution


__all__ = [
    "MAX_LOGVAR",
    "MIN_LOGVAR",
    "LatentAutoencoderMixin",
    "blend_tiles",
    "check_finite",
    "compression_ratio",
    "decode_latents",
    "encode_images",
    "image_size",
    "latent_size",
    "latent_statistics",
    "normalized_posterior",
]

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0  # of a posterior, as everywhere in latent diffusion


def normalized_posterior(moments: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> DiagonalGaussianDistribution:
    """The Gaussian of (z - mean) / std, given the moments (B, 2C, H, W) of the Gaussian of z: mean, then log-variance.

    The log-variance of z is clamped to [-30, 20].
    """
    z_mean, z_logvar = moments.float().chunk(2, dim=1)
    mean, std = (value.to(moments.device, torch.float32) for value in (mean, std))
    normalized = torch.cat([(z_mean - mean) / std, z_logvar.clamp(MIN_LOGVAR, MAX_LOGVAR) - 2 * std.log()], dim=1)
    return DiagonalGaussianDistribution(normalized.to(moments.dtype))


def latent_statistics(vae: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation by which a tokenizer's latents are normalised: (C, 1, 1) or (C, H, W), fp32.

    Those of diffusers are in its config: a scaling factor, sometimes a shift or values per channel.
    """
    if isinstance(vae, LatentAutoencoderMixin):
        return vae.latents_mean, vae.latents_std
    config = vae.config
    mean = config.get("latents_mean") or config.get("shift_factor") or 0.0
    std = torch.tensor(config.get("latents_std") or 1.0) / config.scaling_factor
    shape = (config.latent_channels, 1, 1)
    return tuple(torch.as_tensor(value).float().view(-1, 1, 1).expand(shape) for value in (mean, std))


def encode_images(vae: torch.nn.Module, pixel_values: torch.Tensor) -> DiagonalGaussianDistribution:
    """The posterior of the normalised latents of images (B, 3, H, W) in [-1, 1], of our or diffusers' autoencoders."""
    posterior = vae.encode(pixel_values).latent_dist
    if isinstance(vae, LatentAutoencoderMixin):
        return posterior
    return normalized_posterior(posterior.parameters, *latent_statistics(vae))


def decode_latents(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W), about [-1, 1] and unclamped, from normalised latents (B, C, h, w) of any dtype."""
    if not isinstance(vae, LatentAutoencoderMixin):
        # On the latents' device: an offloaded vae is still on another.
        mean, std = (value.to(latents.device) for value in latent_statistics(vae))
        latents = latents.float() * std + mean
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0]


def compression_ratio(vae: torch.nn.Module) -> int:
    """Image pixels per latent, along each axis; of a 1-D tokenizer, per patch."""
    if isinstance(vae, LatentAutoencoderMixin):
        return vae.spatial_compression_ratio
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_size(vae: torch.nn.Module, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the latents of images of this size.

    Raises:
        ValueError: a size that the tokenizer does not support.
    """
    if isinstance(vae, LatentAutoencoderMixin):
        return vae.latent_size(height, width)
    ratio = compression_ratio(vae)
    return height // ratio, width // ratio


def image_size(vae: torch.nn.Module, rows: int, columns: int) -> tuple[int, int]:
    """Height and width of the images of latents of this size."""
    if isinstance(vae, LatentAutoencoderMixin):
        return vae.image_size(rows, columns)
    ratio = compression_ratio(vae)
    return rows * ratio, columns * ratio


def _starts(size: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin; the last one ends flush with the image."""
    return [*range(0, max(size - tile, 0), stride), max(size - tile, 0)]


def blend_tiles(
    function: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    tile: tuple[int, int],
    input_unit: int,
    output_unit: int,
) -> torch.Tensor:
    """Apply `function` to overlapping tiles of `inputs` (B, C, H, W) and blend the results linearly.

    Args:
        tile: height and width of a tile in latent cells; neighbours overlap by a quarter, rounded down.
        input_unit, output_unit: pixels of a latent cell in the inputs and in the outputs (1 where they are latents).
    """
    rows, columns = inputs.shape[2] // input_unit, inputs.shape[3] // input_unit
    total = weight = None
    for top in _starts(rows, tile[0], tile[0] - tile[0] // 4):
        for left in _starts(columns, tile[1], tile[1] - tile[1] // 4):
            window = inputs[
                :,
                :,
                top * input_unit : (top + tile[0]) * input_unit,
                left * input_unit : (left + tile[1]) * input_unit,
            ]
            piece = function(window)
            if total is None:
                shape = (*piece.shape[:2], rows * output_unit, columns * output_unit)
                total = piece.new_zeros(shape, dtype=torch.float32)
                weight = piece.new_zeros((1, 1, *shape[2:]), dtype=torch.float32)
            height, width = piece.shape[2:]
            ramp = _hat(height, piece.device)[:, None] * _hat(width, piece.device)
            y, x = top * output_unit, left * output_unit
            total[:, :, y : y + height, x : x + width] += piece.float() * ramp
            weight[:, :, y : y + height, x : x + width] += ramp
    return (total / weight).to(piece.dtype)


def _hat(size: int, device: torch.device) -> torch.Tensor:
    """Weights (size,) that rise from the border to the middle, so that neighbouring tiles blend."""
    position = torch.arange(size, device=device, dtype=torch.float32)
    return torch.minimum(position + 1, size - position)


class LatentAutoencoderMixin(AutoencoderMixin):
    """Latent statistics, slicing and tiling for a tokenizer.

    A tokenizer calls `init_latent_statistics` in `__init__`; `encode` then returns and `decode` accepts latents
    (B, C, H, W) of zero mean and unit variance over the data set, and callers see no mean, std or scaling factor.
    """

    _keep_in_fp32_modules = ["latents_mean", "latents_std"]

    def init_latent_statistics(self, *shape: int, tile: tuple[int, int] | None) -> None:
        """Make the statistics buffers of `shape`: (C, 1, 1) per channel or (C, H, W) per element; identity at first.

        `tile` is the height and width in latent cells above which `enable_tiling` works in tiles of that size; None
        for a tokenizer that does not support tiling.
        """
        self.register_buffer("latents_mean", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("latents_std", torch.ones(shape, dtype=torch.float32))
        self.use_slicing = False
        if tile is not None:
            self.use_tiling = False
        self._tile = tile

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latents of images of this size.

        Raises:
            ValueError: a size that the tokenizer does not support; the base supports all.
        """
        ratio = self.spatial_compression_ratio
        return height // ratio, width // ratio

    def image_size(self, rows: int, columns: int) -> tuple[int, int]:
        """Height and width of the images of latents of this size."""
        ratio = self.spatial_compression_ratio
        return rows * ratio, columns * ratio

    def _check_sides(self, requirement, got, expected, in_tiles=False):
        """Refuse other sides than those expected; with `in_tiles`, larger ones pass where tiling is enabled."""
        in_tiles = in_tiles and hasattr(self, "use_tiling")
        if got == expected or (in_tiles and self.use_tiling and got[0] >= expected[0] and got[1] >= expected[1]):
            return
        larger = ", or larger after enable_tiling()" if in_tiles else ""
        raise ValueError(f"{requirement} {expected[0]} x {expected[1]}{larger}, got {got[0]} x {got[1]}")

    @property
    def is_deterministic(self) -> bool:
        """Whether every posterior is a point: its log-variance, before normalisation, is the lower clamp, -30."""
        return False

    def encoding_parts(self) -> tuple[list[torch.Tensor], object]:
        """Tensors and settings on which latents depend, in addition to a frozen encoder."""
        raise NotImplementedError

    def posterior(self, pixel_values: torch.Tensor) -> DiagonalGaussianDistribution:
        """The posterior that `encode` returns for images (B, 3, H, W), without slices, tiles and checks.

        For training loops: `encode` checks for NaN, for which the host synchronises with the device.
        """
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        # A cast to half precision must not round the statistics, which `save_pretrained` would then store so.
        statistics = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != torch.float32:
                setattr(self, name, statistics[name].to(buffer.device))
        return self

    @torch.no_grad()
    def set_latent_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set the mean and standard deviation of *unnormalised* latents over the training set.

        They replace earlier ones: estimate them on `denormalize_latents(encode(...))`.

        Raises:
            ValueError: a shape other than that of `latents_mean`, non-finite values or a std that is not positive.
        """
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.latents_mean.shape:
                raise ValueError(f"{name} must have shape {tuple(self.latents_mean.shape)}, got {tuple(value.shape)}")
            check_finite(name, value)
        if (std <= 0).any():
            raise ValueError(f"std must be positive, got {std.min().item()}")
        self.latents_mean = mean.detach().to(self.latents_mean.device, torch.float32).clone()
        self.latents_std = std.detach().to(self.latents_std.device, torch.float32).clone()

    def check_weights(self, place: str) -> None:
        """Also the statistics, see `StrictModelMixin.check_weights`.

        Raises:
            ValueError: weights that are not finite, or standard deviations that are not positive.
        """
        super().check_weights(place)
        if not self.latents_std.is_meta and (self.latents_std <= 0).any():
            smallest = self.latents_std.min().item()
            raise ValueError(f"weight 'latents_std' at {place!r} must be positive, got {smallest}")

    def denormalize_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents in the scale in which the tokenizer was trained, computed in fp32."""
        mean, std = (value.to(latents.device, torch.float32) for value in (self.latents_mean, self.latents_std))
        return (latents.float() * std + mean).to(latents.dtype)

    def _in_parts(
        self, function: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, input_unit: int, output_unit: int
    ) -> torch.Tensor:
        """`function(inputs)`, by slices of one sample and by tiles where these are on; units as in `blend_tiles`."""

        def in_tiles(part):
            height, width = part.shape[2] // input_unit, part.shape[3] // input_unit
            if self._tile and self.use_tiling and (height > self._tile[0] or width > self._tile[1]):
                return blend_tiles(function, part, self._tile, input_unit, output_unit)
            return function(part)

        if self.use_slicing and inputs.shape[0] > 1:
            return torch.cat([in_tiles(sample) for sample in inputs.split(1)])
        return in_tiles(inputs)

    def check_images(self, pixel_values: torch.Tensor, multiple_of: int) -> None:
        """Refuse anything but a batch of images.

        Raises:
            ValueError: not floating point, not (B, 3, H, W), or sides that are no positive multiples of `multiple_of`.
        """
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be floating point in [-1, 1], got {pixel_values.dtype}")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values must have shape (batch, 3, height, width), got {tuple(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[2:]
        if height % multiple_of or width % multiple_of or 0 in pixel_values.shape:
            raise ValueError(
                f"pixel_values must have images with sides that are multiples of {multiple_of}, "
                f"got {len(pixel_values)} of height {height}, width {width}"
            )

    def check_latents(self, latents: torch.Tensor) -> None:
        """Refuse anything but a batch of this tokenizer's latents.

        Raises:
            ValueError: not (B, latent_channels, H, W).
        """
        channels = self.latents_mean.shape[0]
        if latents.ndim != 4 or latents.shape[1] != channels or 0 in latents.shape:
            raise ValueError(f"latents must have shape (batch, {channels}, height, width), got {tuple(latents.shape)}")


def check_finite(name: str, values: torch.Tensor) -> None:
    """Refuse NaN and infinity; under `torch.compile` and on the meta device there are no values to check.

    Raises:
        ValueError: `values` are not all finite.
    """
    if not (torch.compiler.is_compiling() or values.is_meta) and not torch.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(values)).sum())} NaN or infinite values")
