"""The documentation builds without a warning, and has every public name, every method, every place it refers to."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from documents import blocks, pages

import hf_fae


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = "\n".join(page.read_text() for page in sorted(DOCS.glob("api/*.md")))
MODULES = re.findall(r"^\.\. automodule:: (\S+)", PAGES, flags=re.MULTILINE)
NAMES = re.findall(r"^\.\. (?:autoclass|autofunction|py:data):: (\S+)", PAGES, flags=re.MULTILINE)
# Modules whose public names are for the rest of the package, or for the command line, only.
INTERNAL = re.compile(r"hf_fae\.(layers\.\w+|(app|cli|own_images)(\.\w+)?|modeling|networks|registration)")


@pytest.fixture(scope="module")
def inventory(tmp_path_factory, processes) -> set[str]:
    """The names in the built reference."""
    from sphinx.util.inventory import InventoryFile

    folder = tmp_path_factory.mktemp("docs")
    processes.run(["-m", "sphinx", "-W", "--keep-going", "-E", "-q", DOCS, folder])
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


@pytest.mark.parametrize("page", sorted(DOCS.glob("models/*.md")), ids=lambda page: page.stem)
def test_every_method_has_the_same_sections(page):
    if page.stem == "index":
        return
    headings = [line[3:] for line in page.read_text().splitlines() if line.startswith("## ")]
    common = ["What it is", "Paper", "Config", "Recipe", "Differences from the paper's code"]
    assert [heading for heading in headings if heading in common] == common
    assert f"]({page.name})" in (DOCS / "models" / "index.md").read_text()


def test_presets_are_listed():
    """By patterns such as `mar-{b,l,h}`."""
    page = (DOCS / "models" / "index.md").read_text().split("## Presets")[1]
    listed = {name for pattern in re.findall(r"`([a-z0-9{},-]+)`", page) for name in expand(pattern)}
    assert not set(hf_fae.PRESETS) - listed


def expand(pattern: str) -> list[str]:
    """The names of a pattern, as a shell expands braces."""
    found = re.fullmatch(r"(.*?)\{(.*?)\}(.*)", pattern)
    if not found:
        return [pattern]
    return [name for word in found[2].split(",") for name in expand(found[1] + word + found[3])]


def test_newcomers_find_what_the_table_names():
    """ "Where is ..." in docs/contributing.md: each row names a file below src/hf_fae and a definition in it."""
    page = (DOCS / "contributing.md").read_text()
    rows = re.findall(r"^\| .*\? \| `([\w/]+\.py)`: `(\w+)` \|$", page, flags=re.MULTILINE)
    assert len(rows) >= 20 and len(rows) == page.count("? |")
    for file, name in rows:
        path = ROOT / "src" / "hf_fae" / file
        assert path.exists(), f"docs/contributing.md: there is no {file} with {name}; {found(name)}"
        assert name in definitions(path), f"docs/contributing.md: {file} does not define {name}; {found(name)}"


def definitions(path: Path) -> set[str]:
    """The classes, functions and constants of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {ast.unparse(target) for target in targets}
    return names


def found(name: str) -> str:
    """Where a definition has gone, for a message."""
    paths = [path for path in sorted((ROOT / "src").rglob("*.py")) if name in definitions(path)]
    places = ", ".join(str(path.relative_to(ROOT / "src" / "hf_fae")) for path in paths)
    return f"it is in {places}" if places else "no file does, it may have another name now"


def test_code_fits_its_column():
    """Longer lines would wrap at the width of the built pages."""
    wide = [
        f"{page.relative_to(ROOT)}:{block.line + number}"
        for page in pages()
        if "checkpoints" not in page.parts
        for block in blocks(page)
        for number, line in enumerate(block.text.splitlines(), start=1)
        if len(line) > 96 and not block.language.startswith("{")
    ]
    assert not wide
