"""The web demo: draw a class or a text, reconstruct a picture, click on patches. `hf-fae demo`, or a Hugging Face
Space.

The file stands on its own: as `app.py` of a Space whose requirements name `hf_fae[demo]` it runs there, too (see
docs/demo.md).
"""

import contextlib
import dataclasses
import html
import os
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageOps

import hf_fae
from hf_fae.data.decoding import center_crop, decode_image
from hf_fae.evaluation.inputs.spaces import SPACES, gives_features, token_spaces
from hf_fae.evaluation.metrics.patch_similarity import similarity_map
from hf_fae.evaluation.reports.sheets import TITLES
from hf_fae.guidance import FlowGuidance, Guidance, TokenGuidance
from hf_fae.images import from_uint8, to_pil
from hf_fae.inspection import count_parameters
from hf_fae.latents import decode_latents
from hf_fae.layers.positions import grid_size
from hf_fae.loading import complete_text_encoder, loading
from hf_fae.pipelines.latent_pipeline import LatentPipeline
from hf_fae.utils.image_metrics import feature_cosine, psnr


__all__ = ["Demo", "Models", "build", "default_models", "main"]

# A clone of the repository has them; an installed package has not.
EMBEDDED = [
    Path(hf_fae.__file__).parents[2] / "checkpoints" / name
    for name in ("fae-dit-emoji-256", "fae-starflow-emoji-256", "fae-text-emoji-256")
]
MODELS_VARIABLE = "HF_FAE_MODELS"
MIN_SIDE = 16  # of an uploaded picture, as of those to train on
MAX_UPLOAD = "32mb"
UPLOAD_SECONDS = 3600  # how long uploads and pictures stay on the server's disk
MAX_TEXT = 1000  # letters of a text to draw
SHOWN_SIDE = 448  # pixels of a picture to click on, and of its heat maps
HEAT = {"black": "#000004", "mid": "#bc3754", "white": "#fcffa4"}  # matplotlib's inferno at 0, 1/2 and 1


def default_models() -> list[str]:
    """The models of a page that is given none: those that HF_FAE_MODELS names, else the embedded checkpoints.

    Raises:
        ValueError: there are none.
    """
    names = [name.strip() for name in os.environ.get(MODELS_VARIABLE, "").split(",") if name.strip()]
    names = names or [str(folder) for folder in EMBEDDED if folder.is_dir()]
    if not names:
        raise ValueError(
            f"--model or the variable {MODELS_VARIABLE} must name pipelines (folders or Hub ids): no embedded "
            f"checkpoints are in {str(EMBEDDED[0].parent)!r}, they come with a clone of the repository"
        )
    return names


class Models:
    """Pipelines by folder or Hub id, each loaded when it is first asked for, and kept.

    In bf16 on a CUDA device where there is one, else in fp32 on the CPU.

    Args:
        image_encoder: folder or Hub id of the frozen encoder of tokenizers that come without it; by default the one
            that they name.
        text_encoder: the same for pipelines that read texts and come without theirs.
    """

    def __init__(self, image_encoder: str | None = None, text_encoder: str | None = None):
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.device, self.dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self.loaded = {}

    def pipeline(self, name: str):
        """The pipeline of that name.

        Raises:
            ValueError: it cannot be loaded, or is none of hf_fae.
        """
        if name not in self.loaded:
            with loading("model", name):
                pipe = DiffusionPipeline.from_pretrained(name, dtype=self.dtype)
            if not isinstance(pipe, LatentPipeline):
                raise ValueError(f"model {name!r} is a {type(pipe).__name__}, which is no pipeline of hf_fae")
            if pipe.reads_text and pipe.text_encoder is None:
                complete_text_encoder(pipe, self.text_encoder)
            pipe.set_progress_bar_config(disable=True)
            self.loaded[name] = pipe.to(self.device)
        return self.loaded[name]

    def tokenizer(self, name: str):
        """The tokenizer of the pipeline of that name, with its frozen encoder if it has one.

        Raises:
            ValueError: as `pipeline`; or its encoder cannot be loaded.
        """
        vae = self.pipeline(name).vae
        if gives_features(vae) and vae.image_encoder is None:
            encoder = self.image_encoder or vae.config.image_encoder_id
            if encoder is None:
                raise ValueError(f"model {name!r} comes without its frozen encoder and names none: --image_encoder")
            with loading("frozen encoder (--image_encoder)", encoder):
                vae.load_encoder(self.image_encoder)
        return vae


@dataclasses.dataclass
class Patches:
    """A picture to click on: itself, enlarged, and its tokens (N, C) in each of `SPACES` on a grid (h, w)."""

    picture: Image.Image
    spaces: dict[str, torch.Tensor]
    grid: tuple[int, int]


class Demo:
    """What the page does, a method for each event; what goes wrong is told in a `gr.Error`."""

    def __init__(self, models: Models):
        self.models = models

    def choose(self, name: str):
        """For a chosen model: what it is, or why it cannot be used; its classes or a text, and settings."""
        try:
            pipe = self.models.pipeline(name)
        except (ValueError, OSError) as error:
            says = f"⚠️ {html.escape(str(error))}"
            none = gr.update(choices=[], value=None)
            return says, none, gr.skip(), gr.skip(), gr.skip(), gr.update(interactive=False)
        if pipe.reads_text:
            classes = []
        else:
            count = pipe.transformer.config.num_classes
            classes = [(pipe.id2label.get(index, f"class {index}"), index) for index in range(count)]
        sides = " x ".join(map(str, pipe.image_size))
        millions = (count_parameters(pipe.transformer) + count_parameters(pipe.vae)) / 1e6
        guidance = _own_guidance(pipe)
        scale = _scale_of(guidance)
        is_schedule = isinstance(guidance, Guidance) and len(guidance.intervals) > 1
        hint = f"1: none; the model's own{' schedule: up to' if is_schedule else ':'} {scale:g}"
        kind, device = type(pipe).__name__, self.models.device
        return (
            f"`{kind}`, {millions:.1f} M parameters, pictures of {sides} pixels, on {device}",
            gr.update(choices=classes, value=None if pipe.reads_text else 0, visible=not pipe.reads_text),
            gr.update(visible=pipe.reads_text),
            gr.update(visible=_has_steps(pipe), value=pipe.config.get("num_inference_steps")),
            gr.update(value=scale, info=hint),
            gr.update(interactive=True),
        )

    def generate(
        self,
        name: str,
        label: int | None,
        prompt: str,
        count: int,
        seed: int,
        steps: int,
        scale: float,
        progress=gr.Progress(),  # noqa: B008 - gradio finds it by the default
    ):
        """Pictures of a class or a text with their captions; the first has the seed, the others count on.

        A picture depends on its own seed alone, not on how many there are.
        """
        with _told():
            if seed is None:
                raise ValueError("the seed must be a whole number")
            progress(0, desc="loading")
            pipe = self.models.pipeline(name)
            wanted = prompt.strip() if pipe.reads_text else label
            if wanted in (None, ""):
                raise ValueError("a text must be written" if pipe.reads_text else "a class must be chosen")
            seeds = range(int(seed), int(seed) + int(count))
            options = {"num_inference_steps": int(steps)} if _has_steps(pipe) else {}

            def show_progress(pipe, step, _, tensors):
                progress((step + 1, pipe.num_timesteps), desc="drawing")
                return tensors

            images = pipe(
                [wanted] * len(seeds),
                guidance_scale=_with_scale(_own_guidance(pipe), scale),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=show_progress,
                **options,
            ).images
            caption = wanted if pipe.reads_text else pipe.id2label.get(label, f"class {label}")
            pairs = [(image, f"{caption}, seed {seed}") for image, seed in zip(images, seeds, strict=True)]
            return gr.update(value=pairs, columns=min(3, len(pairs)))

    def reconstruct(self, name: str, upload: bytes | None):
        """The crop of an uploaded picture, what the tokenizer makes of it, and how close that is."""
        if upload is None:
            return gr.skip()
        with _told():
            crop, images, spaces, grid = self._tokens(name, upload)
            latents = spaces["latents"].mT.unflatten(2, grid)
            with torch.no_grad():
                sample = decode_latents(self.models.tokenizer(name), latents)
            scores = f"PSNR **{psnr(sample, from_uint8(images).to(sample.device)):.2f} dB**"
            if "features" in spaces:
                scores += f", feature cosine **{feature_cosine(spaces['reconstruction'], spaces['features']):.4f}**"
            return crop, to_pil(sample)[0], scores

    def open_patches(self, name: str, upload: bytes | None):
        """The patches of an uploaded picture, and what is shown before the first click: the one in its centre."""
        if upload is None:
            return gr.skip()
        with _told():
            crop, _, spaces, grid = self._tokens(name, upload)
            if spaces.keys() != set(SPACES):
                kind = type(self.models.tokenizer(name)).__name__
                raise ValueError(f"model {name!r} has a {kind}, which has no features of a frozen encoder")
        picture = crop.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BICUBIC)
        patches = Patches(picture, {space: tokens[0].cpu() for space, tokens in spaces.items()}, grid)
        return patches, *sample_visible_patches(patches, grid[0] // 2 * grid[1] + grid[1] // 2)

    def click_patch(self, patches: Patches, click: gr.SelectData):
        """The same for the patch under a click."""
        (x, y), (height, width) = click.index, patches.grid
        row, column = (min(int(place * cells / SHOWN_SIDE), cells - 1) for place, cells in ((y, height), (x, width)))
        return sample_visible_patches(patches, row * width + column)

    def _tokens(self, name, upload):
        """The square crop of an upload, the same as 8-bit images (1, 3, H, W), and what `token_spaces` gives."""
        picture = decode_image(upload, MIN_SIDE)
        vae = self.models.tokenizer(name)
        crop = center_crop(picture, min(grid_size(vae.config.sample_size)))
        images = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None]
        return crop, images, *token_spaces(vae, images)


def sample_visible_patches(patches: Patches, query: int) -> tuple:
    """The picture with a frame around a patch, the heat map of its cosines in each of `SPACES`, all on one scale, and
    that scale in words."""
    maps = {space: similarity_map(patches.spaces[space], query) for space in SPACES}
    low = min(values.min().item() for values in maps.values())
    pictures = [patches.picture.copy()]
    for values in maps.values():
        shades = (255 * (values - low) / max(1 - low, 1e-6)).clamp(0, 255).round().to(torch.uint8)
        heat = ImageOps.colorize(Image.fromarray(shades.view(patches.grid).numpy()), **HEAT)
        pictures.append(heat.resize(patches.picture.size, Image.Resampling.NEAREST))
    for picture in pictures:
        _frame(picture, query, patches.grid)
    row, column = divmod(query, patches.grid[1])
    return *pictures, f"Cosine with the patch in row {row + 1}, column {column + 1}: black is {low:.2f}, yellow is 1."


def _frame(picture, patch, grid):
    """A frame around a patch, seen on any ground."""
    row, column = divmod(patch, grid[1])
    height, width = picture.height / grid[0], picture.width / grid[1]
    box = [column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1]
    draw = ImageDraw.Draw(picture)
    draw.rectangle([box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2], outline="black", width=6)
    draw.rectangle(box, outline="cyan", width=3)


def _has_steps(pipe) -> bool:
    """Whether it has steps to choose; a flow, or a model that draws one token a step, has none."""
    return pipe.config.get("num_inference_steps") is not None


def _own_guidance(pipe) -> Guidance | FlowGuidance | TokenGuidance:
    """What a pipeline uses by default."""
    return type(pipe.guidance).of(pipe.config.guidance_scale)


def _scale_of(guidance: Guidance | FlowGuidance | TokenGuidance) -> float:
    """The scale that stands for a guidance; of a schedule the largest."""
    if isinstance(guidance, FlowGuidance):
        return 1 + guidance.weight
    if isinstance(guidance, TokenGuidance):
        return guidance.scale
    return max((scale for _, _, scale in guidance.intervals), default=1.0)


def _with_scale(
    guidance: Guidance | FlowGuidance | TokenGuidance, scale: float
) -> Guidance | FlowGuidance | TokenGuidance:
    """The same guidance with another scale, at all times; with its own scale as it is."""
    if scale == _scale_of(guidance):
        return guidance
    if isinstance(guidance, FlowGuidance):
        return dataclasses.replace(guidance, weight=scale - 1)
    if isinstance(guidance, TokenGuidance):
        return dataclasses.replace(guidance, scale=scale)
    return dataclasses.replace(guidance, intervals=Guidance.of(scale).intervals)


@contextlib.contextmanager
def _told():
    """Show errors about arguments, files and checkpoints on the page.

    Raises:
        gr.Error: instead of them.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        # escaped, as the page takes it for HTML
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def build(models: list[str], image_encoder: str | None = None, text_encoder: str | None = None) -> gr.Blocks:
    """The page.

    Args:
        models: folders or Hub ids of pipelines; the first one is opened with the page.
        image_encoder, text_encoder: as for `Models`.
    """
    demo = Demo(Models(image_encoder, text_encoder))
    # Models are no friends of threads: whatever needs one waits for its turn.
    one_at_a_time = {"concurrency_id": "models", "concurrency_limit": 1}
    with gr.Blocks(title="hf_fae", analytics_enabled=False, delete_cache=(UPLOAD_SECONDS, UPLOAD_SECONDS)) as page:
        gr.Markdown(
            "# Pictures from the features of a frozen encoder\n"
            "A tokenizer ([FAE](https://arxiv.org/abs/2512.07829)) turns a vision encoder's features into small "
            "latents, gives the features back, and makes pictures of them. A generator draws new latents."
        )
        with gr.Row():
            model = gr.Dropdown(_choices(models), label="Generator", value=models[0])
            about = gr.Markdown(min_height=40)
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=1):
                label = gr.Dropdown([], label="Class")
                prompt = gr.Textbox("teddy bear", label="Text", visible=False, max_length=MAX_TEXT)
                count = gr.Slider(1, 9, value=4, step=1, label="Pictures")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
                steps = gr.Slider(1, 250, value=50, step=1, label="Steps")
                scale = gr.Slider(0, 10, value=1, step=0.1, label="Guidance")
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=2):
                gallery = gr.Gallery(show_label=False, height="max-content", format="png", elem_id="gallery")
        with gr.Tab("Reconstruct"):
            with gr.Row():
                reconstruct_upload = _upload()
                scores = gr.Markdown("Upload a picture: how much of it is left in the latents?")
            with gr.Row():
                original, reconstruction = _picture("Picture, cropped"), _picture("Reconstruction")
        with gr.Tab("Patch similarity"):
            with gr.Row():
                patches_upload = _upload()
                colours = gr.Markdown("Upload a picture and click on it: which patches are like the one you hit?")
            with gr.Row():
                clicked = _picture("Click here", elem_id="clicked")
                heat_maps = [_picture(TITLES[space].capitalize()) for space in SPACES]
            patches = gr.State()

        settings = [about, label, prompt, steps, scale, button]
        gr.on([page.load, model.change], demo.choose, model, settings, show_progress_on=about, **one_at_a_time)
        button.click(demo.generate, [model, label, prompt, count, seed, steps, scale], gallery, **one_at_a_time)
        for upload, work, before, pictures, words in (
            (reconstruct_upload, demo.reconstruct, [], [original, reconstruction], scores),
            (patches_upload, demo.open_patches, [patches], [clicked, *heat_maps], colours),
        ):
            outputs = [*before, *pictures, words]
            on = [upload.upload, model.change]
            gr.on(on, work, [model, upload], outputs, show_progress_on=pictures, **one_at_a_time)
        clicked.select(demo.click_patch, patches, [clicked, *heat_maps, colours], show_progress="hidden")
    return page


def _choices(models):
    """(name, value) of each model: folders by their last part, if that is enough to tell them apart."""
    names = [Path(model).resolve().name if os.path.isdir(model) else model for model in models]
    return list(zip(names if len(set(names)) == len(names) else models, models, strict=True))


def _upload():
    # `gr.Image` would fail on files that are no pictures before anyone could say why.
    return gr.File(label="A picture", file_types=["image"], type="binary", height=130)


def _picture(title, **kwargs):
    """A picture under its title, which would otherwise lie on a corner of it."""
    with gr.Column(min_width=200):
        gr.Markdown(f"**{title}**")
        return gr.Image(show_label=False, format="png", interactive=False, buttons=[], **kwargs)


def main(
    models: list[str] | None = None,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
    host: str | None = None,
    port: int | None = None,
) -> None:
    """Serve the page until interrupted.

    Args:
        models, image_encoder, text_encoder: as for `build`; by default `default_models()`.
        host, port: where; by default where the variables GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say, as in a Space,
            else at the loopback address and the first free port from 7860.

    Raises:
        ValueError: there are no models.
        OSError: the port is taken.
    """
    page = build(models or default_models(), image_encoder, text_encoder)
    # gradio's own fonts lack half of their bold letters
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(server_name=host, server_port=port, max_file_size=MAX_UPLOAD, theme=theme, footer_links=["api"])


if __name__ == "__main__":
    main()
