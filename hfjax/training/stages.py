"""What a step of each stage does: which networks are updated, on which batches, in which order."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hfjax import parallel
from hfjax.distill.objectives import Distillation, FlowMatching, Frozen, Regression, Texts
from hfjax.training import lora
from hfjax.training.plan import Plan
from hfjax.training.update import Loss, Part, make_update

Batch = dict[str, Any]
# What data of a stage hold beside prompts.
ARRAYS = {"flow": "latents", "ode": "trajectory"}


class Fixed(NamedTuple):
  """Parameters that an update reads and does not change.

  base: the student's, where adapters are trained. other: what is trained of the other network.
  """

  base: Any
  other: Any
  frozen: Frozen


def loss_of(plan: Plan, part: str) -> Loss:
  """The loss of "student" or "critic", of what is trained of it."""
  o, low = plan.objective, plan.low

  def whole(trained, fixed: Fixed):
    """The student's parameters."""
    return trained if low is None else lora.merge(fixed.base, trained, low.alpha)

  if isinstance(o, Distillation) and part == "critic":
    return lambda trained, fixed, batch, key: o.critic_loss(
      trained, whole(fixed.other, fixed), fixed.frozen, batch["texts"], key
    )
  if isinstance(o, Distillation):
    return lambda trained, fixed, batch, key: o.generator_loss(
      whole(trained, fixed), fixed.other, fixed.frozen, batch["texts"], key
    )
  assert isinstance(o, (FlowMatching, Regression))
  name = ARRAYS[plan.stage]
  return lambda trained, fixed, batch, key: o.loss(
    whole(trained, fixed), batch[name], batch["texts"], key
  )


class Stage:
  """The networks under training, and the steps that change them.

  parts: by name. base: the student's parameters, where adapters are trained.
  """

  def __init__(self, plan: Plan, parts: dict[str, Part], base: Any, frozen: Frozen):
    self.plan, self.parts, self.base, self.frozen = plan, parts, base, frozen
    self.updates = {name: self.make(plan, name) for name in parts}
    # A key for each network and step; nothing of it needs to be saved.
    self._key = jax.jit(
      lambda step, number: jax.random.fold_in(
        jax.random.fold_in(jax.random.key(plan.config.seed), step), number
      ),
      out_shardings=parallel.replicated(plan.mesh),
    )

  @staticmethod
  def make(plan: Plan, part: str) -> Any:
    """The jitted update of a part; see `make_update`."""
    return make_update(
      loss_of(plan, part), plan.optimizer_of(part), plan.average_of(part), plan.mesh,
      plan.part_shapes(part),
    )  # fmt: skip

  def step(self, number: int, fetch: Callable[[], Batch]) -> dict[str, Mapping[str, Any]]:
    """Makes step `number`, counted from 0; figures by part, still on the device."""
    figures = {}
    for index, name in enumerate(self.parts):
      if name == "student" and number % self.every:
        continue
      update, key = self.updates[name], self._key(number, index)
      part, figures[name] = update(self.parts[name], self.fixed(name), fetch(), key)
      self.parts[name] = part
    return figures

  @property
  def every(self) -> int:
    """Steps from one update of the student to the next."""
    return self.plan.config.distill.generator_every if self.plan.distills else 1

  def fixed(self, name: str) -> Fixed:
    """What an update of a part reads."""
    other = {"student": "critic", "critic": "student"}[name]
    trained = self.parts[other].params if other in self.parts else None
    return Fixed(self.base, trained, self.frozen)

  def student(self, averaged: bool = False) -> Any:
    """The student's parameters, adapters merged."""
    part, low = self.parts["student"], self.plan.low
    trained = part.ema if averaged else part.params
    return trained if low is None else _merged(self.base, trained, low.alpha)


_merged = jax.jit(lora.merge, static_argnums=2)


def put(plan: Plan, arrays: Mapping[str, np.ndarray], context: Any, negative: Any) -> Batch:
  """A batch on the devices, `[k b ...]`, of what this process has of it `[n ...]`.

  context: `[n t w]`. negative: `[1 t w]`.
  """
  parts = plan.config.accumulate
  cut = lambda x: np.reshape(x, (parts, len(x) // parts, *np.shape(x)[1:]))
  placed = parallel.put_batch(
    plan.mesh, {name: cut(x) for name, x in {**arrays, "context": context}.items()}, axis=1
  )
  return {**placed, "texts": Texts(placed.pop("context"), negative)}


def put_negative(plan: Plan, negative: Any) -> Any:
  """The negative prompt's context for every part of a batch, `[k 1 t w]`."""
  x = np.broadcast_to(np.asarray(negative), (plan.config.accumulate, *negative.shape))
  return jax.device_put(x, parallel.replicated(plan.mesh))


def batch_shapes(plan: Plan) -> Batch:
  """Shapes of a batch, with shardings."""
  c, m = plan.config, plan.student
  each = c.batch // c.accumulate
  split = parallel.batched(plan.mesh, 1)

  def struct(*shape: int, sharding=split):
    return jax.ShapeDtypeStruct((c.accumulate, *shape), jnp.float32, sharding=sharding)

  texts = Texts(
    struct(each, m.text_len, m.text_dim),
    struct(1, m.text_len, m.text_dim, sharding=parallel.replicated(plan.mesh)),
  )
  if plan.distills:
    return {"texts": texts}
  states = (len(c.denoising.steps) + 1,) if plan.stage == "ode" else ()
  return {ARRAYS[plan.stage]: struct(each, *states, *plan.latent_shape), "texts": texts}
