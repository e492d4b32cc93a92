r"""Stage `dmd` in small: distribution matching under dense attention.

    python -m hfjax.train --config=configs/smoke_stage1.py --workdir=runs/smoke_stage1 \
        --config.init=runs/smoke_ode --config.critic.weights=runs/smoke_flow \
        --config.teacher.weights=runs/smoke_flow

Without the last three options all networks are random. Takes one to two minutes on a processor with
two cores and 2 GB of memory, most of them to compile.
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import small_config


def get_config() -> ConfigDict:
  c = small_config()
  c.stage = "dmd"
  c.steps = 8
  c.optimizer.rate = 1e-4
  c.ema.decay = 0.9
  c.ema.start = 2
  c.checkpoint.every = 4
  c.validation.every = 8
  return c
