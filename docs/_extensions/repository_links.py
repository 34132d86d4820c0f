"""Links that work on GitHub work in the built pages as well.

README.md, CONTRIBUTING.md and CHANGELOG.md have pages. Links to other files outside docs/ download these files, as
MyST does for all but Markdown; a link to a folder becomes plain text, because the built pages have no folders. A link
to a missing file stays a warning.
"""

import posixpath
import re
from pathlib import Path

from sphinx import addnodes
from sphinx.transforms import SphinxTransform


ROOT = Path(__file__).resolve().parents[2]
# Files outside docs/ that have a page.
PAGES = {"README": "index", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog"}
# The place of README.md in `index.md`.
MARK = "<!-- README.md -->"
# Targets of links and images, in Markdown and in HTML, except addresses and anchors of the same page.
RELATIVE = re.compile(r"""(\]\(|\b(?:src|href)=")(?![a-z]+:|#|/)([^)"\s]+)""")


def include_readme(app, docname: str, source: list[str]) -> None:
    """Replaces the mark by README.md, with links relative to docs/."""
    if MARK not in source[0]:
        return
    readme = ROOT / "README.md"
    app.env.note_dependency(str(readme))
    text = RELATIVE.sub(lambda link: link[1] + posixpath.relpath(link[2], "docs"), readme.read_text())
    source[0] = source[0].replace(MARK, text)


class OutsideLinks(SphinxTransform):
    """Resolves links that leave docs/."""

    default_priority = 5  # before Sphinx collects the files to download

    def apply(self, **kwargs) -> None:
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for link in [*self.document.findall(addnodes.pending_xref)]:
            target = (folder / link["reftarget"]).resolve()
            if link.get("refdomain") == "doc" and not target.is_relative_to(self.env.srcdir):  # Markdown
                if target.parent == ROOT and target.name in PAGES:
                    page = Path(self.env.srcdir, PAGES[target.name])
                    link["reftarget"] = posixpath.relpath(page, folder)
                else:
                    file = posixpath.relpath(f"{target}.md", folder)
                    options = {"refdomain": None, "reftarget": file, "refdoc": self.env.docname}
                    link.replace_self(addnodes.download_reference("", "", *link.children, **options))
            elif link.get("reftype") == "myst" and target.is_dir():
                link.replace_self(link.children)


def setup(app) -> dict:
    app.connect("source-read", include_readme)
    app.add_transform(OutsideLinks)
    return {"parallel_read_safe": True}
