r"""Stage `dmd` of the shapes world: the student streams in four steps, with dense attention.

python -m hfjax.train --config=configs/tiny_stage1.py --workdir=runs/tiny_stage1 \
        --config.init=weights/tiny_ode
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import tiny_config


def get_config() -> ConfigDict:
  c = tiny_config()
  c.stage = "dmd"
  c.init = "weights/tiny_ode"
  for network in (c.critic, c.teacher, c.text):
    network.weights = "weights/tiny_teacher"
  c.steps = 1500
  c.batch = 64
  c.data.path = "shapes"
  c.data.made = 50_000
  c.data.prefetch = 4
  c.distill.generator_every = 5
  c.optimizer.rate = 5e-5
  c.optimizer.b1 = 0.0
  c.critic_optimizer.rate = 1e-4
  c.critic_optimizer.b1 = 0.0
  c.ema.decay = 0.98
  c.ema.start = 250
  c.checkpoint.every = 250
  c.validation.every = 500
  return c
