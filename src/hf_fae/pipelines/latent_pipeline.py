"""The base of all pipelines: a generator samples latents, a tokenizer decodes them to images."""

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from ..autoencoders.detok import AutoencoderDeTok
from ..autoencoders.drorae import AutoencoderDRoRAE
from ..autoencoders.fae import AutoencoderFAE
from ..autoencoders.maetok import AutoencoderMAETok
from ..autoencoders.raev2 import AutoencoderRAEv2
from ..hub import ModelCardMixin
from ..latents import check_finite, compression_ratio, decode_latents, image_size, latent_size
from ..layers.positions import grid_size
from .lora import TransformerLoraMixin


__all__ = ["LatentPipeline", "Tokenizer"]

# Each by its class: `from_pipe` keeps a component only if its exact class is in the annotation.
Tokenizer = (
    AutoencoderDeTok | AutoencoderDRoRAE | AutoencoderFAE | AutoencoderMAETok | AutoencoderRAEv2 | AutoencoderKL
)


class LatentPipeline(ModelCardMixin, DiffusionPipeline, TransformerLoraMixin):
    """Base of pipelines with a `transformer` that samples latents and a `vae` that decodes them.

    The `vae` is a tokenizer of ours or an autoencoder of diffusers with `latent_channels` and a `scaling_factor`.
    """

    _callback_tensor_inputs = ["latents"]

    def init_components(self) -> None:
        """Called by `__init__` once the components are registered.

        Raises:
            ValueError: vae and transformer have different channels.
        """
        vae, transformer = self.vae, self.transformer
        if vae is not None and transformer is not None:
            channels = vae.config.latent_channels
            if transformer.config.in_channels != channels:
                raise ValueError(
                    f"transformer must have in_channels {channels}, as the vae has latent_channels, "
                    f"got {transformer.config.in_channels}"
                )
        # Without a vae (`output_type="latent"`) height and width count latents.
        self.vae_scale_factor = 1 if vae is None else compression_ratio(vae)
        self.image_processor = VaeImageProcessor(do_resize=False)
        self._interrupt = False

    def check_inputs(self, height, width, output_type, tensor_inputs, **counts):
        """Refuse invalid inputs before anything is computed; `counts` must be positive whole numbers.

        Raises:
            ValueError: an argument that does not fit.
        """
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        for name, side in (("height", height), ("width", width)):
            if side is not None and (side < multiple or side % multiple):
                raise ValueError(f"{name} must be a positive multiple of {multiple}, got {side}")
        for name, number in counts.items():
            if type(number) is not int or number < 1:
                raise ValueError(f"{name} must be a positive whole number, got {number!r}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        if self.vae is None and output_type != "latent":
            raise ValueError(f"output_type must be 'latent' for a pipeline without vae, got {output_type!r}")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )

    @property
    def reads_text(self) -> bool:
        """Whether it is text-conditional; otherwise it is class-conditional."""
        return self.transformer.config.get("caption_channels") is not None

    @property
    def image_size(self) -> tuple[int, int]:
        """Default height and width of generated images; of latents without a vae."""
        size = grid_size(self.transformer.config.sample_size)
        return size if self.vae is None else image_size(self.vae, *size)

    def prepare_generator(
        self, batch_size: int, generator: torch.Generator | list[torch.Generator] | tuple[torch.Generator, ...] | None
    ) -> torch.Generator | list[torch.Generator] | None:
        """The generators of a call; several as a list, the only form that diffusers' schedulers accept.

        Raises:
            ValueError: another number of generators than images.
        """
        if not isinstance(generator, (list, tuple)):
            return generator
        if len(generator) != batch_size:
            raise ValueError(f"generator must be a list of {batch_size}, one for each image, got {len(generator)}")
        return list(generator)

    def prepare_latents(
        self,
        batch_size: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise (batch_size, C, H, W) in fp32: sampled, or `latents` as given.

        Raises:
            ValueError: latents of another shape or not finite, or a size that the tokenizer does not support.
        """
        default_height, default_width = self.image_size
        size = (default_height if height is None else height, default_width if width is None else width)
        size = size if self.vae is None else latent_size(self.vae, *size)
        shape = (batch_size, self.transformer.config.in_channels, *size)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        check_finite("latents", latents)
        return latents.to(self._execution_device, torch.float32)

    def decode(self, latents: torch.Tensor, output_type: str):
        """Images decoded from normalised latents (B, C, H, W), in the form of `output_type`, see `__call__`."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(decode_latents(self.vae, latents), output_type=output_type)

    def call_back(self, callback, step: int, timestep, latents: torch.Tensor, tensor_inputs: list[str]):
        """Pass a step's latents to the user's callback, if any, and return those to continue with."""
        if callback is None:
            return latents
        tensors = {"latents": latents} if "latents" in tensor_inputs else {}
        return (callback(self, step, timestep, tensors) or {}).get("latents", latents)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running or latest call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop; the latents so far are decoded."""
        return self._interrupt
