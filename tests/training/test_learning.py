"""Each stage of training brings samples closer to true ones, from clips to a hybrid student.

`make test-slow ARGS='-k learning -s'` prints the distances; benchmarks/learning.md keeps them.
"""

import jax
import pytest

from hfjax.distill.objectives import Distillation
from hfjax.models import wan
from tests.training.mixtures import (
  FRAMES,
  HYBRID_MODEL,
  MODEL,
  PROMPTS,
  draw,
  judge,
  sample_stream,
  sample_teacher,
  stream,
  train_distillation,
  train_regression,
  train_teacher,
  with_memory,
)

DENSE = stream(MODEL, window=21, sink=0, ratio=1, variant="reference_dense")
# Half of the blocks of a window of 6 frames, which slides from the fourth chunk on.
HYBRID = stream(HYBRID_MODEL, window=6, sink=2, ratio=0.5, rope_cap=8)
LONG = 2 * FRAMES

# The chance of patterns is no target of guidance, so scores are those of the data.
PLAIN = {"vae": None, "last": 3, "guidance": 0.0, "remat": False}
DMD = Distillation(DENSE, MODEL, MODEL, most=6, **PLAIN)
DMD_AND_REFLOW = Distillation(
  HYBRID, MODEL, MODEL, most=6, reflow_weight=0.05, reflow_steps=8, reflow_guidance=1.0, **PLAIN
)


def measure(config, params):
  """Distances of clips as long as those of training, and of longer ones."""
  return tuple(judge(sample_stream(config, params, frames)) for frames in (FRAMES, LONG))


def stages(seed: int):
  """Distances by stage: before and after it, each for short and long clips."""
  table = {
    "two true draws": [tuple(judge(draw(jax.random.key(5), PROMPTS, f)) for f in (FRAMES, LONG))]
  }
  fresh = wan.init_params(MODEL, jax.random.key(seed))
  teacher = train_teacher(seed, 1500)
  table["teacher"] = [(judge(sample_teacher(x)),) for x in (fresh, teacher)]
  first = train_regression(DENSE, teacher, teacher, seed, 300)
  table["regression"] = [measure(DENSE, x) for x in (teacher, first)]
  dense, critic = train_distillation(DMD, first, teacher, teacher, seed, 400)
  table["DMD"] = [table["regression"][1], measure(DENSE, dense)]
  start = with_memory(dense, seed)
  hybrid, _ = train_distillation(DMD_AND_REFLOW, start, critic, teacher, seed, 300)
  table["hybrid"] = [measure(HYBRID, x) for x in (start, hybrid)]
  return table


# Bounds of each stage for short and long clips, a fifth above the worst of three seeds.
# Distribution matching ends at 0.31 for long clips if no noise is put back between steps (quirk 5),
# at 0.39 without gradients, and far above without a trained critic or with its sign turned.
BOUNDS = {
  "teacher": (0.13,),
  "regression": (0.31, 0.50),
  "DMD": (0.27, 0.28),
  "hybrid": (0.34, 0.33),
}


def show(table):
  for name, rows in table.items():
    print(f"  {name:16}", *("  ".join(f"{x:.3f}" for x in row) for row in rows), sep="  |  ")


@pytest.mark.slow
def test_each_stage_brings_samples_closer_to_true_ones():
  table = stages(0)
  print("\ndistance from true clips: before | after a stage, of short and long clips")
  show(table)
  for name, bounds in BOUNDS.items():
    before, after = table[name]
    assert all(x < bound for x, bound in zip(after, bounds, strict=True)), (name, after)
    # Long clips show best what a stage is for: errors add up over a stream.
    assert after[-1] < 0.85 * before[-1], (name, before, after)
