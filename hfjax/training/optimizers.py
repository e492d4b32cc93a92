"""Optimizers by configuration: clipping, Adam with decoupled decay, schedules by name."""

import dataclasses
from collections.abc import Callable

import optax

# Learning rate at each update, from the highest rate, updates of warm-up and updates in all.
SCHEDULES: dict[str, Callable[[float, int, int], optax.Schedule]] = {
  "constant": lambda rate, warmup, steps: (
    optax.warmup_constant_schedule(0.0, rate, warmup) if warmup else optax.constant_schedule(rate)
  ),
  "cosine": lambda rate, warmup, steps: optax.warmup_cosine_decay_schedule(
    0.0 if warmup else rate, rate, warmup, max(steps, warmup + 1)
  ),
  "linear": lambda rate, warmup, steps: optax.join_schedules(
    [
      optax.linear_schedule(0.0 if warmup else rate, rate, warmup),
      optax.linear_schedule(rate, 0.0, max(steps - warmup, 1)),
    ],
    [warmup],
  ),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Adam with decoupled weight decay on all parameters.

  rate: learning rate, the highest of its schedule. schedule: a name in `SCHEDULES`. warmup: updates
  over which the rate rises from 0. b1, b2, eps: of Adam. decay: of weights, each update by this
  times the rate. clip: largest norm of all gradients together; 0 does not clip.

  Raises ValueError on values out of range.
  """

  rate: float
  schedule: str = "constant"
  warmup: int = 0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  decay: float = 0.01
  clip: float = 10.0

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(
        f"There is no schedule {self.schedule!r} of learning rates; choose one of "
        f"{', '.join(SCHEDULES)}."
      )
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"Adam's {name} is {getattr(self, name)}; it must lie in [0, 1).")
    if not self.eps > 0:
      raise ValueError(f"Adam's eps is {self.eps}; it must be above 0, such as 1e-8.")
    for name in ("rate", "warmup", "eps", "decay", "clip"):
      if not 0 <= getattr(self, name) < float("inf"):
        raise ValueError(f"The optimizer's {name} is {getattr(self, name)}; give at least 0.")

  def learning_rate(self, updates: int) -> optax.Schedule:
    """Rate by number of updates so far, for so many in all."""
    return SCHEDULES[self.schedule](self.rate, self.warmup, updates)

  def make(self, updates: int) -> optax.GradientTransformation:
    """The transformation of gradients, for so many updates in all."""
    rate = self.learning_rate(updates)
    clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
    adam = optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=self.decay)
    return optax.chain(clip, adam)
