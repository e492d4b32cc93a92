r"""Stage `hybrid`: from stage 1, linear memory and block-sparse attention, with reflow (stage 2).

    python -m hfjax.train --config=configs/stage2.py --workdir=runs/stage2 \
        --config.init=runs/stage1 --config.data.path=prompts.txt --config.text.device=cpu

Student and critic are Wan 2.1 1.3B, the teacher is the 14B. On one H200 as stage 1. A quarter of
the student's steps takes 25 steps of the teacher, most of the time of all training;
distill.reflow_stop=5 shortens that. Published: 300 to 1000 steps on 64 GPUs.
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import default_config


def get_config() -> ConfigDict:
  c = default_config()
  c.stage = "hybrid"
  c.steps = 300
  c.seed = 42
  c.data.path = "data/prompts"
  c.student.linear = True
  c.geometry.variant = "paper"
  c.geometry.window = 9
  c.geometry.sink = 3
  c.geometry.ratio = 0.2
  c.distill.reflow_weight = 0.05
  c.critic_optimizer.rate = 2e-7
  return c
