"""Optimizers by configuration: clipping, Adam or Muon with decoupled decay, schedules by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

KINDS = ("adam", "muon")
_MOMENTUM, _RMS = 0.95, 0.2  # of Muon; so large are Adam's updates, and its rates serve both
# Axes of the matrices in a stack of blocks, what they take and what they give, by the layer's name;
# the first axis counts blocks, and what is left counts matrices side by side.
_AXES: dict[str, Any] = {
  "qkv": (1, (3, 4)),
  "kv": (1, (3, 4)),
  "q": (1, (2, 3)),
  "attn/out": ((1, 2), 3),
  "ffn_in": (1, 2),
  "ffn_out": (1, 2),
  "ffn/in": (1, 3),
  "ffn/out": (1, 2),
  "linear_proj": (1, 2),
}

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
  """Adam or Muon, with decoupled weight decay on all parameters.

  rate: learning rate, the highest of its schedule. schedule: a name in `SCHEDULES`. warmup: updates
  over which the rate rises from 0. b1, b2: of Adam. eps: of both. decay: of weights, each update by
  this times the rate that moves them. clip: largest norm of all gradients together; 0 does not
  clip. kind: "muon" moves matrices in blocks of transformers along orthogonalised momentum, as far
  as Adam would (arXiv 2502.16982, section 2.2), and all else by Adam with Nesterov's momentum, at
  `adam_share` times the rate, which means nothing to "adam".

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
  kind: str = "adam"
  adam_share: float = 1.0

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(
        f"There is no schedule {self.schedule!r} of learning rates; choose one of "
        f"{', '.join(SCHEDULES)}."
      )
    if self.kind not in KINDS:
      raise ValueError(f"There is no optimizer {self.kind!r}; choose one of {', '.join(KINDS)}.")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"Adam's {name} is {getattr(self, name)}; it must lie in [0, 1).")
    if not self.eps > 0:
      raise ValueError(f"Adam's eps is {self.eps}; it must be above 0, such as 1e-8.")
    for name in ("rate", "warmup", "eps", "decay", "clip", "adam_share"):
      if not 0 <= getattr(self, name) < float("inf"):
        raise ValueError(f"The optimizer's {name} is {getattr(self, name)}; give at least 0.")

  def learning_rate(self, updates: int) -> optax.Schedule:
    """Rate by number of updates so far, for so many in all."""
    return SCHEDULES[self.schedule](self.rate, self.warmup, updates)

  def make(self, updates: int) -> optax.GradientTransformation:
    """The transformation of gradients, for so many updates in all."""
    rate = self.learning_rate(updates)
    clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
    if self.kind == "adam":
      return optax.chain(
        clip, optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=self.decay)
      )
    return optax.chain(
      clip,
      muon(
        rate, beta=_MOMENTUM, eps=self.eps, weight_decay=self.decay, adam_b1=self.b1,
        adam_b2=self.b2, adam_weight_decay=self.decay, consistent_rms=_RMS,
        adam_learning_rate=lambda n: self.adam_share * rate(n),
        muon_weight_dimension_numbers=matrices,
      ),
    )  # fmt: skip


def matrices(params: Any) -> Any:
  """Axes of parameters that are those of a transformer's matrices; None for what Adam moves."""

  def axes(path, _) -> MuonDimensionNumbers | None:
    words = [key.key for key in path]
    if "blocks" not in words or words[-1] != "kernel":
      return None
    name = next((k for k in _AXES if "/".join(words[:-1]).endswith(k)), None)
    return None if name is None else MuonDimensionNumbers(*_AXES[name])

  return jax.tree_util.tree_map_with_path(axes, params)
