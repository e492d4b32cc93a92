"""What a run would take: everything is compiled, and nothing trained."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hfjax import parallel
from hfjax.distill.objectives import Distillation, Frozen
from hfjax.distill.supervised import FlowMatching, Regression
from hfjax.models import vae
from hfjax.training import flops
from hfjax.training.plan import Plan
from hfjax.training.stages import Fixed, Stage, batch_shapes


def dry_run(plan: Plan, say: Callable[[str], None]):
  """Compiles the updates, and tells parameters, memory of a device, and operations of a step."""
  c = plan.config
  teacher = decoder = None
  if plan.distills:
    assert plan.teacher is not None
    teacher = plan.shapes(plan.teacher, jnp.dtype(c.teacher.dtype))
  if (sizes := plan.vae) is not None and "autoencoder" not in plan.parts:
    tree = jax.eval_shape(lambda: vae.init_params(sizes, jax.random.key(0)))
    everywhere, dtype = parallel.replicated(plan.mesh), plan.stream.compute_dtype
    decoder = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=everywhere), tree
    )
  base = plan.shapes(plan.student) if plan.low is not None else None
  parts = {name: plan.part_shapes(name) for name in plan.parts}
  say(f"stage {plan.stage}, {plan.mesh.size} devices, {c.steps} steps of {c.batch} samples")
  networks = {f"{name} (trained)": part.params for name, part in parts.items()}
  networks |= {"student, below adapters": base, "teacher": teacher, "autoencoder": decoder}
  for name, tree in networks.items():
    if tree is not None:
      say(f"  {name}: {_count(tree):,} parameters")
  # As in training, so that a cache of compiled programs serves it.
  key = jax.eval_shape(lambda: jax.random.key(0)).update(sharding=parallel.replicated(plan.mesh))
  held = sum(_bytes(tree) for tree in (parts, base, teacher, decoder))
  say(f"  held on a device: {held / 1e9:.2f} GB")
  for name in parts:
    update = Stage.make(plan, name)
    other = {"student": "critic", "critic": "student"}.get(name)
    fixed = Fixed(base, parts[other].params if other in parts else None, Frozen(teacher, decoder))
    begin = time.perf_counter()
    compiled = update.lower(parts[name], fixed, batch_shapes(plan), key).compile()
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    if name == "autoencoder":  # of convolutions XLA's count is all there is
      work = f"{(compiled.cost_analysis() or {}).get('flops', 0) / 1e12:.3g} TFLOP as XLA counts"
    else:
      work = f"{operations(plan, name) / 1e12:.3g} TFLOP of the models"
    say(
      f"update of the {name}: {work}, "
      f"{needed / 1e9:.2f} GB on a device, {memory.temp_size_in_bytes / 1e9:.2f} of them while it "
      f"runs; compiled in {time.perf_counter() - begin:.0f} s"
    )
  if plan.distills:
    say(f"The student is updated every {c.distill.generator_every} steps.")
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  if limit:
    say(f"This device has {limit / 1e9:.1f} GB.")


def operations(plan: Plan, part: str) -> float:
  """Of an update, on average over what is drawn; of all samples together."""
  o, m, shape = plan.objective, plan.student, plan.latent_shape
  chunks = plan.config.ode.frames // plan.stream.geometry.chunk
  if isinstance(o, Distillation):
    count = flops.critic_step if part == "critic" else flops.generator_step
    cases = [
      count(o, length, step)
      for length in range(o.last, o.most + 1)
      for step in range(o.first_exit, len(o.stream.steps))
    ]
    followed = flops.follow(o.stream, chunks) if part == "student" and o.regression_weight else 0
    return plan.config.batch * (sum(cases) / len(cases) + followed)
  if isinstance(o, Regression) and o.forcing == "stream":
    return plan.config.batch * flops.follow(o.stream, chunks)
  tokens = math.prod(shape[:3]) // math.prod(m.patch)
  chunk = tokens // shape[0] * plan.stream.geometry.chunk
  causal = plan.causal
  keys = (tokens + chunk) / 2 if causal else tokens
  assert isinstance(o, (FlowMatching, Regression))
  clips = 2 if o.forcing == "teacher" else 1  # a clean one besides
  return 3.0 * plan.config.batch * clips * flops.forward(m, tokens, keys)


def _count(tree: Any) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
  """On one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
