"""Flow-matching noise schedule (spec section 6.1 to 6.3).

A latent at noise level sigma is `(1 - sigma) x0 + sigma noise`; the network predicts the flow
`noise - x0`. Time is measured in timesteps `tau = 1000 sigma`, descending.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

TRAIN_TIMESTEPS = 1000


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
  """Time shift `s u / (1 + (s - 1) u)`, in the dtype of `sigmas`."""
  s = sigmas.dtype.type(shift)
  one = sigmas.dtype.type(1)
  return s * sigmas / (one + (s - one) * sigmas)


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
  """Tables of `steps` noise levels, float32 on the host; every method works under jit.

  The published tables are single precision, and timesteps taken from them are compared for
  equality, so they are made with NumPy's float32 linspace: another one differs in the last bit.

  shift: time shift, positive; more than 1 spends more steps at high noise.
  steps: number of entries; the grid runs from 1 towards 0 and leaves out 0 itself.
  """

  shift: float = 5.0
  steps: int = TRAIN_TIMESTEPS

  def __post_init__(self):
    if not isinstance(self.shift, (int, float)) or not 0 < self.shift < math.inf:
      raise ValueError(f"The schedule's shift is {self.shift}; it must be positive (1 for none).")
    if not isinstance(self.steps, int) or self.steps < 1:
      raise ValueError(f"The schedule has {self.steps} steps; it needs at least one.")

  @functools.cached_property
  def sigmas(self) -> np.ndarray:
    """Noise levels, float32 `[steps]`, from 1 downwards."""
    u = np.linspace(1.0, 0.0, self.steps + 1, dtype=np.float32)[:-1]
    return shift_sigmas(u, self.shift)

  @functools.cached_property
  def timesteps(self) -> np.ndarray:
    """Timesteps, float32 `[steps]`: 1000 times the noise levels."""
    return self.sigmas * np.float32(TRAIN_TIMESTEPS)

  @functools.cached_property
  def training_weights(self) -> np.ndarray:
    """Loss weight of each table entry, float32 `[steps]`: a bell over timesteps, mean one."""
    n = self.steps
    bell = np.exp(-2.0 * ((self.timesteps.astype(np.float64) - n / 2) / n) ** 2)
    bell -= bell.min()
    total = bell.sum()
    return (bell * (n / total) if total else np.ones(n)).astype(np.float32)

  def index(self, t: Float[Array, "..."]) -> Int[Array, "..."]:
    """Index of the table entry nearest to `t`, the first of equals; int32."""
    distance = jnp.abs(jnp.asarray(self.timesteps) - jnp.asarray(t, jnp.float32)[..., None])
    return jnp.argmin(distance, axis=-1).astype(jnp.int32)

  def sigma(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """Noise level of the entry nearest to `t`; `t = 0` falls on the last entry, not on 0."""
    return jnp.asarray(self.sigmas)[self.index(t)]

  def training_weight(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """Loss weight of the entry nearest to `t`."""
    return jnp.asarray(self.training_weights)[self.index(t)]

  def add_noise(self, x0: Array, noise: Array, t: Array) -> Array:
    """Latent at time `t`: `(1 - sigma) x0 + sigma noise`, in the dtype of `noise`.

    `t` covers the leading axes of `x0`: `[b]` for one time a sample, `[b, f]` for one a frame.
    """
    return mix_noise(x0, noise, _trailing(self.sigma(t), x0))

  def x0_from_flow(self, flow: Array, x_t: Array, t: Array) -> Array:
    """Clean latent the flow points at: `x_t - sigma flow`, in the dtype of `flow`."""
    return remove_flow(x_t, flow, _trailing(self.sigma(t), x_t))

  def flow_from_x0(self, x0: Array, x_t: Array, t: Array) -> Array:
    """Flow that leads from `x0` to `x_t`: `(x_t - x0) / sigma`, in the dtype of `x0`."""
    sigma = _trailing(self.sigma(t), x_t)
    return ((_f32(x_t) - _f32(x0)) / sigma).astype(x0.dtype)

  def step(self, flow: Array, x_t: Array, t: Array, to_final: bool = False) -> Array:
    """Euler step to the next table entry, or to noise level 0 after the last or if `to_final`.

    Returns float32, as the published scheduler does.
    """
    index = self.index(t)
    following = jnp.asarray(np.append(self.sigmas[1:], np.float32(0)))[index]
    sigma_next = jnp.zeros_like(following) if to_final else following
    change = sigma_next - jnp.asarray(self.sigmas)[index]
    return _f32(x_t) + _f32(flow) * _trailing(change, x_t)

  def warp(self, steps: Sequence[float]) -> tuple[float, ...]:
    """Maps nominal steps (1000 first, 0 last) to timesteps of this schedule, each exact float32.

    Raises ValueError on a step outside the table.
    """
    table = np.append(self.timesteps, np.float32(0))
    for s in steps:
      if int(s) != s or not 0 <= s <= self.steps:
        raise ValueError(
          f"Denoising step {s} is no whole number from 0 to {self.steps}; warped steps index "
          f"the schedule's {self.steps} entries. Give whole numbers, or turn warping off."
        )
    return tuple(float(table[self.steps - int(s)]) for s in steps)


def mix_noise(x0: Array, noise: Array, sigma: Array) -> Array:
  """`(1 - sigma) x0 + sigma noise`, computed in float32, in the dtype of `noise`."""
  return ((1 - sigma) * _f32(x0) + sigma * _f32(noise)).astype(noise.dtype)


def remove_flow(x_t: Array, flow: Array, sigma: Array) -> Array:
  """`x_t - sigma flow`, computed in float32, in the dtype of `flow`."""
  return (_f32(x_t) - sigma * _f32(flow)).astype(flow.dtype)


def training_target(x0: Array, noise: Array) -> Array:
  """What the network learns to predict: the flow `noise - x0`."""
  return noise - x0


def _f32(x: Array) -> Array:
  return jnp.asarray(x).astype(jnp.float32)


def _trailing(x: Array, like: Array) -> Array:
  """Appends axes of length one so that `x` scales the leading axes of `like`."""
  if jnp.shape(x) != jnp.shape(like)[: jnp.ndim(x)]:
    raise ValueError(
      f"The times have shape {jnp.shape(x)} and the latents {jnp.shape(like)}; times are for the "
      "latents' leading axes."
    )
  return jnp.reshape(x, x.shape + (1,) * (jnp.ndim(like) - jnp.ndim(x)))


# Schedules are hashable and hold host tables only, so they may be static arguments of jit.
jax.tree_util.register_static(FlowSchedule)
