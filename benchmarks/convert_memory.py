"""How much memory and time does it take to convert published weights? Files of their size, with random numbers.

    python benchmarks/convert_memory.py
    python benchmarks/convert_memory.py --folder /data/tmp --json

LightningDiT-XL with VA-VAE, 3 GB in fp32. Each step runs in a process of its own; `imports` does nothing else. `peak`
is the largest resident set as the kernel counts it (VmHWM): the interpreter and its libraries, what was allocated, and
the pages of mapped files that were read, although the kernel may drop these at any time. `beyond imports` is what a
step adds to the first row, as a multiple of the size of the published files. `allocated` is the largest part of the
peak that is no page of a file (RssAnon, sampled). Only on Linux.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hf_fae import build_preset
from hf_fae.convert.autoencoder_kl import export_autoencoder_kl
from hf_fae.convert.denoisers import export_denoiser
from hf_fae.zoo import ZOO


NAME = "lightningdit-xl-800ep"
PRELUDE = """
import json, re, sys, threading, time
from pathlib import Path

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

allocated, done = [0], threading.Event()
def sample():
    while not done.wait(0.005):
        allocated[0] = max(allocated[0], status("RssAnon"))
threading.Thread(target=sample, daemon=True).start()
files, folder = sys.argv[1:]
import torch
import hf_fae
from diffusers import DiffusionPipeline
from hf_fae.convert.published import convert_published
start = time.perf_counter()
"""
RESULT = """
done.set()
print(json.dumps({"seconds": time.perf_counter() - start, "peak": status("VmHWM"), "allocated": allocated[0]}))
"""
STEPS = {
    "imports": "",
    "convert": f"convert_published({NAME!r}, folder, files)",
    "convert to bfloat16": f"convert_published({NAME!r}, folder + '-bf16', files, torch.bfloat16)",
    # Reads every weight once, as a first step of sampling does.
    "load": """
pipe = DiffusionPipeline.from_pretrained(folder)
sum(tensor.float().sum() for model in (pipe.vae, pipe.transformer) for tensor in model.state_dict().values())
""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write, 8 GB; by default the system's temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = measure(Path(folder))
    if args.json:
        print(json.dumps(results))
        return
    size, base = results.pop("size"), results["imports"]["peak"]
    print(f"published files: {size / 1e9:.2f} GB\n")
    print("| step | seconds | peak | beyond imports | allocated |\n|---|---|---|---|---|")
    for step, result in results.items():
        peak, allocated = (f"{result[key] / 1e9:.2f} GB" for key in ("peak", "allocated"))
        print(f"| {step} | {result['seconds']:.1f} | {peak} | {(result['peak'] - base) / size:.2f} | {allocated} |")


def measure(folder: Path) -> dict:
    """Size of the published files in bytes, and of each step seconds, peak and allocated bytes."""
    files = folder / "files"
    write_published(files)
    results = {"size": sum(path.stat().st_size for path in files.rglob("*") if path.is_file())}
    for step, code in STEPS.items():
        command = [sys.executable, "-c", PRELUDE + code + RESULT, str(files), str(folder / "converted")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[step] = json.loads(done.stdout.splitlines()[-1])
    return results


def write_published(folder: Path) -> None:
    """The files of LightningDiT-XL and VA-VAE in their published layouts, with random weights."""
    entry = ZOO[NAME]
    tokenizer = ZOO[entry.tokenizer]
    for row, state in (
        (entry, {"ema": _random(export_denoiser(build_preset("lightningdit-xl-1", device="meta")))}),
        (tokenizer, {"state_dict": _random(export_autoencoder_kl(build_preset("vavae-f16d32", device="meta")))}),
    ):
        path = folder / row.source / row.files["weights"]
        path.parent.mkdir(parents=True)
        torch.save(state, path)
    statistics = {"mean": torch.zeros(1, 32, 1, 1), "std": torch.ones(1, 32, 1, 1)}
    torch.save(statistics, folder / tokenizer.source / tokenizer.files["statistics"])


def _random(state):
    return {name: torch.randn(tensor.shape) for name, tensor in state.items()}


if __name__ == "__main__":
    main()
