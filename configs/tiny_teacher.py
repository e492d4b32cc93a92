r"""Stage `flow` of the shapes world: the bidirectional teacher and its text encoder, on clips of
five seconds.

    python -m hfjax.train --config=configs/tiny_teacher.py --workdir=runs/tiny_teacher \
        --config.init=weights/teacher_short --config.text.weights=weights/teacher_short \
        --config.data.path=data/clips
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import tiny_config


def get_config() -> ConfigDict:
  c = tiny_config()
  c.stage = "flow"
  c.init = "weights/teacher_short"
  c.text.weights = "weights/teacher_short"
  c.flow.train_text_encoder = True
  c.flow.shift = 5.0  # many frames leave only the noisiest times to the words
  c.steps = 20_000
  c.batch = 96
  c.data.path = "data/clips"
  c.data.resident = True
  c.compute.remat = False
  c.compute.unroll = 6  # all of them
  c.optimizer.kind = "muon"
  c.optimizer.rate = 4e-3
  c.optimizer.adam_share = 0.3
  c.optimizer.decay = 0.03
  c.optimizer.schedule = "cosine"
  c.optimizer.warmup = 100
  c.ema.decay = 0.999
  c.ema.start = 500
  c.checkpoint.every = 1000
  c.validation.every = 0
  return c
