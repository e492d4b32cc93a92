r"""Stage `dmd` in small: distribution matching under dense attention.

    python -m hfjax.train --config=configs/smoke_stage1.py --workdir=runs/smoke_stage1 \
        --config.init=runs/smoke_ode --config.critic.weights=runs/smoke_flow \
        --config.teacher.weights=runs/smoke_flow

Without the last three options all networks are random. Takes one to two minutes on a processor with
two cores and 2 GB of memory, most of them to compile.
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import default_config


def get_config() -> ConfigDict:
  c = default_config()
  c.stage = "dmd"
  c.student.weights = "random:tiny"
  c.critic.weights = "random:tiny"
  c.teacher.weights = "random:tiny"
  c.text.weights = "random:tiny"
  c.vae.weights = "random:tiny"
  c.data.path = "made"
  c.geometry.height = 4
  c.geometry.width = 6
  c.geometry.block = 4
  c.compute.dtype = "float32"
  c.batch = 2
  c.validation.frames = 7
  c.steps = 8
  c.denoising.steps = (1000.0, 500.0)
  c.distill.last = 2
  c.distill.most = 4
  c.distill.generator_every = 2
  c.optimizer.rate = 1e-4
  c.critic_optimizer.rate = 1e-4
  c.ema.decay = 0.9
  c.ema.start = 2
  c.checkpoint.every = 4
  c.validation.every = 8
  return c
