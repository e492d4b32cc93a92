r"""Stage `vae` of the shapes world: the autoencoder, on clips that are drawn while it learns.

python -m hfjax.train --config=configs/tiny_vae.py --workdir=runs/tiny_vae
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import tiny_config


def get_config() -> ConfigDict:
  c = tiny_config()
  c.stage = "vae"
  c.vae.weights = "random:shapes"
  c.steps = 8000
  c.batch = 16
  c.data.path = "shapes"
  c.data.made = 100_000
  c.data.prefetch = 8
  c.autoencoder.kl = 2e-4
  c.optimizer.rate = 1e-3
  c.optimizer.schedule = "cosine"
  c.optimizer.warmup = 100
  c.ema.decay = 0.995
  c.ema.start = 500
  c.compute.remat = False
  c.checkpoint.every = 500
  c.validation.every = 1000
  return c
