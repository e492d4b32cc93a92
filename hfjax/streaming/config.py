"""What a stream is configured by: network, geometry and denoising steps."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from hfjax.diffusion import guidance as guiding
from hfjax.diffusion.schedule import TRAIN_TIMESTEPS, FlowSchedule
from hfjax.diffusion.solvers import MultistepSolver
from hfjax.models import checks
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig


@dataclasses.dataclass(frozen=True)
class StreamConfig:
  """Static description of a stream; hashable, so that it may be a static argument of jit.

  steps: denoising steps, 1000 first; with `warp` they index the schedule (spec section 6.2), else
    they are timesteps as they stand.
  shift: time shift of the schedule.
  solver: of undistilled models; each chunk is then solved by it from noise, at its own noise
    levels, and `steps`, `warp` and `shift` do not matter.
  guidance: scale of classifier-free guidance; 1 for none. Otherwise a sample has two texts, and
    the state twice the rows: those under the prompts, and behind them those under the negative
    prompts.
  guidance_interval: times from and up to which, both included, there is guidance. Elsewhere the
    flow is that under the prompt; both texts are worked on there too.
  context_timestep: time at which clean latents are committed.
  dtype: compute dtype, "float32" or "bfloat16"; parameters stay as they are.
  remat: recompute blocks in backward passes.
  backend: of block-sparse attention, a name in `pallas_kernels.BACKENDS`; "auto" takes the fastest.

  Raises ValueError on combinations that cannot work.
  """

  model: WanConfig
  geometry: Geometry
  steps: tuple[float, ...] = (1000, 750, 500, 250)
  warp: bool = True
  shift: float = 5.0
  solver: MultistepSolver | None = None
  guidance: float = 1.0
  guidance_interval: guiding.Interval = guiding.ALWAYS
  context_timestep: float = 0.0
  dtype: str = "float32"
  remat: bool = False
  backend: str = "auto"

  def __post_init__(self):
    if not isinstance(self.model, WanConfig) or not isinstance(self.geometry, Geometry):
      raise ValueError(
        f"A stream needs a WanConfig and a Geometry, and got {type(self.model).__name__} and "
        f"{type(self.geometry).__name__}."
      )
    if self.model.patch != self.geometry.patch:
      raise ValueError(
        f"The model's patch is {self.model.patch} and the geometry's "
        f"{self.geometry.patch}; make them equal."
      )
    if self.model.in_dim != self.model.out_dim or self.model.image_dim:
      raise ValueError(
        f"The model takes {self.model.in_dim} channels and image embeddings of width "
        f"{self.model.image_dim}, and gives {self.model.out_dim} channels; a stream feeds latents "
        "back, so use a text-to-video model and commit images as first frames."
      )
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(f"The compute dtype is {self.dtype!r}; choose float32 or bfloat16.")
    if self.backend not in ("auto", *pallas_kernels.BACKENDS):
      raise ValueError(
        f"The attention backend is {self.backend!r}; choose auto or one of "
        f"{', '.join(pallas_kernels.BACKENDS)}."
      )
    if self.solver is not None and not isinstance(self.solver, MultistepSolver):
      raise ValueError(
        f"The solver is a {type(self.solver).__name__}; give a MultistepSolver, or None for a "
        "model of few steps."
      )
    guiding.count_texts(self.guidance)  # checks the scale
    interval = guiding.as_interval(self.guidance_interval)
    object.__setattr__(self, "guidance_interval", interval)
    checks.check_number("context_timestep", self.context_timestep, 0, TRAIN_TIMESTEPS)
    if not isinstance(self.steps, Iterable):
      raise ValueError(f"The denoising steps are {self.steps!r}; give a list, such as (1000, 500).")
    object.__setattr__(self, "steps", tuple(self.steps))
    for step in self.steps:
      checks.check_number("A denoising step", step, 0, TRAIN_TIMESTEPS)
    if not self.steps:
      raise ValueError("The list of denoising steps is empty; give at least one, such as 1000.")
    times = self.timesteps  # checks warped steps
    if any(not 0 < t <= TRAIN_TIMESTEPS for t in times):
      raise ValueError(
        f"The denoising steps {list(self.steps)} give the timesteps {list(times)}, "
        f"which must lie in (0, {TRAIN_TIMESTEPS}]."
      )
    if any(a <= b for a, b in itertools.pairwise(times)):
      raise ValueError(
        f"The denoising steps {list(self.steps)} do not descend; order them from noisy to clean."
      )
    if self.has_memory:
      self.geometry.check_memory()

  @property
  def has_memory(self) -> bool:
    """Whether frames that leave the window are kept in a linear memory."""
    return self.model.linear and not self.geometry.semantics.dense

  @property
  def texts(self) -> int:
    """Texts of each sample, and rows of the state: 2 with guidance, else 1."""
    return guiding.count_texts(self.guidance)

  @property
  def returns(self) -> int:
    """How often a chunk returns to noise while it is denoised; a solver never does."""
    return 0 if self.solver is not None else len(self.steps) - 1

  @property
  def compute_dtype(self):
    """The compute dtype as a JAX type."""
    return jnp.dtype(self.dtype)

  @functools.cached_property
  def schedule(self) -> FlowSchedule:
    """The flow-matching schedule."""
    return FlowSchedule(self.shift)

  @functools.cached_property
  def timesteps(self) -> tuple[float, ...]:
    """Timesteps of the denoising steps, each an exact float32."""
    if self.warp:
      return self.schedule.warp(self.steps)
    return tuple(float(np.float32(t)) for t in self.steps)

  @functools.cached_property
  def sigmas(self) -> tuple[float, ...]:
    """Noise level of each denoising step, and 0 behind the last."""
    table = self.schedule
    index = [int(np.argmin(np.abs(table.timesteps - np.float32(t)))) for t in self.timesteps]
    return (*(float(table.sigmas[i]) for i in index), 0.0)


jax.tree_util.register_static(StreamConfig)
