"""All that can be configured of training, with its default; config files change what they need."""

from ml_collections import ConfigDict

from hfjax.streaming.stream import NEGATIVE

STAGES = ("vae", "flow", "ode", "dmd", "hybrid")


def default_config() -> ConfigDict:
  """The defaults: sizes and rates of Hybrid Forcing (spec section 8.1), one sample at a time.

  Weights are a folder of `tools/convert_checkpoint.py`, a file or repository that it takes, a run
  of training, or `random:NAME` with the name of an architecture.
  """
  c = ConfigDict()
  c.stage = "dmd"  # one of STAGES
  c.steps = 1000  # of training; each updates what the stage trains
  c.seed = 0
  c.batch = 1  # samples of an update, on all devices together
  c.accumulate = 1  # parts that a batch is worked on in, one after the other
  c.init = ""  # a run or weights that the student begins with, instead of student.weights
  c.init_ema = False  # of a run, take moving averages
  c.most_skipped = 10  # updates in a row without finite numbers, after which training stops

  c.student = ConfigDict()
  c.student.weights = "weights/wan-1.3b"
  c.student.linear = False  # with the layer that reads the linear memory, zero if weights lack it
  c.critic = ConfigDict()
  c.critic.weights = "weights/wan-1.3b"
  c.teacher = ConfigDict()
  c.teacher.weights = "weights/wan-14b"
  c.teacher.dtype = "bfloat16"
  c.text = ConfigDict()
  c.text.weights = "weights/wan-1.3b"
  c.text.negative = NEGATIVE
  c.text.device = "default"  # or cpu: encodes there, which saves memory and takes time
  c.text.tokenizer = ""  # folder of the tokenizer, for a random text encoder that is trained
  c.vae = ConfigDict()
  c.vae.weights = "weights/wan-1.3b"  # or none: no videos, and first latents are not encoded anew

  c.geometry = ConfigDict()  # of the student, in latent frames; see models.geometry
  c.geometry.height = 60
  c.geometry.width = 104
  c.geometry.chunk = 3
  c.geometry.window = 21
  c.geometry.sink = 1
  c.geometry.ratio = 1.0
  c.geometry.rope_cap = 21
  c.geometry.block = 64
  c.geometry.variant = "reference_dense"

  c.denoising = ConfigDict()  # of the student; see streaming.config
  c.denoising.steps = (1000.0, 750.0, 500.0, 250.0)
  c.denoising.warp = True
  c.denoising.shift = 5.0
  c.denoising.context_timestep = 0.0

  c.autoencoder = ConfigDict()  # of the stage vae; see distill.reconstruction.Reconstruction
  c.autoencoder.frames = 17
  c.autoencoder.kl = 1e-4
  c.autoencoder.square = 1.0
  c.autoencoder.edges = 1.0
  c.autoencoder.decoder_only = False

  c.distill = ConfigDict()  # see distill.objectives.Distillation
  c.distill.generator_every = 5  # steps from one update of the student to the next
  c.distill.last = 7
  c.distill.most = 18
  c.distill.first_exit = 0  # the denoising step
  c.distill.guidance = 3.0
  c.distill.guidance_form = "conditional"
  c.distill.critic_guidance = 0.0
  c.distill.guided_below = 1000.0
  c.distill.lowest = 20.0
  c.distill.highest = 980.0
  c.distill.times_shift = 0.0  # 0 for the student's
  c.distill.regression_weight = 0.0  # on trajectories, which data.path then holds, with prompts
  c.distill.reflow_weight = 0.0
  c.distill.reflow_steps = 25
  c.distill.reflow_stop = 0  # 0 for all steps
  c.distill.reflow_guidance = 3.5
  c.distill.reflow_always = False
  c.distill.decoded = 0  # chunks; 0 for all
  c.distill.renoise_first = True
  c.distill.noisy_context = False
  c.distill.score_shift = 0.0  # 0 for the student's

  c.flow = ConfigDict()  # see distill.supervised.FlowMatching
  c.flow.frames = 21
  c.flow.shift = 5.0
  c.flow.weighted = True
  c.flow.drop_text = 0.1
  c.flow.train_text_encoder = False  # together with the transformer
  c.flow.forcing = "none"
  c.flow.context_noise = 0.0
  c.flow.guidance = 5.0  # of validation videos, as the next two
  c.flow.guidance_interval = (0.0, 1000.0)
  c.flow.solver_steps = 50

  # See distill.supervised.Regression; beside distribution matching, of frames alone.
  c.ode = ConfigDict()
  c.ode.frames = 21
  c.ode.first_clean = False
  c.ode.forcing = "none"

  c.optimizer = _optimizer(1.5e-6)
  c.critic_optimizer = _optimizer(4e-7)
  c.ema = ConfigDict()
  c.ema.decay = 0.99  # 0 for no average
  c.ema.start = 200  # step
  c.lora = ConfigDict()  # see training.lora
  c.lora.rank = 0  # 0 trains all weights
  c.lora.alpha = 0.0  # 0 for the rank
  c.lora.targets = ("all",)

  c.data = ConfigDict()
  # A folder of the stage's tool (or, of prompts, a file); or made: made on the spot, to try; or
  # shapes: clips or captions of the shapes world.
  c.data.path = "data"
  c.data.on_bad = "skip"  # or fail
  c.data.prefetch = 2
  c.data.resident = False  # whether all arrays, or contexts of all prompts, are kept on the device
  c.data.made = 64  # examples, where they are made, or of the shapes world
  c.data.teacher_steps = 48  # of trajectories, where they are made

  c.compute = ConfigDict()
  c.compute.dtype = "bfloat16"
  c.compute.remat = True
  c.compute.unroll = 1  # blocks in a step of the loop over them, where whole clips are seen
  c.compute.fsdp = -1  # devices that share a set of parameters; -1 for all
  c.compute.backend = "auto"  # of block-sparse attention

  c.checkpoint = ConfigDict()
  c.checkpoint.every = 100  # steps
  c.checkpoint.keep = 2
  c.log = ConfigDict()
  c.log.every = 1  # steps
  c.log.tensorboard = True
  c.log.wandb = ""  # name of a project
  c.validation = ConfigDict()
  c.validation.every = 200  # steps; 0 for never
  c.validation.prompts = (
    "a red fox runs through fresh snow, side view",
    "waves roll onto a black beach at sunset",
  )
  c.validation.frames = 21  # latent ones
  c.validation.seed = 0
  c.validation.fps = 16
  return c


def small_config() -> ConfigDict:
  """The defaults with tiny random networks, rollouts and latents, and data made on the spot."""
  c = default_config()
  for network in (c.student, c.critic, c.teacher, c.text, c.vae):
    network.weights = "random:tiny"
  c.data.path = "made"
  c.geometry.height = 4
  c.geometry.width = 6
  c.geometry.block = 4
  c.compute.dtype = "float32"
  c.batch = 2
  c.validation.frames = 7
  c.denoising.steps = (1000.0, 500.0)
  c.distill.last = 2
  c.distill.most = 4
  c.distill.generator_every = 2
  c.critic_optimizer.rate = 1e-4
  return c


def tiny_config() -> ConfigDict:
  """The defaults for the model of the shapes world: its sizes, and none of its weights.

  A frame is 64 tokens, and blocks of attention are 16, so that a window of 9 frames has 36 blocks.
  """
  c = default_config()
  for network in (c.student, c.critic, c.teacher):
    network.weights = "random:shapes"
  c.vae.weights = "weights/vae_long"
  c.text.weights = "weights/teacher"
  c.text.negative = ""
  c.geometry.height = 16
  c.geometry.width = 16
  c.geometry.block = 16
  for group in (c.denoising, c.flow):
    group.shift = 3.0  # less than where frames are larger, as noise hides less of small ones
  c.flow.weighted = False
  c.flow.guidance = 3.0
  c.flow.guidance_interval = (500.0, 1000.0)
  c.compute.fsdp = 1  # every device has all of it
  c.compute.backend = "xla"
  for optimizer in (c.optimizer, c.critic_optimizer):
    optimizer.b1 = 0.9
    optimizer.b2 = 0.99
    optimizer.decay = 0.0
    optimizer.clip = 1.0
  c.log.every = 20
  c.checkpoint.keep = 1
  c.validation.prompts = (
    "a large red circle moves left over a gradient",
    "a small cyan star spins while a large orange square bounces, on stripes",
    "a medium green triangle rises and a large blue ring pulses on a plain background",
    "a large white cross orbits behind a grey pillar, over a slowly panning checkerboard",
  )
  return c


def _optimizer(rate: float) -> ConfigDict:
  """See training.optimizers."""
  c = ConfigDict()
  c.kind = "adam"  # or muon
  c.adam_share = 1.0  # with muon, of the rate, for what is no matrix
  c.rate = rate
  c.schedule = "constant"
  c.warmup = 0
  c.b1 = 0.0
  c.b2 = 0.999
  c.eps = 1e-8
  c.decay = 0.01
  c.clip = 10.0
  return c
