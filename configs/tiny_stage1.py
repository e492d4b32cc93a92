r"""Stage `dmd` of the shapes world: the student streams in four steps, with dense attention.

python -m hfjax.train --config=configs/tiny_stage1.py --workdir=runs/tiny_stage1 \
        --config.init=weights/ode --config.data.path=data/trajectories
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
  c.data.path = "data/trajectories"
  c.data.resident = True
  c.distill.generator_every = 3
  c.distill.guidance = 1.0  # c + 1 (c - u)
  # Whether there is a thing shows in much noise, so that only the noisiest scores bring back what
  # the student has lost; and there guidance leads away from all clips. What is lost nevertheless,
  # regression keeps (benchmarks/shapes).
  c.distill.regression_weight = 2.0
  c.distill.times_shift = 5.0
  c.distill.highest = 1000.0
  c.distill.guided_below = 900.0
  c.distill.most = 7  # rollouts are the clips that the teacher knows
  # Scores differ by little, so that a critic that its own steps shake says nothing: at 2e-4 without
  # momentum it is up to 0.86 as far from the teacher as the teacher from true clips.
  for optimizer in (c.optimizer, c.critic_optimizer):
    optimizer.rate = 1e-5
  c.ema.decay = 0.98
  c.ema.start = 250
  c.checkpoint.every = 250
  c.validation.every = 500
  return c
