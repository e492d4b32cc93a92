r"""Stage `vae` of the shapes world, continued on longer clips.

    python -m hfjax.train --config=configs/tiny_vae_long.py --workdir=runs/tiny_vae_long \
        --config.init=weights/vae

Its convolutions look back over about 30 latent frames. On shorter clips they learn the beginnings
of videos only, and colours drift in what follows.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  c = runpy.run_path(str(Path(__file__).with_name("tiny_vae.py")))["get_config"]()
  c.init = "weights/vae"
  c.seed = 1
  c.steps = 3500
  c.batch = 4
  c.autoencoder.frames = 129
  c.autoencoder.edges = 2.0
  c.optimizer.rate = 5e-4
  c.optimizer.warmup = 50
  c.ema.start = 300
  c.checkpoint.every = 1000
  c.validation.every = 1750
  return c
