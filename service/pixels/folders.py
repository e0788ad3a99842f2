"""Names in folders of images that are no images: the clutter of archives and of file systems."""

from __future__ import annotations

_CLUTTER = frozenset(
    {"Thumbs.db", "ehthumbs.db", "desktop.ini", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}
)


def is_clutter(name: str) -> bool:
    """Return whether a file or folder of this name is passed over; names that begin with a dot are."""
    return name.startswith(".") or name in _CLUTTER
