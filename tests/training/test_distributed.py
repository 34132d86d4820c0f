"""Several processes on a CPU: the numbers of one with the larger batch, also when FSDP2 shards the parameters."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import tiny_encoder, tiny_fae, tiny_lightning_dit
from fork_server import PATIENCE
from safetensors.torch import load_file
from text_models import save_sentence_encoder
from torch.distributed.fsdp import FSDPModule
from training_runs import ADVERSARIAL, ImageNoise, read_log, run

from hf_fae import LightningDiTTransformer2DModel
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.objectives.flow_matching import FlowMatchingObjective


HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "training_scripts"
CONFIGS = HERE.parent / "configs"

# Accelerate takes FSDP for GPUs only. Told that these processes have some, it shards on a CPU in the very same way.
PRETEND_GPU = """
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
"""
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def code_of(call, fsdp=False):
    """The program of a process that calls a function of this module, written as a call."""
    paths = [str(HERE.parent), str(HERE), str(SCRIPTS)]
    setup = f"import sys; sys.path[:0] = {paths!r}\n{PRETEND_GPU if fsdp else ''}\n"
    return f"{setup}import test_distributed; test_distributed.{call}\n"


def run_in_two_processes(processes, call, fsdp=False):
    processes.run_in_two_processes(["-c", code_of(call, fsdp)], FSDP if fsdp else {})


def train_image_noise(folder, batch_size, **kwargs):
    torch.manual_seed(0)
    loop, _, _ = run(folder, objective=ImageNoise(), train_batch_size=batch_size, **kwargs)
    assert (loop.step, loop.images_seen) == (12, 48)


def assert_close_checkpoints(one, other):
    """Equal but for the order of sums, which Adam magnifies where a gradient is tiny: within 1 % of the rate 0.01."""
    for name in ("model", "ema", "optimizer"):
        left, right = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-4)


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path):
    """Started as `accelerate launch` does it on several devices; on a CPU alone it starts one process."""
    train_image_noise(tmp_path / "one", 4)
    script = tmp_path / "script.py"
    script.write_text(code_of(f"train_image_noise({str(tmp_path / 'two')!r}, 2)"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(launch, env=env, timeout=PATIENCE, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert_close_checkpoints(tmp_path / "one" / "checkpoint-12", tmp_path / "two" / "checkpoint-12")
    one, two = (read_log(tmp_path / folder) for folder in ("one", "two"))
    assert [line["images"] for line in one] == [line["images"] for line in two]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)


def train_script(script, folder, published, data, batch_size):
    """Two steps of a script as it is, in fp32 and without clipping."""
    flags = {
        "fae": ["--image_encoder", f"{published}/encoder"],
        "pixel_decoder": ["--fae", f"{published}/fae", "--stage", "II", *ADVERSARIAL, *AT_ONCE],
        "generator": ["--vae", f"{published}/fae", "--label_column", "label"],
        "starflow": ["--vae", f"{published}/fae", "--label_column", "label"],
        "text_to_image": [
            *("--vae", f"{published}/fae", "--caption_column", "kind"),
            *("--text_encoder", f"{published}/text-encoder", "--max_caption_length", "12", "--label_dropout", "0.5"),
        ],
        # Not MAR, whose share of masked tokens is one for the batch of a process.
        "autoregressive": ["--vae", f"{published}/fae", "--label_column", "label", "--model", "random"],
    }[script]
    flags += ["--config", str(CONFIGS / f"smoke_{script}.yaml"), "--dataset_name", data]
    flags += ["--output_dir", folder, "--train_batch_size", str(batch_size), "--mixed_precision", "no"]
    flags += ["--max_train_steps", "2", "--max_grad_norm", "0", "--report_to", "none"]
    flags += ["--checkpointing_steps", "1", "--checkpoints_total_limit", "2"]
    importlib.import_module(f"train_{script}").main(flags)


AT_ONCE = ["--discriminator_start", "0", "--adversarial_start", "0"]


@pytest.mark.parametrize(
    "script", ["fae", "pixel_decoder", "generator", "starflow", "text_to_image", "autoregressive"]
)
def test_scripts_in_two_processes_have_the_gradients_of_one(
    tmp_path, processes, parquet_folder, image_folder, monkeypatch, script
):
    """Of a VAE, of a GAN and of a generator, with all their noise."""
    monkeypatch.syspath_prepend(SCRIPTS)
    data = str(parquet_folder if script == "text_to_image" else image_folder)
    save_sentence_encoder(tmp_path / "text-encoder")
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    tiny_fae().save_pretrained(tmp_path / "fae")
    one, two = tmp_path / "one", tmp_path / "two"
    train_script(script, str(one), str(tmp_path), data, 8)
    run_in_two_processes(processes, f"train_script({script!r}, {str(two)!r}, {str(tmp_path)!r}, {data!r}, 4)")
    # After the first step AdamW's first moment is the gradient times 1 - beta1, as nothing was clipped.
    left, right = (load_file(run / "checkpoint-1" / "optimizer.safetensors") for run in (one, two))
    assert left.keys() == right.keys()
    gradients = {}
    for name in left:
        if name.endswith(".exp_avg"):
            gradients.setdefault(name.split(".")[0], []).append((left[name], right[name]))
    assert set(gradients) == ({"model", "adversarial"} if script == "pixel_decoder" else {"model"})
    for network, pairs in gradients.items():
        difference = max((one - two).abs().max() for one, two in pairs)
        assert difference <= 1e-5 * max(one.abs().max() for one, _ in pairs), network


def train_flow(folder, data_folder, batch_size, **kwargs):
    """A real generator on a real tokenizer, with validation; the result is a pipeline."""
    data = ImageData(DataArguments(dataset_name=data_folder, resolution=32, label_column="label"))
    torch.manual_seed(0)
    transformer = tiny_lightning_dit(num_classes=4)
    objective = FlowMatchingObjective(transformer, tiny_fae())

    def validate(step):
        sharded = [type(module).__name__ for module in transformer.modules() if isinstance(module, FSDPModule)]
        assert sharded == (["FSDPLightningDiTBlock"] * 2 if torch.distributed.is_initialized() else [])
        z = torch.ones(1, transformer.config.in_channels, 4, 4)
        return {"output": transformer(z, torch.tensor([500.0]), torch.tensor([1])).sample.sum().item()}

    run(
        folder,
        data,
        objective,
        validate,
        save=lambda: transformer.save_pretrained(Path(folder) / "transformer"),
        train_batch_size=batch_size,
        **{"max_train_steps": 6, "checkpointing_steps": 3, "validation_steps": 3, **kwargs},
    )


def test_fsdp2_trains_as_one_process_and_its_checkpoints_are_ordinary_ones(tmp_path, processes, image_folder):
    one, two = tmp_path / "one", tmp_path / "two"
    train_flow(one, str(image_folder), 8)
    run_in_two_processes(processes, f"train_flow({str(two)!r}, {str(image_folder)!r}, 4)", fsdp=True)
    for step in (3, 6):
        assert_close_checkpoints(one / f"checkpoint-{step}", two / f"checkpoint-{step}")
    outputs = [
        [line["validation/output"] for line in read_log(run) if "validation/output" in line] for run in (one, two)
    ]
    assert outputs[0] == pytest.approx(outputs[1], rel=1e-4) and len(outputs[0]) == 2

    saved = [LightningDiTTransformer2DModel.from_pretrained(run / "transformer") for run in (one, two)]
    for left, right in zip(*(model.parameters() for model in saved), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)

    resumed = {"resume_from_checkpoint": str(two / "checkpoint-3")}
    train_flow(tmp_path / "resumed", str(image_folder), 8, **resumed)
    assert_close_checkpoints(one / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")


@pytest.mark.slow
def test_muon_under_fsdp2(tmp_path, processes, image_folder):
    """Muon orthogonalises in bfloat16, which magnifies the rounding of weak directions: steps agree to a half."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_flow(one, str(image_folder), 8, optimizer="muon")
    call = f"train_flow({str(two)!r}, {str(image_folder)!r}, 4, optimizer='muon')"
    run_in_two_processes(processes, call, fsdp=True)
    before, left, right = (
        load_file(folder / f"checkpoint-{step}" / "model.safetensors")
        for folder, step in ((one, 3), (one, 6), (two, 6))
    )
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert (value - right[key]).norm() <= 0.5 * (value - before[key]).norm(), key


@pytest.mark.slow
def test_fsdp2_goes_on_from_a_checkpoint_of_one_process(tmp_path, processes, image_folder):
    one, two = tmp_path / "one", tmp_path / "two"
    train_flow(one, str(image_folder), 8)
    resumed = {"resume_from_checkpoint": str(one / "checkpoint-3")}
    run_in_two_processes(processes, f"train_flow({str(two)!r}, {str(image_folder)!r}, 4, **{resumed!r})", fsdp=True)
    assert_close_checkpoints(one / "checkpoint-6", two / "checkpoint-6")
