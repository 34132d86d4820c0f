"""`hf-fae train` killed twice: in its first stage, and in its last one after a checkpoint."""

import subprocess
import sys

import pytest
from factories import tiny_fae
from killing import wait_until
from safetensors.torch import load_file
from training_fixtures import numbered_image


@pytest.mark.slow
def test_killed_twice_it_resumes_to_the_bit(tmp_path):
    for number in range(24):
        path = tmp_path / "images" / ("red" if number % 2 else "blue") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        numbered_image(number).save(path)
    tiny_fae().save_pretrained(tmp_path / "tokenizer")

    def start(name):
        command = [sys.executable, "-m", "hf_fae.cli", "train", str(tmp_path / "images"), "--output"]
        command += [str(tmp_path / name), "--tokenizer", str(tmp_path / "tokenizer"), "--duration", "0.0104"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    output = tmp_path / "killed"
    for reached in (output / "pixels" / ".lock", output / "generator" / "checkpoint-500"):
        process = start("killed")
        wait_until(reached.exists)
        assert process.poll() is None and reached.exists()
        process.kill()
        process.wait()
    assert (output / "latents" / "finished.json").exists() and not (output / "generator" / "finished.json").exists()
    assert start("killed").wait() == 0
    for part in ("transformer", "vae"):
        weights = [
            load_file(tmp_path / name / "generator" / part / "diffusion_pytorch_model.safetensors")
            for name in ("whole", "killed")
        ]
        assert all((value == weights[1][key]).all() for key, value in weights[0].items())
