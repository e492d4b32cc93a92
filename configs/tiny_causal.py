r"""Stage `flow` of the shapes world, causal: a teacher that streams, each chunk after a clean past.

python -m hfjax.train --config=configs/tiny_causal.py --workdir=runs/tiny_causal \
        --config.init=weights/teacher --config.data.path=data/clips
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import tiny_config


def get_config() -> ConfigDict:
  c = tiny_config()
  c.stage = "flow"
  c.init = "weights/teacher"
  c.flow.forcing = "teacher"
  c.steps = 10_000
  c.batch = 32
  c.data.path = "data/clips"
  c.data.resident = True
  c.compute.remat = False
  c.compute.unroll = 6  # all of them
  c.optimizer.kind = "muon"
  c.optimizer.rate = 2e-3
  c.optimizer.adam_share = 0.3
  c.optimizer.decay = 0.03
  c.optimizer.schedule = "cosine"
  c.optimizer.warmup = 100
  c.ema.decay = 0.998
  c.ema.start = 500
  c.checkpoint.every = 1000
  c.validation.every = 0
  return c
