"""Batch size, duration, optimisers and averages, for any JAX training loop.

Hyper-parameters are Python numbers, transformations are optax's; per-leaf factors come
as ``{name: Multiplier}`` from `diffmm.parameterisation` or from anybody else.

| module | what lives there |
|---|---|
| ``hyperparameters``, ``rates`` | AdamW's numbers; how rates scale with κ |
| ``sde``, ``critical`` | κ of batch and horizon, logical and critical batch |
| ``continuous`` | batch-free hyper-parameters and their round trip |
| ``other_optimizers`` | the rule table of SGD, RMSProp, Adam, Adagrad |
| ``schedules``, ``batch_ramp``, ``remap`` | clocks in tokens; batches that change |
| ``adamw``, ``grouped``, ``clipping`` | per-leaf hyper-parameters in optax |
| ``ema``, ``ema_schedules`` | the EMA scaling rule ρ^κ |
| ``power_ema``, ``post_hoc`` | power-function averages and their synthesis |

References:
  Bethune et al., "The Design Space of Tri-Modal Masked Diffusion Models", arXiv
  2602.21472. Mlodozeniec et al., arXiv 2512.22382. Malladi et al., "On the SDEs and
  Scaling Rules for Adaptive Gradient Algorithms", arXiv 2205.10287. Busbridge et al.,
  "How to Scale Your EMA", arXiv 2307.13813.
"""

from diffmm.optim.adamw import adamw as adamw
from diffmm.optim.adamw import mask_by_name as mask_by_name
from diffmm.optim.batch_ramp import BatchRamp as BatchRamp
from diffmm.optim.batch_ramp import ramp as ramp
from diffmm.optim.clipping import clip_by_absorbed_norm as clip_by_absorbed_norm
from diffmm.optim.continuous import Continuous as Continuous
from diffmm.optim.critical import CriticalReport as CriticalReport
from diffmm.optim.critical import CriticalSteps as CriticalSteps
from diffmm.optim.critical import check_critical as check_critical
from diffmm.optim.critical import learning_rate_deficit as learning_rate_deficit
from diffmm.optim.critical import measure_critical_steps as measure_critical_steps
from diffmm.optim.ema import EmaState as EmaState
from diffmm.optim.ema import averaged_params as averaged_params
from diffmm.optim.ema import decay_rate as decay_rate
from diffmm.optim.ema import ema_from_half_life as ema_from_half_life
from diffmm.optim.ema import ema_params as ema_params
from diffmm.optim.ema import scale_batch_norm_momentum as scale_batch_norm_momentum
from diffmm.optim.ema import update_average as update_average
from diffmm.optim.ema import update_batch_stats as update_batch_stats
from diffmm.optim.ema_schedules import cosine_decay as cosine_decay
from diffmm.optim.ema_schedules import warmup_decay as warmup_decay
from diffmm.optim.grouped import grouped as grouped
from diffmm.optim.hyperparameters import AdamW as AdamW
from diffmm.optim.other_optimizers import scale_hyperparameters as scale_hyperparameters
from diffmm.optim.post_hoc import Synthesis as Synthesis
from diffmm.optim.post_hoc import profile_inner_product as profile_inner_product
from diffmm.optim.post_hoc import synthesis as synthesis
from diffmm.optim.post_hoc import synthesize as synthesize
from diffmm.optim.power_ema import PowerEmaState as PowerEmaState
from diffmm.optim.power_ema import averaged_profiles as averaged_profiles
from diffmm.optim.power_ema import gamma_from_sigma_rel as gamma_from_sigma_rel
from diffmm.optim.power_ema import power_ema as power_ema
from diffmm.optim.power_ema import power_rate as power_rate
from diffmm.optim.power_ema import sigma_rel_from_gamma as sigma_rel_from_gamma
from diffmm.optim.rates import BetaForm as BetaForm
from diffmm.optim.rates import beta_from_half_life as beta_from_half_life
from diffmm.optim.rates import complement as complement
from diffmm.optim.rates import half_life as half_life
from diffmm.optim.rates import scale_beta as scale_beta
from diffmm.optim.rates import scale_decay as scale_decay
from diffmm.optim.remap import change_batch as change_batch
from diffmm.optim.schedules import TokenSchedule as TokenSchedule
from diffmm.optim.schedules import WarmupCosine as WarmupCosine
from diffmm.optim.schedules import by_steps as by_steps
from diffmm.optim.schedules import group_steps as group_steps
from diffmm.optim.schedules import warmup_cosine as warmup_cosine
from diffmm.optim.sde import TRIMODAL_HORIZON as TRIMODAL_HORIZON
from diffmm.optim.sde import Budget as Budget
from diffmm.optim.sde import HorizonFit as HorizonFit
from diffmm.optim.sde import critical_batch as critical_batch
from diffmm.optim.sde import fit_horizon as fit_horizon
from diffmm.optim.sde import kappa as kappa
from diffmm.optim.sde import logical_batch as logical_batch
from diffmm.optim.sde import reparameterise as reparameterise
from diffmm.optim.sde import scale_by_kappa as scale_by_kappa
