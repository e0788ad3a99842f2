"""Artefacts: files, card, and their verification before they are served."""
