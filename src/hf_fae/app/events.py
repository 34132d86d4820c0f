"""What the page does: one method per event."""

import contextlib
import html

import gradio as gr
import numpy as np
import torch
from PIL import Image

from ..data.decoding import center_crop, decode_image
from ..evaluation.inputs.spaces import SPACES, token_spaces
from ..guidance import Guidance
from ..images import from_uint8, to_pil
from ..inspection import count_parameters
from ..latents import decode_latents
from ..layers.positions import grid_size
from ..utils.image_metrics import feature_cosine, psnr
from ..utils.whole_numbers import whole_number
from .guidance_scale import default_guidance, scale_of, with_scale
from .patch_maps import SHOWN_SIDE, Patches, render_patches
from .served_models import Models


__all__ = ["MAX_IMAGES", "MAX_SCALE", "MAX_SEED", "MAX_STEPS", "MAX_TEXT", "Demo"]

MIN_SIDE = 16  # of an uploaded image, as of training images
# Bounds of the page's controls, and of requests that reach the server without the page.
MAX_IMAGES, MAX_SEED, MAX_STEPS, MAX_SCALE = 9, 2**32 - 1, 250, 10
MAX_TEXT = 1000  # characters of a prompt


class Demo:
    """The events of the page. Errors about arguments, files and checkpoints are shown as a `gr.Error`."""

    def __init__(self, models: Models):
        self.models = models

    def choose(self, name: str):
        """For a chosen model: its description, or why it cannot be used; its classes or a text field, and settings."""
        try:
            pipe = self.models.pipeline(name)
        except (ValueError, OSError) as error:
            problem = f"⚠️ {html.escape(str(error))}"
            no_classes = gr.update(choices=[], value=None)
            return problem, no_classes, gr.skip(), gr.skip(), gr.skip(), gr.update(interactive=False)
        if pipe.reads_text:
            classes = []
        else:
            count = pipe.transformer.config.num_classes
            classes = [(pipe.id2label.get(index, f"class {index}"), index) for index in range(count)]
        sides = " x ".join(map(str, pipe.image_size))
        millions = (count_parameters(pipe.transformer) + count_parameters(pipe.vae)) / 1e6
        guidance = default_guidance(pipe)
        scale = scale_of(guidance)
        is_schedule = isinstance(guidance, Guidance) and len(guidance.intervals) > 1
        hint = f"1: none; the model's own{' schedule: up to' if is_schedule else ':'} {scale:g}"
        kind, device = type(pipe).__name__, self.models.device
        return (
            f"`{kind}`, {millions:.1f} M parameters, images of {sides} pixels, on {device}",
            gr.update(choices=classes, value=None if pipe.reads_text else 0, visible=not pipe.reads_text),
            gr.update(visible=pipe.reads_text),
            gr.update(visible=_has_steps(pipe), value=pipe.config.get("num_inference_steps")),
            gr.update(value=scale, info=hint),
            gr.update(interactive=True),
        )

    def generate(
        self,
        name: str,
        label: int | str | None,
        prompt: str | None,
        count: int,
        seed: int,
        steps: int,
        scale: float,
        progress=gr.Progress(),  # noqa: B008 - gradio finds it by the default
    ):
        """Captioned images of a class (a number or a name) or a text; the first has the seed, the next one the next.

        An image depends on its own seed alone, not on how many are generated.
        """
        with _shown_errors():
            count = _bounded("the number of images", count, 1, MAX_IMAGES)
            seed = _bounded("the seed", seed, 0, MAX_SEED)
            if not isinstance(scale, (int, float)) or not 0 <= scale <= MAX_SCALE:
                raise ValueError(f"the guidance must be from 0 to {MAX_SCALE}, got {scale!r}")
            progress(0, desc="loading")
            pipe = self.models.pipeline(name)
            condition = _text(prompt) if pipe.reads_text else _class_id(pipe, label)
            seeds = range(seed, seed + count)
            options = {}
            if _has_steps(pipe):
                options["num_inference_steps"] = _bounded("the number of steps", steps, 1, MAX_STEPS)

            def show_progress(pipe, step, _, tensors):
                progress((step + 1, pipe.num_timesteps), desc="generating")
                return tensors

            images = pipe(
                [condition] * len(seeds),
                guidance_scale=with_scale(default_guidance(pipe), scale),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=show_progress,
                **options,
            ).images
            caption = condition if pipe.reads_text else pipe.id2label.get(condition, f"class {condition}")
            pairs = [(image, f"{caption}, seed {seed}") for image, seed in zip(images, seeds, strict=True)]
            return gr.update(value=pairs, columns=min(3, len(pairs)))

    def reconstruct(self, name: str, upload: bytes | None):
        """The crop of an uploaded image, its reconstruction, and how close they are."""
        if upload is None:
            return gr.skip()
        with _shown_errors():
            crop, images, spaces, grid = self._tokens(name, upload)
            latents = spaces["latents"].mT.unflatten(2, grid)
            with torch.no_grad():
                sample = decode_latents(self.models.tokenizer(name), latents)
            scores = f"PSNR **{psnr(sample, from_uint8(images).to(sample.device)):.2f} dB**"
            if "features" in spaces:
                scores += f", feature cosine **{feature_cosine(spaces['reconstruction'], spaces['features']):.4f}**"
            return crop, to_pil(sample)[0], scores

    def open_patches(self, name: str, upload: bytes | None):
        """The patches of an uploaded image, and the maps of the patch in its centre."""
        if upload is None:
            return gr.skip()
        with _shown_errors():
            crop, _, spaces, grid = self._tokens(name, upload)
            if spaces.keys() != set(SPACES):
                kind = type(self.models.tokenizer(name)).__name__
                raise ValueError(f"model {name!r} has a {kind}, which has no features of a frozen encoder")
        image = crop.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BICUBIC)
        patches = Patches(image, {space: tokens[0].cpu() for space, tokens in spaces.items()}, grid)
        return patches, *render_patches(patches, grid[0] // 2 * grid[1] + grid[1] // 2)

    def click_patch(self, patches: Patches, click: gr.SelectData):
        """The maps of the patch under a click."""
        return render_patches(patches, patches.patch_at(*click.index))

    def _tokens(self, name, upload):
        """The square crop of an upload, the same as 8-bit images (1, 3, H, W), and the output of `token_spaces`."""
        image = decode_image(upload, MIN_SIDE)
        vae = self.models.tokenizer(name)
        crop = center_crop(image, min(grid_size(vae.config.sample_size)))
        images = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None]
        return crop, images, *token_spaces(vae, images)


def _bounded(name: str, value, low: int, high: int) -> int:
    number = int(value) if isinstance(value, float) and value.is_integer() else whole_number(value)
    if number is None or not low <= number <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {str(value)[:40]}")
    return number


def _text(prompt) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("a text must be written")
    if len(prompt) > MAX_TEXT:
        raise ValueError(f"the text must have at most {MAX_TEXT} characters, got {len(prompt)}")
    return prompt.strip()


def _class_id(pipe, label) -> int:
    """The class of a number or a name, as a request without the page may have either."""
    if label in (None, ""):
        raise ValueError("a class must be chosen")
    if isinstance(label, str):
        label = label[:MAX_TEXT]
        if label.isdecimal() and label not in pipe.label2id:
            label = int(label[:18])
    return pipe.label_ids(label, "class")[0]


def _has_steps(pipe) -> bool:
    """Whether the number of steps can be chosen: not for a flow, nor for a model that generates a token per step."""
    return pipe.config.get("num_inference_steps") is not None


@contextlib.contextmanager
def _shown_errors():
    """Show errors about arguments, files and checkpoints on the page.

    Raises:
        gr.Error: in place of these errors.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error  # the page renders HTML
