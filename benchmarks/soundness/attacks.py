"""Attacks of foolbox (DeepFool, Carlini-Wagner) as starts of the search, on the served graphs."""

from __future__ import annotations

import numpy as np
import torch
from foolbox.attacks.carlini_wagner import L2CarliniWagnerAttack
from foolbox.attacks.deepfool import L2DeepFoolAttack
from foolbox.criteria import Misclassification
from foolbox.models.pytorch import PyTorchModel

from benchmarks.soundness.boundary import View
from models.evaluation.attacks import ATTACKS
from models.evaluation.libraries import BATCH, ServedModel


def foolbox_starts(view: View, image_NCHW: np.ndarray) -> list[np.ndarray]:
    """What each attack found from each image, in the pixels that are sent."""
    class_N = view.classes(image_NCHW)
    model = PyTorchModel(ServedModel(view).eval(), bounds=(0, 1), device="cpu")  # type: ignore[arg-type]
    deepfool = {**ATTACKS["DeepFool"], "candidates": min(3, len(view.classifier.labels))}
    found = []
    for attack in (L2DeepFoolAttack(**deepfool), L2CarliniWagnerAttack(**ATTACKS["Carlini-Wagner"])):
        parts = [
            attack.run(
                model,
                torch.from_numpy(np.ascontiguousarray(image_NCHW[k : k + BATCH])),
                Misclassification(torch.from_numpy(class_N[k : k + BATCH])),
            ).numpy()
            for k in range(0, len(image_NCHW), BATCH)
        ]
        found.append(np.concatenate(parts))
    return found
