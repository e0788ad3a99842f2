"""Pages of the repository: their links lead somewhere, their paths, modules and make targets exist."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from service import __version__

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in (".", "docs", "benchmarks", "benchmarks/libraries")
    for path in sorted((ROOT / folder).glob("*.md"))
}
CURRENT = {name: text for name, text in PAGES.items() if "left the tree" not in text and name != "CHANGELOG.md"}
"""Pages about the tree as it is; the others also name files and commands of an earlier commit."""
FOLDERS = ("benchmarks", "docs", "lipcert", "models", "requirements", "service", "tests")
MAKE_TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def code(text: str) -> list[str]:
    """Return the inline code and the lines of code blocks of a page."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose) + [line for block in blocks for line in block.splitlines()]


def headings(text: str) -> set[str]:
    """Return the anchors of a page's headings, as they are made by the common viewers."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/architecture.md"} <= set(PAGES)
    assert {"README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/soundness.md"} <= set(CURRENT)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading_of_it(page: str) -> None:
    broken: list[str] = []
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.exists() or (anchor and anchor not in headings(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", CURRENT)
def test_every_path_in_code_exists(page: str) -> None:
    paths = [part for part in code(CURRENT[page]) if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", part)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", CURRENT)
def test_every_command_exists(page: str) -> None:
    commands = [re.sub(r"^([A-Z_]+=\S+ )+", "", part) for part in code(CURRENT[page])]
    targets = {words[1] for words in map(str.split, commands) if words[:1] == ["make"] and len(words) > 1}
    assert targets <= MAKE_TARGETS
    modules = {found[1] for command in commands if (found := re.match(r"(?:\S*/)?python -m ([a-z_.]+)", command))}
    assert {name for name in modules if find_spec(name) is None} == set()


def test_every_page_has_a_place_in_the_site_and_the_readme_is_its_first() -> None:
    def pages(part: object) -> list[str]:
        if isinstance(part, str):
            return [part]
        values = part.values() if isinstance(part, dict) else part
        return [page for value in values for page in pages(value)]  # type: ignore[attr-defined]

    placed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert placed[0] == "index.md"
    assert len(placed) == len(set(placed))
    documents = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]
    assert set(placed[1:]) - {"repository/CHANGELOG.md"} == {f"{document.stem}.md" for document in documents}


def test_contributing_is_one_page_and_names_the_checks() -> None:
    page = PAGES["CONTRIBUTING.md"]
    assert page.count("\n") <= 60
    assert {"make check", "make test", "make format", "make readme"} <= set(code(page))


def test_changelog_has_the_version_of_the_project_and_what_is_not_released() -> None:
    entries = re.findall(r"^## \[(.*?)\]", PAGES["CHANGELOG.md"], re.MULTILINE)
    assert entries[0] == "Unreleased"
    assert __version__ in entries


def test_an_option_of_predict_touches_at_most_nine_files() -> None:
    (section,) = re.findall(r"^## How to add an option\n(.*?)^## ", PAGES["docs/architecture.md"], re.M | re.DOTALL)
    files = re.findall(r"^\| `(\S+)` \|", section, re.MULTILINE)
    assert {file.split("/")[0] for file in files} == {"service", "tests", "CHANGELOG.md"}
    assert len(files) == len(set(files)) <= 9
    assert all((ROOT / file).is_file() for file in files)
