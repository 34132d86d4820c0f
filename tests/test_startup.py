"""Start-up: `import hf_fae` and help import no library, and diffusers finds our classes anyway."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hf_fae
from hf_fae.cli import COMMANDS


HEAVY = ("accelerate", "diffusers", "gradio", "matplotlib", "numpy", "torch", "transformers")
# Lines that hold in both orders of imports, and after a reload.
FOUND = """
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
assert "ModelMixin" in LOADABLE_CLASSES["hf_fae"]
assert diffusers.FAEDiTPipeline is hf_fae.FAEDiTPipeline
assert not hasattr(diffusers, "NoSuchClass")
assert diffusers.DDIMPipeline.__module__.startswith("diffusers.")
assert diffusers.DiffusionPipeline.from_pretrained(sys.argv[1]).__class__ is hf_fae.FAEDiTPipeline
"""


def run_python(code: str, *args) -> str:
    """Standard output of `code` in a fresh interpreter, which knows nothing of what the tests have imported."""
    process = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    from factories import tiny_fae_dit_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    tiny_fae_dit_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_fae, diffusers",
        "import diffusers, hf_fae",
        "import diffusers.pipelines.pipeline_loading_utils, hf_fae",
    ],
    ids=["hf_fae first", "diffusers first", "loading_utils first"],
)
def test_diffusers_finds_our_classes_in_either_order_of_imports(imports, pipeline_folder):
    run_python(f"import sys\n{imports}\n{FOUND}", pipeline_folder)


def test_reloading_registers_once_and_again(pipeline_folder):
    reload = "import sys, importlib, hf_fae\nimportlib.reload(hf_fae)\nimport diffusers\n"
    reload += "import diffusers.pipelines.pipeline_loading_utils as utils\nimportlib.reload(utils)\n"
    once = "assert [type(finder).__name__ for finder in sys.meta_path].count('_ImportHook') == 1\n"
    run_python(reload + once + FOUND, pipeline_folder)


def test_import_takes_no_library_along_and_little_time():
    measure = "import sys, time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)\n"
    names = "print([name for name in {} if name in sys.modules])"
    ours, libraries = run_python(measure.format("hf_fae") + names.format(HEAVY)).splitlines()
    assert libraries == "[]"
    assert float(ours) < 0.2 * float(run_python(measure.format("torch")))


def test_help_and_version_import_no_library():
    code = f"""
import contextlib, io, sys
from hf_fae.cli import main
for argv in [["--help"], ["--version"], *([name, "--help"] for name in {sorted(COMMANDS)})]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(argv)
    assert "hf-fae" in out.getvalue(), argv
    assert not [name for name in {HEAVY} if name in sys.modules], argv
"""
    start = time.perf_counter()
    run_python(code)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    run_python("import torch")
    assert ours < time.perf_counter() - start


def test_type_checkers_see_the_public_names():
    tree = ast.parse(Path(hf_fae.__file__).read_text())
    (checking,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in checking.body if isinstance(node, ast.ImportFrom)]
    assert {name.asname: f"hf_fae.{node.module}" for node in imports for name in node.names} == hf_fae._PUBLIC


def test_public_names_are_listed_before_they_are_imported():
    code = "import sys, hf_fae; assert set(hf_fae.__all__) <= set(dir(hf_fae)); assert 'torch' not in sys.modules"
    run_python(code)
