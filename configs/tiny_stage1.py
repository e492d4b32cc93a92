r"""Stage `dmd` of the shapes world: the student streams in four steps, with dense attention.

python -m hfjax.train --config=configs/tiny_stage1.py --workdir=runs/tiny_stage1 \
        --config.init=weights/ode
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import tiny_config


def get_config() -> ConfigDict:
  c = tiny_config()
  c.stage = "dmd"
  c.init = "weights/ode"
  for network in (c.critic, c.teacher, c.text, c.vae):
    network.weights = "weights/teacher"
  c.steps = 1500
  c.batch = 64
  c.data.path = "shapes"
  c.data.made = 20_000
  c.data.resident = True
  c.distill.generator_every = 2
  c.distill.guidance = 2.0  # c + 2 (c - u), by which the teacher is sampled too
  # Whether there is a thing shows in much noise, so that only the noisiest scores bring back what
  # the student has lost; and there guidance leads away from all clips (benchmarks/shapes).
  c.distill.times_shift = 10.0
  c.distill.highest = 1000.0
  c.distill.guided_below = 900.0
  c.distill.most = 7  # rollouts are the clips that the teacher knows
  for optimizer, rate in ((c.optimizer, 5e-5), (c.critic_optimizer, 2e-4)):
    optimizer.rate = rate
    optimizer.b1 = 0.0
  c.ema.decay = 0.98
  c.ema.start = 250
  c.checkpoint.every = 250
  c.validation.every = 500
  return c
