"""Masked (absorbing) diffusion: schedules, masking, losses, likelihood bounds.

The room turns a clean `diffmm.typing.Batch` and any function that scores tokens into
a training loss or a likelihood bound:

    −log p(x0) <= ∫_0^1 (m'(t)/m(t)) E[Σ_masked −log p(x0_i | x_t)] dt.

| file | what lives there |
|---|---|
| ``schedules`` | mask probability m(t), its weight m'/m, its inverse |
| ``draws`` | randomness keyed by the global row index |
| ``corruption`` | what a process is and returns |
| ``process`` | estimators of the bound: Bernoulli, count, T-step |
| ``surrogates`` | objectives that are no bound: MaskGIT, softmin-SNR, CART |
| ``cross_entropy`` | the loss through the unembedding, in chunks |
| ``losses`` | the additive training loss, its denominators and metrics |
| ``likelihood``, ``estimates`` | evaluation with error bars; exact enumeration |
| ``names`` | schedules and processes by name, for the command line |

References:
  Sahoo et al., "Simple and Effective Masked Diffusion Language Models",
  arXiv 2406.07524; Shi et al., "Simplified and Generalized Masked Diffusion for
  Discrete Data", arXiv 2406.04329; Bethune et al., "The Design Space of Tri-Modal
  Masked Diffusion Models", arXiv 2602.21472.
"""

from diffmm.diffusion.corruption import Corruption as Corruption
from diffmm.diffusion.corruption import MaskingProcess as MaskingProcess
from diffmm.diffusion.corruption import repeat_rows as repeat_rows
from diffmm.diffusion.cross_entropy import cross_entropy as cross_entropy
from diffmm.diffusion.draws import row_keys as row_keys
from diffmm.diffusion.draws import row_uniform as row_uniform
from diffmm.diffusion.draws import stratified_times as stratified_times
from diffmm.diffusion.draws import uniform_subset as uniform_subset
from diffmm.diffusion.estimates import Estimate as Estimate
from diffmm.diffusion.estimates import LikelihoodBound as LikelihoodBound
from diffmm.diffusion.likelihood import exact_bound as exact_bound
from diffmm.diffusion.likelihood import likelihood_bound as likelihood_bound
from diffmm.diffusion.losses import Metrics as Metrics
from diffmm.diffusion.losses import bits_per_token as bits_per_token
from diffmm.diffusion.losses import denominators as denominators
from diffmm.diffusion.losses import diffusion_loss as diffusion_loss
from diffmm.diffusion.losses import normalise as normalise
from diffmm.diffusion.names import process_by_name as process_by_name
from diffmm.diffusion.names import schedule_by_name as schedule_by_name
from diffmm.diffusion.process import BernoulliMasking as BernoulliMasking
from diffmm.diffusion.process import CountMasking as CountMasking
from diffmm.diffusion.process import DiscreteMasking as DiscreteMasking
from diffmm.diffusion.schedules import Cosine as Cosine
from diffmm.diffusion.schedules import CosineMDLM as CosineMDLM
from diffmm.diffusion.schedules import Geometric as Geometric
from diffmm.diffusion.schedules import Linear as Linear
from diffmm.diffusion.schedules import LogLinear as LogLinear
from diffmm.diffusion.schedules import Polynomial as Polynomial
from diffmm.diffusion.schedules import validate_schedule as validate_schedule
from diffmm.diffusion.surrogates import CARTMasking as CARTMasking
from diffmm.diffusion.surrogates import MaskGITMasking as MaskGITMasking
from diffmm.diffusion.surrogates import SoftminSNRMasking as SoftminSNRMasking
from diffmm.diffusion.surrogates import softmin_snr_weight as softmin_snr_weight
