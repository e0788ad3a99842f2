"""Print `gpu` where onnxruntime-gpu can run, else `cpu`: it picks the lock that the Makefile installs.

It asks the driver itself, not `nvidia-smi`: containers often have one without the other, and a driver older than the
CUDA libraries in `serve-gpu.txt` would leave the service without a provider. Runs before anything is installed, so
only the standard library is at hand.
"""

import ctypes
import sys

# onnxruntime-gpu in serve-gpu.txt is built for CUDA 13 (driver 580 or newer).
CUDA_VERSION = 13_000


def accelerator() -> str:
    """`gpu` if an NVIDIA driver for `CUDA_VERSION` answers and shows at least one device, else `cpu`."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "cpu"
    version, devices = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "cpu"
    if cuda.cuDeviceGetCount(ctypes.byref(devices)) != 0 or devices.value == 0:
        return "cpu"
    return "gpu" if version.value >= CUDA_VERSION else "cpu"


if __name__ == "__main__":
    sys.stdout.write(accelerator() + "\n")
