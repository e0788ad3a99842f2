"""The server: decodes images, classifies them and proves a radius around each answer. No torch in here."""

__version__ = "0.1.0"
