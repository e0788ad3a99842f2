"""The endpoint that one writes first: decode and run in the handler. One worker process for each CPU."""

from __future__ import annotations

import inference
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

app = FastAPI()
# The parent of the workers answers nothing and needs no model.
model = None if __name__ == "__main__" else inference.session()


@app.get("/ready")
async def ready() -> Response:
    return Response("ready")


@app.post("/predict")
async def predict(request: Request) -> JSONResponse:
    image_CHW = inference.decode(await request.body())
    return JSONResponse({"logits": inference.logits(model, image_CHW[None])[0].tolist()})


if __name__ == "__main__":
    uvicorn.run(
        "naive_server:app",
        host="127.0.0.1",
        port=inference.PORT,
        workers=inference.WORKERS,
        access_log=False,
        log_level="warning",
        backlog=2048,
    )
