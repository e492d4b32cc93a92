r"""Stage `hybrid` of the shapes world: linear memory and block-sparse attention, with reflow.

python -m hfjax.train --config=configs/tiny_stage2.py --workdir=runs/tiny_stage2 \
        --config.init=weights/tiny_stage1
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import tiny_config


def get_config() -> ConfigDict:
  c = tiny_config()
  c.stage = "hybrid"
  c.init = "weights/tiny_stage1"
  for network in (c.critic, c.teacher, c.text):
    network.weights = "weights/tiny_teacher"
  c.student.linear = True
  c.geometry.variant = "paper"
  c.geometry.window = 9
  c.geometry.sink = 3
  c.geometry.ratio = 0.25
  c.steps = 1500
  c.batch = 64
  c.data.path = "shapes"
  c.data.made = 50_000
  c.data.prefetch = 4
  c.distill.generator_every = 5
  c.distill.reflow_weight = 0.05
  c.distill.reflow_stop = 5
  c.optimizer.rate = 5e-5
  c.optimizer.b1 = 0.0
  c.critic_optimizer.rate = 1e-4
  c.critic_optimizer.b1 = 0.0
  c.ema.decay = 0.98
  c.ema.start = 250
  c.checkpoint.every = 250
  c.validation.every = 500
  return c
