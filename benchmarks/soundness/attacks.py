"""Attacks of foolbox (DeepFool, Carlini-Wagner) as starts of the search, on the served graphs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from foolbox.attacks.carlini_wagner import L2CarliniWagnerAttack
from foolbox.attacks.deepfool import L2DeepFoolAttack

from benchmarks.soundness.boundary import View
from models.evaluation.attacks import ATTACKS
from models.evaluation.libraries import BATCH, foolbox_adversarials


def foolbox_starts(view: View, image_NCHW: np.ndarray, carlini: Mapping[str, int]) -> list[np.ndarray]:
    """Return the images that each attack found, in the pixels that are sent.

    Args:
        view: the classifier.
        image_NCHW: where to start from.
        carlini: changes of the parameters of Carlini-Wagner.
    """
    class_N = view.classes(image_NCHW)
    deepfool = {**ATTACKS["DeepFool"], "candidates": min(3, len(view.classifier.labels))}
    parts = [slice(start, start + BATCH) for start in range(0, len(image_NCHW), BATCH)]
    return [
        np.concatenate([foolbox_adversarials(attack, view, image_NCHW[part], class_N[part]) for part in parts])
        for attack in (L2DeepFoolAttack(**deepfool), L2CarliniWagnerAttack(**{**ATTACKS["Carlini-Wagner"], **carlini}))
    ]
