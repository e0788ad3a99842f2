# Two images: `docker build --target cpu .` (the default) and `--target gpu`. Neither holds torch or the trainer.
# BASE_IMAGE needs Python 3.11 or newer with pip and venv, and glibc.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS venv
# No pip inside, and the same base for building and running: the venv links to its interpreter.
RUN python3 -m venv --without-pip /opt/venv

FROM venv AS venv-cpu
COPY requirements/serve-cpu.txt /build/
RUN python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
    --require-hashes --only-binary :all: -r /build/serve-cpu.txt

FROM venv AS venv-gpu
COPY requirements/serve-gpu.txt /build/
RUN python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
    --require-hashes --only-binary :all: -r /build/serve-gpu.txt

FROM venv AS app
WORKDIR /app
COPY service service
COPY models/zoo models/zoo
# Readable whatever the umask of the checkout; compiled here, because the container may not write.
RUN chmod -R a+rX,go-w . && python3 -m compileall -q --invalidation-mode unchecked-hash service

FROM ${BASE_IMAGE} AS runtime
ARG REVISION=unknown
LABEL org.opencontainers.image.title="lipcert" \
      org.opencontainers.image.description="Image classifiers whose every answer carries a certified L2 radius" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LIPCERT_HOST=0.0.0.0 \
    ORT_DISABLE_TELEMETRY=1
# A number, so that a cluster can check that it is not root; no name and no home are needed.
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-I", "-c", "import os, ssl, urllib.request as r; e = os.environ.get; s = 's' if e('LIPCERT_TLS_CERTIFICATE') else ''; r.urlopen(f'http{s}://127.0.0.1:{e(\"LIPCERT_PORT\") or 8000}/health/ready', timeout=4, context=ssl._create_unverified_context())"]
ENTRYPOINT ["python", "-m", "service"]

FROM runtime AS gpu
# The NVIDIA runtime mounts the driver when it sees these, and starts no container whose driver is too old for them; the
# CUDA libraries come with the wheels.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA=cuda>=13.0
COPY --from=venv-gpu /opt/venv /opt/venv
COPY --from=app /app /app

FROM runtime AS cpu
COPY --from=venv-cpu /opt/venv /opt/venv
COPY --from=app /app /app
