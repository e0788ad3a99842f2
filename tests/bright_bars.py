"""A data set that a tiny network learns in seconds."""

import torch

from models.data.labelled import LabelledImages


def bars() -> LabelledImages:
    """70 images of 6 x 6: three kinds of bright bars, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(70) % 3
    images = torch.randint(0, 40, (70, 1, 6, 6), generator=generator, dtype=torch.uint8)
    for n, label in enumerate(labels.tolist()):
        images[n, 0, 2 * label] += 200
    return LabelledImages(images, labels)
