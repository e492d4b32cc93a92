r"""Stage `ode` of the shapes world: a student of few steps begins, by regression on a causal
teacher's trajectories.

    python -m hfjax.train --config=configs/tiny_ode.py --workdir=runs/tiny_ode \
        --config.init=weights/causal --config.data.path=data/trajectories
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import tiny_config


def get_config() -> ConfigDict:
  c = tiny_config()
  c.stage = "ode"
  c.init = "weights/causal"
  c.text.weights = "weights/causal"
  c.steps = 5000
  c.batch = 64
  c.ode.forcing = "teacher"  # a stream's past is clean; what has not learnt from such fades
  c.data.path = "data/trajectories"
  c.data.resident = True
  c.compute.remat = False
  c.compute.unroll = 6  # all of them
  c.optimizer.kind = "muon"
  c.optimizer.rate = 2e-3
  c.optimizer.adam_share = 0.3
  c.optimizer.schedule = "cosine"
  c.optimizer.warmup = 100
  c.ema.decay = 0.995
  c.ema.start = 200
  c.checkpoint.every = 500
  c.validation.every = 1000
  return c
