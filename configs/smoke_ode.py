r"""Stage `ode` in small: causal regression on a few trajectories, which are made at the beginning.

    python -m hfjax.train --config=configs/smoke_ode.py --workdir=runs/smoke_ode \
        --config.init=runs/smoke_flow --config.teacher.weights=runs/smoke_flow

Without the last two options student and teacher are random. Takes about a minute on a processor
with two cores and 2 GB of memory.
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import small_config


def get_config() -> ConfigDict:
  c = small_config()
  c.stage = "ode"
  c.steps = 20
  c.ode.frames = 6
  c.data.made = 8
  c.data.teacher_steps = 8
  c.optimizer.rate = 1e-3
  c.ema.decay = 0.0
  c.checkpoint.every = 10
  c.validation.every = 20
  return c
