"""Offline side of lipcert: 1-Lipschitz layers, losses, data, training and export of artefacts."""
