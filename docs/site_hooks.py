"""Hooks of the documentation site: links that work on GitHub and on the site, and docstrings as Markdown.

On GitHub, README.md is the front page and pages link to files of the repository. The site has README.md as its index
and CHANGELOG.md and CONTRIBUTING.md as pages; links to other files outside docs/ become plain text there.
"""

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)")


def on_files(files, config):
    """Add the pages that lie beside docs/."""
    for name, uri in PAGES.items():
        path = ROOT / name
        if path.exists():
            content = path.read_text(encoding="utf-8").replace("](docs/images/", "](images/")
            files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at the pages of the site."""
    folder = ROOT if page.file.src_uri in PAGES.values() else (ROOT / "docs" / page.file.src_uri).parent

    def replace(match):
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        if target.startswith(("http://", "https://", "mailto:")):
            return match[0]
        path = (folder / target).resolve().relative_to(ROOT).as_posix()
        if path in PAGES:
            uri = PAGES[path]
        elif path.startswith("docs/"):
            uri = path.removeprefix("docs/")
        else:
            return text
        depth = page.file.src_uri.count("/")
        return f"[{text}]({'../' * depth}{uri}{anchor})"

    return LINK.sub(replace, markdown)


class MarkdownDocstrings(griffe.Extension):
    """Rewrites the reStructuredText in docstrings that Markdown does not know: roles, and ``::`` before code."""

    def on_object(self, *, obj, **kwargs):
        """Rewrite one docstring."""
        if obj.docstring:
            text = re.sub(r":(?:class|func|meth|mod):`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
