"""Shapes in annotations are checked under test, and cost a server nothing."""

import subprocess
import sys

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from service.certificate import spectral_norm_bound


def test_a_call_with_another_shape_fails_under_test() -> None:
    with pytest.raises(TypeCheckError):
        spectral_norm_bound(np.zeros(3))


def test_a_server_does_not_load_what_checks_shapes() -> None:
    code = "import sys, service.api.app; sys.exit('jaxtyping' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
