"""Writer of the generated blocks of README.md: `make readme` writes them, tests/project/test_readme.py compares them.

Block NAME is the text between `<!-- NAME: written by make readme -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import httpx

from service.api.app import create_app
from service.artefact.card import Card, read_card
from service.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ZOO = ROOT / "models" / "zoo"


def block_pattern(name: str) -> re.Pattern[str]:
    """Return the pattern of one block; group 2 is its content."""
    return re.compile(rf"(<!-- {name}: written by make readme -->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)


def block(text: str, name: str) -> str:
    """Return the content of block `name`.

    Raises:
        SystemExit: the text has no such block.
    """
    found = block_pattern(name).search(text)
    if found is None:
        raise SystemExit(f"README.md has no block {name!r}: put its two comment lines in the place for it")
    return found[2]


def example_request(text: str) -> tuple[str, dict[str, str], dict[str, Path]]:
    """Return path, form fields and files of the README's `curl ... -F name=value -F name=@file`.

    Raises:
        SystemExit: the text has no such command.
    """
    command = re.search(r"^curl [^\n]*/predict [^\n]*(?:\\\n[^\n]*)*", text, re.MULTILINE)
    if command is None:
        raise SystemExit("README.md has no `curl .../predict ...` to run")
    words = shlex.split(command[0])
    forms = [words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "-F"]
    (url,) = (word for word in words if "localhost:8000/" in word)
    fields = {name: value for name, value in forms if not value.startswith("@")}
    files = {name: ROOT / value[1:] for name, value in forms if value.startswith("@")}
    return url.partition("localhost:8000")[2], fields, files


def example_answer(text: str) -> dict[str, Any]:
    """Return the answer of the application with the shipped artefacts to the README's request, digits shortened."""
    path, fields, files = example_request(text)
    app = create_app(Settings(models=ZOO, provider="cpu"))

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            contents = {name: (file.name, file.read_bytes(), "image/png") for name, file in files.items()}
            return await client.post(path, data=fields, files=contents)

    answer = asyncio.run(post())
    answer.raise_for_status()
    return shortened(answer.json())


def shortened(value: Any, key: str = "") -> Any:
    """Return the answer as the README shows it: four digits, radii rounded down, the image cut."""
    if isinstance(value, dict):
        return {name: shortened(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [shortened(item) for item in value]
    if isinstance(value, float):
        digits = 10.0 ** (3 - math.floor(math.log10(abs(value)))) if value else 1.0
        return math.floor(value * digits) / digits if key.startswith("radius") else float(f"{value:.4g}")
    return f"{value[:24]}..." if key in ("image", "digest", "card_digest") else value


def example_block(text: str) -> str:
    """Return the answer as a JSON block; lists of numbers in one line."""
    answer = json.dumps(example_answer(text), indent=2)
    one_line = re.sub(r"\[[^\[\]{}]*\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", answer)
    one_line = re.sub(r'\{\s+("class_id": \d+,)\s+("label": "[^"]*")\s+\}', r"{\1 \2}", one_line)
    return f"```json\n{one_line}\n```\n"


def settings_block() -> str:
    """Return a table with one row for each field of `Settings`."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.default.relative_to(ROOT) if isinstance(field.default, Path) else field.default
        meaning = " ".join((field.description or "").split())
        shown = "" if default in (None, "") else f"`{default}`"
        rows.append(f"| `{PREFIX}{name.upper()}` | {shown} | {meaning} |")
    return "\n".join(rows) + "\n"


def models_block() -> str:
    """Return a table with one row for each shipped artefact, from its card."""
    cards = [read_card(path.parent) for path in sorted(ZOO.glob("*/card.json"))]
    rows = [
        "| model | classes | accuracy | certified accuracy, `proof=fast` "
        "| certified accuracy, `proof=best` (uses the box) | n | loss |",
        "|" + "---|" * 7,
    ]
    rows += [f"| {' | '.join(_row(card))} |" for card in cards]
    return "\n".join(rows) + "\n"


def _row(card: Card) -> list[str]:
    sizes = sorted({entry.n for entry in card.certified_accuracy})
    fast = [(entry.value, entry.epsilon) for entry in card.certified_accuracy]
    best = [
        (entry.with_references, entry.epsilon) for entry in card.certified_accuracy if entry.with_references is not None
    ]
    return [
        f"`{card.name}`",
        ", ".join(card.labels),
        "-" if card.accuracy is None else f"{card.accuracy:.2%}",
        # One line for each radius, so that both shares of a radius are in the same line.
        *("<br>".join(f"{share:.2%} at {epsilon:.4g}" for share, epsilon in shares) or "-" for shares in (fast, best)),
        ", ".join(f"{n:,}" for n in sizes) or "-",
        str(card.loss.get("kind", "-")),
    ]


def generated(text: str) -> dict[str, str]:
    """Return the content of every block by name, for the example in `text`."""
    return {"example": example_block(text), "models": models_block(), "settings": settings_block()}


def main() -> None:
    """Write the blocks into README.md."""
    text = README.read_text(encoding="utf-8")
    for name, content in generated(text).items():
        block(text, name)
        text = block_pattern(name).sub(lambda found, new=content: found[1] + new + found[3], text)
    README.write_text(text, encoding="utf-8")
    sys.stdout.write("README.md is up to date\n")


if __name__ == "__main__":
    main()
