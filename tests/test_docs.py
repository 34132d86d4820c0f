"""The documentation builds without a warning, and its reference has everything that is public."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_fae


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = "\n".join(page.read_text() for page in sorted(DOCS.glob("api/*.md")))
MODULES = re.findall(r"^\.\. automodule:: (\S+)", PAGES, flags=re.MULTILINE)
NAMES = re.findall(r"^\.\. (?:autoclass|autofunction|py:data):: (\S+)", PAGES, flags=re.MULTILINE)
# Modules whose public names are for the rest of the package, or for the command line, only.
INTERNAL = re.compile(r"hf_fae\.(layers\.\w+|(app|cli)(\.\w+)?|modeling|networks|registration)")


@pytest.fixture(scope="module")
def inventory(tmp_path_factory) -> set[str]:
    """The names that the built reference can be linked by."""
    from sphinx.util.inventory import InventoryFile

    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-E", "-q", str(DOCS), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with (folder / "objects.inv").open("rb") as file:
        found = InventoryFile.load(file, "", lambda base, path: path)
    return {name for kind, objects in found.items() if kind.startswith("py:") for name in objects}


def test_all_public_names_are_in_the_reference(inventory):
    assert not {f"hf_fae.{name}" for name in hf_fae.__all__} - inventory
    defined = [getattr(module, name) for module in map(importlib.import_module, MODULES) for name in module.__all__]
    names = {f"{one.__module__}.{one.__name__}" for one in defined if inspect.isclass(one) or inspect.isfunction(one)}
    names = {name for name in names if name.rpartition(".")[2] not in hf_fae.__all__}
    assert len(names) > 100 and not names - inventory


def test_every_module_is_in_the_reference():
    missing = [
        name
        for name, public in public_names()
        if name not in MODULES
        and not INTERNAL.fullmatch(name)
        and not all(f"hf_fae.{one}" in NAMES or f"{name}.{one}" in NAMES for one in public)
    ]
    assert not missing, "add them to a page in docs/api"


def public_names():
    """Each module with its `__all__`, without importing it."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and name[-9:] != ".__init__":
                yield name, ast.literal_eval(node.value)
