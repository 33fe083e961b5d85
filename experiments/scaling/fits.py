"""Published scaling laws of loss with size, experts and tokens, fitted by least squares."""

from typing import NamedTuple

import numpy as np

EXPONENTS = np.geomspace(0.02, 1.5, 60)  # grid of candidate exponents


class Clark(NamedTuple):
    """log10 L = a log10 N + b log10 E + c log10 N log10 E + d.

    Source: Clark et al., arXiv:2202.01169, with E instead of its saturating form, since E is small.
    """

    a: float
    b: float
    c: float
    d: float
    r_squared: float

    def slope_of_experts(self, size: float) -> float:
        """Slope of log10 L in log10 E at a size."""
        return self.b + self.c * np.log10(size)


def fit_clark(size: np.ndarray, experts: np.ndarray, loss: np.ndarray) -> Clark:
    """Fits the form to points [P] of active parameters, experts and loss."""
    n, e, target = np.log10(size), np.log10(experts), np.log10(loss)
    columns = np.stack([n, e, n * e, np.ones_like(n)], axis=1)
    found, *_ = np.linalg.lstsq(columns, target, rcond=None)
    a, b, c, d = map(float, found)
    return Clark(a, b, c, d, r_squared(target, columns @ found))


class Krajewski(NamedTuple):
    """L = c + a / N^alpha + b / D^beta, for one granularity and number of experts.

    Source: Krajewski et al., arXiv:2402.07871.
    """

    c: float
    a: float
    b: float
    alpha: float
    beta: float
    r_squared: float


def fit_krajewski(size: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> Krajewski:
    """Fits the form to points [P] of active parameters, tokens and loss.

    For given exponents the fit is linear; all pairs X of `EXPONENTS` are tried. N and D are divided
    by their geometric means, so a and b refer to the middle of the grid.
    """
    n, d = (values / np.exp(np.mean(np.log(values))) for values in (size, tokens))
    alpha_X, beta_X = (grid.ravel() for grid in np.meshgrid(EXPONENTS, EXPONENTS))
    powers_XP = n ** -alpha_X[:, None], d ** -beta_X[:, None]
    columns_XPC = np.stack([np.ones_like(powers_XP[0]), *powers_XP], axis=-1)
    found_XC = np.linalg.pinv(columns_XPC) @ loss
    errors_X = np.sum((np.einsum("XPC,XC->XP", columns_XPC, found_XC) - loss) ** 2, axis=1)
    best = int(np.argmin(errors_X))
    c, a, b = map(float, found_XC[best])
    share = r_squared(loss, columns_XPC[best] @ found_XC[best])
    return Krajewski(c, a, b, float(alpha_X[best]), float(beta_X[best]), share)


def r_squared(target: np.ndarray, fitted: np.ndarray) -> float:
    """The fraction of the variance that a fit explains."""
    return float(1 - np.sum((target - fitted) ** 2) / np.sum((target - target.mean()) ** 2))
