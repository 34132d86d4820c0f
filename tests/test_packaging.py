"""The installed package: its imports and names, and the files of the project that repeat its version and commands."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import diffusers.pipelines
import pytest
import yaml

import hf_fae


ROOT = Path(__file__).parents[1]
OPTIONAL = [
    "datasets",
    "evaluate",
    "matplotlib",
    "peft",
    "sklearn",
    "timm",
    "torch_fidelity",
    "torchmetrics",
    "torchvision",
]

# Makes packages look uninstalled: the path finder no longer finds them.
HIDE = f"""
import sys
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *args: None if name.split(".")[0] in {OPTIONAL} else find_spec(name, *args)
)
"""


def run_python(code: str, *args: str) -> str:
    """Standard output of `code` in a fresh interpreter."""
    process = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_import_loads_nothing_that_diffusers_does_not():
    # diffusers and transformers themselves import torchvision and peft where these are installed.
    code = """
import json, sys
import diffusers.pipelines.pipeline_loading_utils
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
before = {name.split(".")[0] for name in sys.modules}
import hf_fae
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules} - before)))
"""
    loaded = json.loads(run_python(code).splitlines()[-1])
    assert not set(loaded) & set(OPTIONAL)


def test_generates_without_the_packages_that_it_imports_where_used(tmp_path):
    from factories import tiny_fae_dit_pipeline

    tiny_fae_dit_pipeline().save_pretrained(tmp_path)
    code = f"""{HIDE}
import hf_fae
pipe = hf_fae.FAEDiTPipeline.from_pretrained(sys.argv[1])
image = pipe(0, num_inference_steps=2).images[0]
print(image.size, [name for name in {OPTIONAL} if name in sys.modules])
"""
    assert run_python(code, str(tmp_path)).splitlines()[-1].endswith("[]")


def test_public_names_resolve_and_are_published():
    for name in hf_fae.__all__:
        assert getattr(hf_fae, name) is not None
    for name in hf_fae.registration.PUBLISHED:
        assert getattr(diffusers, name) is getattr(hf_fae, name)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        hf_fae.Nothing  # noqa: B018


def test_no_package_is_named_like_a_diffusers_pipeline():
    """diffusers would record a component under a package of such a name as its own, and never find it again."""
    packages = [module.name for module in pkgutil.walk_packages(hf_fae.__path__, "hf_fae.") if module.ispkg]
    assert packages
    parts = {part for name in packages for part in name.split(".")[1:]}
    assert not {part for part in parts if hasattr(diffusers.pipelines, part)}


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert hf_fae.__version__ == version("hf_fae")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == hf_fae.__version__
    assert f"## {hf_fae.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_hooks_and_workflow_run_what_developers_run():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["make lint"]
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]["steps"]
    assert steps[-1] == {"run": ".ci/run"} and os.access(ROOT / ".ci" / "run", os.X_OK)
