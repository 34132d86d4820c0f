"""The base of all pipelines: a generator samples latents, a tokenizer decodes them to images."""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
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
from ..utils.hub_errors import hub_errors
from ..utils.whole_numbers import whole_number
from .calls import SeparateCalls
from .lora import TransformerLoraMixin


__all__ = ["LatentPipeline", "Tokenizer"]

# Each by its class: `from_pipe` keeps a component only if its exact class is in the annotation.
Tokenizer = (
    AutoencoderDeTok
    | AutoencoderDRoRAE
    | AutoencoderFAE
    | AutoencoderMAETok
    | AutoencoderRAEv2
    | AutoencoderKL  # of diffusers
)


class LatentPipeline(ModelCardMixin, SeparateCalls, TransformerLoraMixin):
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
        self.init_calls()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' `DiffusionPipeline.from_pretrained`.

        Raises:
            OSError: missing files, or the Hub refuses, fails or does not answer.
        """
        with hub_errors(str(pretrained_model_name_or_path)):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def check_inputs(
        self,
        height: int | None,
        width: int | None,
        output_type: str,
        callback: Callable | None,
        callback_tensor_inputs: list[str],
        generator: torch.Generator | list[torch.Generator] | tuple[torch.Generator, ...] | None = None,
        latents: torch.Tensor | None = None,
        **counts: int,
    ) -> tuple[int | None, ...]:
        """Refuse invalid inputs before anything is computed.

        Args:
            counts: other arguments, which must be positive whole numbers.

        Returns:
            Height, width and `counts` as Python's numbers: those of numpy and of tensors without axes are accepted.

        Raises:
            ValueError: an argument that does not fit.
        """
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        numbers = []
        for name, side in (("height", height), ("width", width)):
            numbers.append(None if side is None else whole_number(side))
            if side is not None and (numbers[-1] is None or numbers[-1] < multiple or numbers[-1] % multiple):
                raise ValueError(f"{name} must be a positive multiple of {multiple}, got {side!r}")
        for name, count in counts.items():
            numbers.append(whole_number(count))
            if numbers[-1] is None or numbers[-1] < 1:
                raise ValueError(f"{name} must be a positive whole number, got {count!r}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        if self.vae is None and output_type != "latent":
            raise ValueError(f"output_type must be 'latent' for a pipeline without vae, got {output_type!r}")
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end must be a function, got {callback!r}")
        unknown = [name for name in callback_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        if not all(isinstance(one, torch.Generator | None) for one in generators):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
        if not isinstance(latents, torch.Tensor | None):
            raise ValueError(f"latents must be a tensor, got a {type(latents).__name__}")
        return tuple(numbers)

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
        """Images decoded from normalised latents (B, C, H, W), in the form of `output_type`, see `__call__`.

        Raises:
            ValueError: latents or images that are not finite.
        """
        check_finite("latents that the transformer generated", latents)
        if output_type == "latent":
            return latents
        images = decode_latents(self.vae, latents)
        check_finite("images that the vae decoded", images)
        return self.image_processor.postprocess(images, output_type=output_type)

    def call_back(self, callback, step: int, timestep, latents: torch.Tensor, tensor_inputs: list[str]):
        """Pass a step's latents to the user's callback, if any, and return those to continue with."""
        if callback is None:
            return latents
        tensors = {"latents": latents} if "latents" in tensor_inputs else {}
        return (callback(self, step, timestep, tensors) or {}).get("latents", latents)
