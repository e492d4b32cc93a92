"""Multistep solvers for undistilled flow models (spec section 6.4).

Both solvers are linear in the latents and in the predicted clean latents, and their grids are
known beforehand. So all coefficients are computed on the host in float64, and a step is a few
scaled sums, usable under `lax.scan` with a traced step index.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hfjax.diffusion.schedule import TRAIN_TIMESTEPS, shift_sigmas

KINDS = ("unipc", "dpm++")


class SolverState(NamedTuple):
  """What a multistep solver remembers between steps; every array has the latent's shape."""

  x: Float[Array, "..."]  # latent at the current step
  x_last: Float[Array, "..."]  # (corrected) latent of the previous step
  m_last: Float[Array, "..."]  # clean latent predicted at the previous step
  m_before: Float[Array, "..."]  # clean latent predicted two steps ago


@dataclasses.dataclass(frozen=True)
class MultistepSolver:
  """UniPC (order 2, bh2, predictor and corrector) or DPM-Solver++ (2M, midpoint).

  kind: "unipc" or "dpm++".
  steps: model evaluations.
  shift: time shift of the noise levels.

  Use: `state = solver.init(noise)`; for i in range(steps): evaluate the flow of `state.x` at
  `solver.timesteps[i]`; `state = solver.step(state, flow, i)`. The result is `state.x`.
  """

  kind: str = "unipc"
  steps: int = 50
  shift: float = 5.0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"Unknown solver {self.kind!r}; choose one of {', '.join(KINDS)}.")
    if not isinstance(self.steps, int) or self.steps < 1:
      raise ValueError(f"A solver of {self.steps} steps was asked for; it needs at least one.")
    if not isinstance(self.shift, (int, float)) or not 0 < self.shift < math.inf:
      raise ValueError(f"The solver's shift is {self.shift}; it must be positive (1 for none).")

  @functools.cached_property
  def sigmas(self) -> np.ndarray:
    """Noise levels before each step and after the last, float64 `[steps + 1]`, ending in 0."""
    # UniPC starts at the largest noise level below one of a single-precision table of 1000.
    start = float(np.float32(1 - 1 / TRAIN_TIMESTEPS)) if self.kind == "unipc" else 1.0
    grid = np.linspace(start, 0.0, self.steps + 1)[:-1]
    return np.append(shift_sigmas(grid, self.shift), 0.0)

  @functools.cached_property
  def timesteps(self) -> np.ndarray:
    """What the network is told at each step, int32 `[steps]`: 1000 sigma, truncated."""
    return (self.sigmas[:-1] * TRAIN_TIMESTEPS).astype(np.int32)

  @functools.cached_property
  def _coefficients(self) -> np.ndarray:
    """float32 `[steps, 8]`: corrector weights of (x, x_last, m, m_last, m_before), then
    predictor weights of (x, m, m_last).
    """
    table = np.zeros((self.steps, 8))
    make = _unipc_row if self.kind == "unipc" else _dpm_row
    for i in range(self.steps):
      table[i] = make(self.sigmas, i, self.steps)
    return table.astype(np.float32)

  def init(self, noise: Array) -> SolverState:
    """State before the first step; float32."""
    x = jnp.asarray(noise, jnp.float32)
    zero = jnp.zeros_like(x)
    return SolverState(x, zero, zero, zero)

  def step(self, state: SolverState, flow: Array, i: Int[Array, ""] | int) -> SolverState:
    """Advances by one step, given the flow predicted for `state.x` at `timesteps[i]`."""
    if flow.shape != state.x.shape:
      raise ValueError(
        f"The flow has shape {flow.shape} and the latents {state.x.shape}; they must be equal."
      )
    c = jnp.asarray(self._coefficients)[i]
    sigma = jnp.asarray(self.sigmas.astype(np.float32))[i]
    m = state.x - sigma * flow.astype(jnp.float32)
    x = (
      c[0] * state.x + c[1] * state.x_last + c[2] * m + c[3] * state.m_last + c[4] * state.m_before
    )
    x_next = c[5] * x + c[6] * m + c[7] * state.m_last
    return SolverState(x_next, x, m, state.m_last)


def _log_snr(sigma: float) -> float:
  """Lambda = ln(1 - sigma) - ln(sigma); infinite at both ends."""
  with np.errstate(divide="ignore"):
    return float(np.log1p(-sigma) - np.log(sigma))


def _first_order(sigmas: np.ndarray, i: int) -> tuple[float, float, float]:
  """(weight of x, weight of m, alpha' (1 - e^-h)) of the first-order step from i to i + 1."""
  s, s_next = sigmas[i], sigmas[i + 1]
  # e^-h is written without logarithms: it is 0 at both ends of the grid.
  decay = (1 - s) / s * (s_next / (1 - s_next))
  gain = (1 - s_next) * (1 - decay)
  return s_next / s, gain, gain


def _ratio(sigmas: np.ndarray, i: int, h: float) -> float:
  """Previous step's share of the log-SNR: (lambda_i - lambda_{i-1}) / h."""
  return (_log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])) / h


def _dpm_row(sigmas: np.ndarray, i: int, steps: int) -> list[float]:
  x, m, gain = _first_order(sigmas, i)
  m_last = 0.0
  if 0 < i < steps - 1:
    h = _log_snr(sigmas[i + 1]) - _log_snr(sigmas[i])
    half = 0.5 * gain / _ratio(sigmas, i, h)
    m, m_last = m + half, -half
  return [1, 0, 0, 0, 0, x, m, m_last]


def _unipc_row(sigmas: np.ndarray, i: int, steps: int) -> list[float]:
  def order(j: int) -> int:
    return min(2, steps - j, j + 1)

  corrector = [1.0, 0.0, 0.0, 0.0, 0.0]
  if i > 0:
    h = _log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])
    x_last, m_last, gain = _first_order(sigmas, i - 1)
    m = m_before = 0.0
    if order(i - 1) == 1:
      rho, rho_last = 0.0, 0.5
      r = 1.0
    else:
      # Ratio of lambda_{i-2} seen from lambda_{i-1}, negative.
      r = -_ratio(sigmas, i - 1, h)
      e = np.expm1(-h)
      g1 = e / -h - 1
      rho, rho_last = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [g1 / e, 2 * (g1 / -h - 0.5) / e])
    # gain ( rho (m_before - m_last) / r + rho_last (m - m_last) ), added to the first order.
    m_before += gain * rho / r
    m += gain * rho_last
    m_last -= gain * (rho / r + rho_last)
    corrector = [0.0, x_last, m, m_last, m_before]

  x, m, gain = _first_order(sigmas, i)
  m_last = 0.0
  if order(i) == 2:
    h = _log_snr(sigmas[i + 1]) - _log_snr(sigmas[i])
    half = -0.5 * gain / _ratio(sigmas, i, h)
    # gain * half-slope (m_last - m) / r with r = -ratio.
    m, m_last = m - half, half
  return [*corrector, x, m, m_last]


jax.tree_util.register_static(MultistepSolver)
