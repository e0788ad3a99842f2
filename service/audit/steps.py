"""Steps of gradient descent, `x - G a(z)`, whose terms cancel each other.

Theorem. Let `x = X h` and `z = Z h` up to constants, `a` an elementwise function with slopes in [0, s], T a diagonal
with positive entries, `A = G T`, and `R = T^-1 Z - A^T X`. Almost everywhere the Jacobian in h is, with a diagonal
`0 <= D <= s` that commutes with T, `X - G D Z = (I - A D A^T) X - A D R`. The matrix `I - A D A^T` is symmetric with
eigenvalues in `[1 - s ||A||^2, 1]`, so that the Lipschitz bound in h is
`max(1, s ||A||^2 - 1) ||X|| + s ||A|| ||R||`; columns `G'` and rows `Z'` that are left out of A and R add
`s ||G'|| ||Z'||`. (Convex potential layers: Meunier et al., *A dynamical system perspective
for Lipschitz neural networks*, ICML 2022; SLL: Araujo et al., *A unified algebraic perspective on Lipschitz neural
networks*, ICLR 2023.) T is a guess, with which R is small; any T is valid. Of matrices that are known up to a defect,
the defects `dX`, `dG` and `dZ` add `||dX|| + s ||dG|| (||Z|| + ||dZ||) + s ||G|| ||dZ||`.
"""

from __future__ import annotations

import numpy as np
from flint import arb

from service.audit.affine import forms_of
from service.audit.balls import larger, power, upper
from service.audit.matrices import Matrix
from service.audit.moves import ZERO
from service.audit.network import Base, Layer, Network
from service.audit.norms import spectral_norm
from service.audit.origins import NOWHERE
from service.audit.slices import length, rounded_product

LARGEST_SIDE = 1536
"""Most rows or columns of the matrices of a step that is bounded here."""


def gradient_step(network: Network, x: np.ndarray, step: np.ndarray, sign: int) -> Base | None:
    """Return bounds of `x + sign w`; null where w has another form than `-sign G a(z)`.

    Args:
        network: the layers so far.
        x: flat.
        step: w, flat.
        sign: 1 or -1.
    """
    if not (_is_one_base(network, x) and _is_one_base(network, step)):
        return None
    rising = network.origins.rising.get(_base_layer(network, step).start)
    if rising is None or (rising.operands == NOWHERE).any() or not _is_one_base(network, rising.operands):
        return None
    _, base, forward = forms_of(network, x)
    _, base_of_z, hidden = forms_of(network, rising.operands)
    _, _, back = forms_of(network, step)
    if base is not base_of_z or max(len(x), hidden.height, base_width(forward)) > LARGEST_SIDE:
        return None
    if back.columns.size and int(back.columns.max()) >= hidden.height:
        return None
    slope = _slope(forward, back, hidden, rising.slope, -sign)
    if slope is None:
        return None
    of_x, of_z, of_step = (network.facts(ids) for ids in (x, rising.operands, step))
    # The computed operands differ from functions of the computed h by the errors injected since.
    outer = upper(back.norm * (rising.slope * of_z.injected + rising.error))
    own = upper(of_x.injected + of_step.injected + outer)
    error = upper(slope * base.error + own)
    return Base(upper(slope * base.lipschitz), upper(slope * base.swing), error, error)


def base_width(matrix: Matrix) -> int:
    """Return the number of columns of a matrix that have entries."""
    return np.unique(matrix.columns).size


def _is_one_base(network: Network, ids: np.ndarray) -> bool:
    return bool((ids != ZERO).all()) and network.shares_base(ids)


def _base_layer(network: Network, ids: np.ndarray) -> Layer:
    """Return the layer of the base of some numbers, which was appended with it."""
    base = network.layer_of(int(ids[0])).base
    return next(layer for layer in network.layers if layer.base is base)


def _slope(forward: Matrix, back: Matrix, hidden: Matrix, steepest: arb, sign: int) -> arb | None:
    """Return the bound of the theorem for `X - sign G D Z`; null where no T fits.

    Args:
        forward: X.
        back: G, up to its sign.
        hidden: Z.
        steepest: s.
        sign: 1 or -1.
    """
    used = np.unique(np.concatenate([forward.columns, hidden.columns]))
    x, z = (_dense(matrix, used) for matrix in (forward, hidden))
    g = sign * _dense(back, np.arange(hidden.height))
    product, lost = (g.T, arb(0)) if np.array_equal(x, np.eye(*x.shape)) else rounded_product(g.T, x)
    # Z is near T^2 G^T X, row by row. Rows that no positive factor fits are bounded apart.
    with np.errstate(all="ignore"):
        fitted = np.sqrt((z * product).sum(axis=1) / np.square(product).sum(axis=1))
        live = np.isfinite(fitted) & (fitted > 2.0**-500) & (fitted < 2.0**500)
    if not live.any():
        return None
    factors = np.where(live, fitted, 0.0)
    inverse = np.where(live, 1.0 / np.where(live, factors, 1.0), 0.0)
    scaled, unit = g * factors, arb(4) * power(-53)
    size = upper(spectral_norm(scaled) + unit * length(scaled) + power(-400))
    # T^-1 Z and T (G^T X), each entry with a few roundings.
    one, other = z * inverse[:, None], product * factors[:, None]
    largest = arb(float(factors.max(initial=0.0)))
    rest = length(one - other) + unit * (length(one) + length(other)) + largest * lost + power(-400)
    bound = larger(arb(1), upper(steepest * size * size - 1)) * (forward.norm + forward.defect)
    bound = bound + steepest * size * rest + steepest * length(g[:, ~live]) * length(z[~live])
    norm_g, norm_z = upper(back.norm + back.defect), hidden.norm
    bound = bound + forward.defect + steepest * (back.defect * norm_z + norm_g * hidden.defect)
    return upper(bound)


def _dense(matrix: Matrix, used: np.ndarray) -> np.ndarray:
    """Return some columns of a matrix, those with entries among them."""
    dense = np.zeros((matrix.height, len(used)))
    dense[np.repeat(np.arange(matrix.height), np.diff(matrix.starts)), np.searchsorted(used, matrix.columns)] = (
        matrix.values
    )
    return dense
