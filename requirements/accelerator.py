"""Print `gpu` where onnxruntime-gpu can run, else `cpu`: it picks the lock that the Makefile installs.

It asks the driver itself, not `nvidia-smi`: containers often have one without the other. Runs before anything is
installed, so only the standard library is at hand.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from service.runtime import driver


def accelerator() -> str:
    """Return `gpu` if the NVIDIA driver and the first GPU can run the wheel of `serve-gpu.txt`, else `cpu`."""
    return "cpu" if driver.obstacle() else "gpu"


if __name__ == "__main__":
    sys.stdout.write(accelerator() + "\n")
