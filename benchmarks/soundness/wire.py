"""What a client of the service sees: images as float64 npy arrays through the whole application."""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass

import httpx
import numpy as np

from benchmarks.soundness.boundary import Search
from benchmarks.soundness.exact import just_inside
from service.api.app import create_app
from service.inference.classifier import Classifier
from service.pixels.distances import is_inside
from service.settings import Settings


@dataclass(frozen=True)
class Answers:
    """`POST /predict` about n images, the points found from them, and these pulled inside of the answered radius."""

    n: int
    other_answer: int
    """Images whose class or radius is not what the search met."""
    inside: int
    """Points of another class strictly inside of the answered radius."""
    pulled_flips: int


def ask(classifier: Classifier, found: Search, resize: bool = False) -> Answers:
    """Post everything that was found to an application with this model, one image a request."""
    app = create_app(Settings(default_model=classifier.name, provider="cpu"), {classifier.name: classifier})

    async def post_all() -> Answers:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:

            async def post(image_CHW: np.ndarray, proof: str = "fast") -> tuple[int, float]:
                file = io.BytesIO()
                np.save(file, image_CHW)
                answer = await client.post(
                    "/predict",
                    params={"resize": resize, "proof": proof},
                    content=file.getvalue(),
                    headers={"Content-Type": "application/x-npy"},
                )
                answer.raise_for_status()
                return answer.json()["class_id"], answer.json()["certificate"]["radius"]

            other_answer = violations = pulled_flips = 0
            for n, (image, point) in enumerate(zip(found.image_NCHW, found.point_NCHW, strict=True)):
                class_id, radius = await post(image)
                # The batch may be another than in the search: equal up to the rounding that E covers.
                other_answer += class_id != found.class_N[n] or abs(radius - found.radius_N[n]) > 1e-9
                _, radius = await post(image, "best")
                if radius == 0.0 or not found.found_N[n]:
                    continue
                violations += (await post(point))[0] != class_id and is_inside(image, point, radius)
                pulled_flips += (await post(just_inside(image, point, radius)))[0] != class_id
            return Answers(len(found.image_NCHW), other_answer, violations, pulled_flips)

    return asyncio.run(post_all())
