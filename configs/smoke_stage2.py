r"""Stage `hybrid` in small: linear memory, block-sparse attention, distribution matching, reflow.

    python -m hfjax.train --config=configs/smoke_stage2.py --workdir=runs/smoke_stage2 \
        --config.init=runs/smoke_stage1 --config.critic.weights=runs/smoke_flow \
        --config.teacher.weights=runs/smoke_flow

Without the last three options all networks are random. Takes about two minutes on a processor with
two cores and 2 GB of memory, most of them to compile.
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import small_config


def get_config() -> ConfigDict:
  c = small_config()
  c.stage = "hybrid"
  c.student.linear = True
  c.geometry.variant = "paper"
  c.geometry.window = 6
  c.geometry.sink = 1
  c.geometry.ratio = 0.5
  c.steps = 8
  c.optimizer.rate = 1e-4
  c.ema.decay = 0.9
  c.ema.start = 2
  c.checkpoint.every = 4
  c.validation.every = 8
  c.distill.reflow_weight = 0.05
  c.distill.reflow_steps = 4
  return c
