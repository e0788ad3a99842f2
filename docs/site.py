"""Hook of MkDocs: the site is built from the pages of the repository as they are (mkdocs.yml, `make site`).

README.md is the first page, the notebook is a page, and every file that a page links to becomes one, so that no link
leads out of the site.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|<)([^)#\s]+)(?=[)#])")
_OTHER_HOST = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//""")
_LANGUAGES = {".py": "python", ".conf": "nginx", ".yml": "yaml", ".json": "json", ".toml": "toml"}
_PICTURES = (".png", ".svg")
# Sources are found by links, not by words.
_UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"

_paths: dict[str, str] = {}
"""Path in the repository of each page, by its path in the site."""


def on_config(config: MkDocsConfig) -> None:
    """Give headings the anchors that the links in the pages name, those of common viewers."""
    config.mdx_configs["toc"] = {"permalink": True, "slugify": _anchor}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are not in docs/: README, notebook, and whatever pages link to."""
    _paths.clear()
    found = ["README.md", "CHANGELOG.md", "docs/lipcert.ipynb"]
    found += [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    # Grows while it is read.
    for path in found:
        place = _place(path)
        if place in _paths:
            continue
        _paths[place] = path
        if path.endswith(".md"):
            found += [_target(path, link) for link in _LINK.findall((ROOT / path).read_text(encoding="utf-8"))]
        if place not in files.src_uris:
            content = (ROOT / path).read_bytes() if path.endswith(_PICTURES) else _page(path)
            files.append(File.generated(config, place, content=content))


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Return the page with links to places in the site."""
    place = page.file.src_uri
    path = _paths[place]
    if not path.endswith(".md"):
        return markdown

    def link(found: re.Match[str]) -> str:
        return posixpath.relpath(_place(_target(path, found[1])), posixpath.dirname(place) or ".")

    return _LINK.sub(link, markdown)


def on_post_page(output: str, page: Page, **_: object) -> None:
    """Refuse a page that would load something from another host."""
    if _OTHER_HOST.search(output):
        raise PluginError(f"{_paths[page.file.src_uri]}: the page loads something from another host")


def _anchor(title: str, separator: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", separator)


def _target(path: str, link: str) -> str:
    """Return the path in the repository that a link of a page leads to."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(link)))
    if target.startswith("..") or not (ROOT / target).is_file():
        raise PluginError(f"{path}: the link to {link} leads to no file of the repository")
    return target


def _place(path: str) -> str:
    """Return the place of a file of the repository in the site."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    return f"repository/{path}" + ("" if path.endswith((".md", *_PICTURES)) else ".md")


def _page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        return "\n\n".join(part for cell in json.loads(text)["cells"] for part in _cell(cell))
    return f"{_UNSEARCHED}# {path}\n\n" + _block(text, _LANGUAGES.get(Path(path).suffix, "text"))


def _cell(cell: dict[str, Any]) -> list[str]:
    """Return a cell of a notebook and its outputs as Markdown."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    parts = [_block(source, "python")]
    for output in cell["outputs"]:
        if "text" in output:
            parts.append(_block("".join(output["text"]), "text"))
        else:
            parts.append(f"![Figure](data:image/png;base64,{output['data']['image/png'].strip()})")
    return parts


def _block(text: str, language: str) -> str:
    fence = max(re.findall(r"`{3,}", text), default="``") + "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
