"""Oracle of UniPC (order 2, bh2): plain NumPy, float64, spec section 6.4 formula by formula.

Nothing is shared with hfjax: every coefficient is computed at its step, from the latents' history.
"""

import math
from collections.abc import Callable

import numpy as np


def solve(
  velocity: Callable[[np.ndarray, int], np.ndarray], noise: np.ndarray, steps: int, shift: float
) -> np.ndarray:
  """What `noise` flows to under `velocity(x, timestep)`."""
  u = np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1]
  sigma = [float(shift * v / (1 + (shift - 1) * v)) for v in u] + [0.0]
  alpha = [1 - s for s in sigma]
  lam = [math.log(1 - s) - math.log(s) for s in sigma[:-1]]
  x = np.asarray(noise, np.float64)
  m, last_x, last_order = [], x, 0
  for i in range(steps):
    m.append(x - sigma[i] * velocity(x, int(1000 * sigma[i])))
    if i > 0:
      x = _correct(sigma, alpha, lam, m, last_x, i, last_order)
    last_x, last_order = x, min(2, steps - i, i + 1)
    x = _predict(sigma, alpha, lam, m, x, i, last_order)
  return x


def _predict(sigma, alpha, lam, m, x, i, order):
  if i == len(lam) - 1:
    return m[i]  # noise level 0: e^-h is 0
  h = lam[i + 1] - lam[i]
  e = math.exp(-h) - 1
  x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * e * m[i]
  if order == 2:
    r = (lam[i - 1] - lam[i]) / h
    x = x - alpha[i + 1] * e * 0.5 * (m[i - 1] - m[i]) / r
  return x


def _correct(sigma, alpha, lam, m, last_x, i, order):
  h = lam[i] - lam[i - 1]
  e = math.exp(-h) - 1
  x = sigma[i] / sigma[i - 1] * last_x - alpha[i] * e * m[i - 1]
  if order == 1:
    return x - alpha[i] * e * 0.5 * (m[i] - m[i - 1])
  r = (lam[i - 2] - lam[i - 1]) / h
  g = e / -h - 1
  b = np.array([g / e, 2 * (g / -h - 0.5) / e])
  first, last = np.linalg.inv(np.array([[1, 1], [r, 1]])) @ b
  return x - alpha[i] * e * (first * (m[i - 2] - m[i - 1]) / r + last * (m[i] - m[i - 1]))
