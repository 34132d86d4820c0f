"""Odd input of commands and pipelines: one sentence that names the argument, before anything is computed."""

import contextlib
import functools
import io
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from drawing import SETTINGS, draw
from factories import (
    tiny_encoder,
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_mar_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_fae_text_to_image_pipeline,
)
from PIL import Image

from hf_fae import AutoencoderFAE, LightningDiTTransformer2DModel
from hf_fae.cli import main
from hf_fae.encoders import VisionEncoder

from .case import Case, assert_sentence, refused


__all__ = ["CASES"]

NAN = float("nan")
PIPELINES = {
    "dit": tiny_fae_dit_pipeline,
    "mar": tiny_fae_mar_pipeline,
    "flow": tiny_fae_starflow_pipeline,
    "text": tiny_fae_text_to_image_pipeline,
}
OLD_IMAGE = b"an image that must survive"


@functools.cache
def pipeline(kind: str):
    return PIPELINES[kind](**({} if kind == "text" else SETTINGS))


# Calls of a pipeline: kind, arguments, and what the message says of them.
REFUSED_CALLS = {
    "seed for a generator": ("dit", {"generator": 42}, ("generator", "42")),
    "text for a generator": ("text", {"generator": "cpu"}, ("generator", "'cpu'")),
    "too many generators": ("mar", {"generator": [torch.Generator()] * 3}, ("generator", "list of 1", "3")),
    "seeds for generators": ("flow", {"generator": [1, 2]}, ("generator", "[1, 2]")),
    "fraction for a height": ("dit", {"height": 32.0}, ("height", "32.0")),
    "text for a width": ("text", {"width": "32"}, ("width", "'32'")),
    "no height": ("flow", {"height": 0}, ("height", "0")),
    "infinite steps": ("dit", {"num_inference_steps": float("inf")}, ("num_inference_steps", "inf")),
    "text for steps": ("text", {"num_inference_steps": "10"}, ("num_inference_steps", "'10'")),
    "truth for steps": ("dit", {"num_inference_steps": True}, ("num_inference_steps", "True")),
    "no images": ("mar", {"num_images_per_prompt": 0}, ("num_images_per_prompt", "0")),
    "half an image": ("flow", {"num_images_per_prompt": 0.5}, ("num_images_per_prompt", "0.5")),
    "list of latents": ("dit", {"latents": [[0.0]]}, ("latents", "list")),
    "latents of another shape": ("text", {"latents": torch.zeros(2, 4, 4, 4)}, ("latents", "(2, 4, 4, 4)")),
    "latents with NaN": ("flow", {"latents": torch.full((1, 4, 4, 4), NAN)}, ("latents", "finite")),
    "text for a callback": ("dit", {"callback_on_step_end": "print"}, ("callback_on_step_end", "'print'")),
    "unknown output": ("mar", {"output_type": "gif"}, ("output_type", "'gif'")),
    "guidance NaN": ("dit", {"guidance_scale": NAN}, ("guidance", "nan")),
    "guidance text": ("flow", {"guidance_scale": "high"}, ("guidance_scale", "'high'")),
    "rising sigmas": ("text", {"sigmas": [0.1, 0.9]}, ("sigmas", "[0.1, 0.9]")),
    "class out of range": ("dit", {"class_labels": 10**9}, ("class_labels", "1000000000")),
    "class in a row": ("mar", {"class_labels": np.array([[1]])}, ("class_labels", "[1]")),
    "class of truth": ("flow", {"class_labels": np.bool_(True)}, ("class_labels",)),
    "class misspelt": ("dit", {"class_labels": "golden retreiver"}, ("class_labels", "did you mean")),
    "number for a prompt": ("text", {"prompt": 3}, ("prompt", "3")),
}
# Calls that work, and equal those with Python's own numbers.
ACCEPTED_CALLS = {
    "numpy label": ("dit", {"class_labels": np.int64(1)}),
    "labels in a list of tensors": ("mar", {"class_labels": [torch.tensor(1)]}),
    "label without axes": ("flow", {"class_labels": torch.tensor(1)}),
    "numpy steps": ("dit", {"num_inference_steps": np.int32(4)}),
    "steps in a tensor": ("dit", {"num_inference_steps": torch.tensor(4)}),
    "numpy sides": ("dit", {"height": np.int64(32), "width": np.uint16(32)}),
    "numpy number of images": ("mar", {"num_images_per_prompt": np.int64(1)}),
}
# Schedulers in the place of that of a pipeline with shift 2.5.
FLOW = {"prediction_type": "flow_prediction"}
REFUSED_SCHEDULERS = {
    "another noise schedule": (DDIMScheduler, {}, "linear path"),
    "no flow sigmas": (UniPCMultistepScheduler, FLOW, "use_flow_sigmas=True"),
    "dropped shift": (UniPCMultistepScheduler, FLOW | {"use_flow_sigmas": True}, "flow_shift 2.5"),
}
CONFIGS = {
    "billion layers": (LightningDiTTransformer2DModel, {"num_layers": 10**9}, "num_layers"),
    "million heads": (LightningDiTTransformer2DModel, {"num_attention_heads": 10**6}, "num_attention_heads"),
    "huge grid": (LightningDiTTransformer2DModel, {"sample_size": 10**4}, "sample_size"),
    "text for a number": (AutoencoderFAE, {"latent_channels": "32"}, "latent_channels"),
}
# Commands; FOLDER has what `prepare` writes.
COMMANDS = {
    "inspect a list": ("inspect FOLDER/list", "JSON object"),
    "inspect null": ("inspect FOLDER/null", "JSON object"),
    "inspect torn JSON": ("inspect FOLDER/torn", "not valid JSON"),
    "inspect deep JSON": ("inspect FOLDER/deep", "not valid JSON"),
    "inspect text for a number": ("inspect FOLDER/words", "num_layers"),
    "inspect no heads": ("inspect FOLDER/no-heads", "num_attention_heads"),
    "inspect a billion layers": ("inspect FOLDER/layers", "num_layers"),
    "inspect a foreign class": ("inspect FOLDER/foreign", "'os.system'"),
    "inspect nothing": ("inspect FOLDER/nowhere", "FOLDER/nowhere"),
    "device meta": ("generate --class 1 --device meta", "'meta'"),
    "device unknown": ("generate --class 1 --device abacus", "'abacus'"),
    "seed beyond 64 bits": ("generate --class 1 --seed 99999999999999999999999", "2^63"),
    "seed of letters": ("generate --class 1 --seed one", "'one'"),
    "last seed": (f"generate --class 1 2 --seed {2**63 - 1}", "--seed"),
    "billion steps": ("generate --class 1 --num-inference-steps 1000000000", "--no-limits"),
    "billion images": ("generate --class 1 --num-images-per-prompt 1000000000", "--no-limits"),
    "endless digits": (f"generate --class 1 --num-inference-steps {'9' * 5000}", "positive whole number"),
    "superscript": ("generate --class 1 --num-images-per-prompt ²", "positive whole number"),
    "text encoder for classes": ("generate --class 1 --text-encoder FOLDER/encoder", "text_encoder"),
    "prompt for classes": ("generate --prompt cat", "--class"),
    "class out of range": ("generate --class 99999999999999999999", "--class"),
    "guidance NaN": ("generate --class 1 --guidance-scale nan", "guidance"),
    "NaN weights": ("generate --class 1 --model FOLDER/nan", "finite"),
    "no model": ("generate --class 1 --model FOLDER/nowhere", "FOLDER/nowhere"),
    "reconstruct text": ("reconstruct FOLDER/hello.txt", "FOLDER/hello.txt"),
    "reconstruct a folder": ("reconstruct FOLDER", "FOLDER"),
    "port 70000": ("demo --port 70000", "65535"),
    "port 0": ("demo --port 0", "65535"),
}


def _refuse_call(kind, arguments, parts, folder):
    computed = []
    pipe = pipeline(kind)
    hook = pipe.transformer.register_forward_pre_hook(lambda *args: computed.append(1))
    try:
        subject = {"prompt": "cat"} if kind == "text" else {"class_labels": 1}
        refused(lambda: pipe(**subject | arguments), *parts)
    finally:
        hook.remove()
    assert not computed, "the transformer ran before the argument was checked"


def _accept_call(kind, arguments, folder):
    pipe, labels = pipeline(kind), arguments.get("class_labels", 1)
    rest = {key: value for key, value in arguments.items() if key != "class_labels"}
    assert torch.equal(draw(pipe, labels, **rest), draw(pipe, 1)), "another image than with Python's own numbers"


def _refuse_scheduler(scheduler_class, config, part, folder):
    pipe = tiny_fae_dit_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=2.5))
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **config)
    refused(lambda: pipe(1), "scheduler", part)


def _refuse_config(model_class, config, name, folder):
    refused(lambda: model_class(**config), name)


def _refuse_command(command, part, folder):
    prepare(folder)
    argv = command.replace("FOLDER", str(folder)).split()
    output = folder / "output.png"
    if argv[0] in ("generate", "reconstruct"):
        argv += ["--output", str(output)]
        argv += [] if "--model" in argv else ["--model", str(folder / "pipeline")]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main(argv)
        except SystemExit as exit:
            assert exit.code == 2, f"exit code {exit.code}"
        else:
            raise AssertionError("accepted")
    assert_sentence(said.getvalue().strip().splitlines()[-1], part.replace("FOLDER", str(folder)))
    assert "Traceback" not in said.getvalue()
    assert output.read_bytes() == OLD_IMAGE


def prepare(folder: Path) -> None:
    """Write a pipeline, one with a NaN weight, an encoder, and configs that no model has."""
    config = {"_class_name": "LightningDiTTransformer2DModel"}
    texts = {
        "list": "[1]",
        "null": "null",
        "torn": '{"num_layers": ',
        "deep": "[" * 10**5,
        "words": json.dumps(config | {"num_layers": "many"}),
        "no-heads": json.dumps(config | {"num_attention_heads": 0}),
        "layers": json.dumps(config | {"num_layers": 10**9}),
        "foreign": json.dumps(config | {"_class_name": "os.system"}),
    }
    for name, text in texts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    pipe = tiny_fae_dit_pipeline(**SETTINGS)
    pipe.save_pretrained(folder / "pipeline")
    with torch.no_grad():
        next(pipe.transformer.parameters()).fill_(NAN)
    pipe.save_pretrained(folder / "nan")
    tiny_encoder().save_pretrained(folder / "encoder")
    (folder / "hello.txt").write_text("hello")
    (folder / "output.png").write_bytes(OLD_IMAGE)


def _write_fails(folder: Path) -> None:
    """A write that fails in the middle leaves the image that was there."""
    from hf_fae.images import save_png

    class Torn:
        def save(self, file, format):
            Path(file).write_bytes(b"half of")
            raise OSError("no space left")

    path = folder / "image.png"
    Image.new("RGB", (8, 8), "red").save(path)
    before = path.read_bytes()
    with contextlib.suppress(OSError):
        save_png(Torn(), path)
    assert path.read_bytes() == before and [file.name for file in folder.iterdir()] == ["image.png"]


def _load_spoilt(make, folder: Path) -> None:
    model = make()
    tensors = model.model.parameters() if isinstance(model, VisionEncoder) else model.parameters()
    with torch.no_grad():
        next(tensors).fill_(NAN)
    model.save_pretrained(folder)
    refused(lambda: type(model).from_pretrained(folder), "weight", "finite")


CASES = [
    *(Case(f"call: {name}", functools.partial(_refuse_call, *value)) for name, value in REFUSED_CALLS.items()),
    *(Case(f"call: {name}", functools.partial(_accept_call, *value)) for name, value in ACCEPTED_CALLS.items()),
    *(Case(f"scheduler: {n}", functools.partial(_refuse_scheduler, *v)) for n, v in REFUSED_SCHEDULERS.items()),
    *(Case(f"config: {name}", functools.partial(_refuse_config, *value)) for name, value in CONFIGS.items()),
    *(Case(f"command: {name}", functools.partial(_refuse_command, *value)) for name, value in COMMANDS.items()),
    Case("write that fails", _write_fails),
    Case("NaN in a tokenizer", functools.partial(_load_spoilt, tiny_fae)),
    Case("NaN in an encoder", functools.partial(_load_spoilt, tiny_encoder)),
]
