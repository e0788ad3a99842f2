"""The least that the framework can do: FastAPI on uvicorn (uvloop, httptools), and the body comes back."""

from __future__ import annotations

import os
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response

app = FastAPI()


@app.get("/ready")
async def ready() -> Response:
    return Response("ready")


@app.post("/predict")
async def predict(request: Request) -> Response:
    return Response(await request.body())


if __name__ == "__main__":
    uvicorn.run(
        "echo_server:app",
        app_dir=str(Path(__file__).parent),
        workers=int(os.environ["BENCH_PROCESSES"]),
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        backlog=2048,
    )
