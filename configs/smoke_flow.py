"""Stage `flow` in small, on any machine: a bidirectional model learns drifting blobs of latents.

    python -m hfjax.train --config=configs/smoke_flow.py --workdir=runs/smoke_flow

Takes about a minute on a processor with two cores and 2 GB of memory, with nothing prepared. The
loss falls from 1.3 to 0.5; videos show coloured noise, as the autoencoder is random.
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import small_config


def get_config() -> ConfigDict:
  c = small_config()
  c.stage = "flow"
  c.steps = 60
  c.batch = 4
  c.flow.frames = 6
  c.flow.solver_steps = 8
  c.optimizer.rate = 2e-3
  c.optimizer.b1 = 0.9
  c.optimizer.warmup = 5
  c.optimizer.schedule = "cosine"
  c.optimizer.decay = 0.0
  c.ema.decay = 0.9
  c.ema.start = 10
  c.checkpoint.every = 20
  c.validation.every = 30
  return c
