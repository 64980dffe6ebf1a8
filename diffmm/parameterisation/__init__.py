"""Hyper-parameters that carry over width, depth and modules: Complete^(d)P and others.

Numbers only: a parameterisation maps names of leaves to factors, and an optimiser
(`diffmm.optim.adamw`, or anybody's) applies them. Nothing is attached to parameters,
so any pytree will do. Batch size and duration live in `diffmm.optim`.

| module | what lives there |
|---|---|
| ``leaf``, ``patterns``, ``infer`` | roles and ratios of leaves, from two sizes |
| ``rules`` | SP, muP, CompleteP, Complete^(d)P as tables of exponents |
| ``absorb``, ``initialise`` | multipliers inside weights; initial values |
| ``per_module``, ``search``, ``card`` | factors by type and depth; their search |
| ``coordinates`` | coordinate and gradient checks over width and depth |
| ``explain``, ``audit`` | every factor in the open; what fails silently |

References:
  Mlodozeniec et al., "Completed Hyperparameter Transfer across Modules, Width, Depth,
  Batch and Duration", arXiv 2512.22382. Dey et al., CompleteP, arXiv 2505.01618.
"""

from diffmm.parameterisation.absorb import absorb as absorb
from diffmm.parameterisation.absorb import absorbed as absorbed
from diffmm.parameterisation.absorb import absorbed_factors as absorbed_factors
from diffmm.parameterisation.audit import Finding as Finding
from diffmm.parameterisation.audit import audit as audit
from diffmm.parameterisation.audit import shrink_per_step as shrink_per_step
from diffmm.parameterisation.card import Card as Card
from diffmm.parameterisation.coordinate_report import (
    CoordinateReport as CoordinateReport,
)
from diffmm.parameterisation.coordinates import activation_changes as activation_changes
from diffmm.parameterisation.coordinates import coordinate_check as coordinate_check
from diffmm.parameterisation.coordinates import gradient_check as gradient_check
from diffmm.parameterisation.coordinates import gradient_rms as gradient_rms
from diffmm.parameterisation.explain import explain as explain
from diffmm.parameterisation.infer import infer as infer
from diffmm.parameterisation.initialise import init_std as init_std
from diffmm.parameterisation.initialise import rescale_init as rescale_init
from diffmm.parameterisation.initialise import rms_by_name as rms_by_name
from diffmm.parameterisation.initialise import scaled_forward as scaled_forward
from diffmm.parameterisation.leaf import Leaf as Leaf
from diffmm.parameterisation.leaf import Role as Role
from diffmm.parameterisation.patterns import DENOISER as DENOISER
from diffmm.parameterisation.patterns import DENOISER_BLOCKS as DENOISER_BLOCKS
from diffmm.parameterisation.patterns import EXPERTS as EXPERTS
from diffmm.parameterisation.patterns import FLAX_ATTENTION as FLAX_ATTENTION
from diffmm.parameterisation.patterns import Blocks as Blocks
from diffmm.parameterisation.patterns import Pattern as Pattern
from diffmm.parameterisation.patterns import linear as linear
from diffmm.parameterisation.patterns import norm as norm
from diffmm.parameterisation.patterns import torch_linear as torch_linear
from diffmm.parameterisation.per_module import PerModule as PerModule
from diffmm.parameterisation.per_module import interpolate_depth as interpolate_depth
from diffmm.parameterisation.rules import CompletedP as CompletedP
from diffmm.parameterisation.rules import CompleteP as CompleteP
from diffmm.parameterisation.rules import Exponents as Exponents
from diffmm.parameterisation.rules import MuP as MuP
from diffmm.parameterisation.rules import Row as Row
from diffmm.parameterisation.rules import Rule as Rule
from diffmm.parameterisation.rules import Standard as Standard
from diffmm.parameterisation.rules import StandardFanIn as StandardFanIn
from diffmm.parameterisation.rules import evaluate as evaluate
from diffmm.parameterisation.rules import role_table as role_table
from diffmm.parameterisation.screening import rescore as rescore
from diffmm.parameterisation.screening import should_stop as should_stop
from diffmm.parameterisation.search import SearchState as SearchState
from diffmm.parameterisation.search import Trial as Trial
from diffmm.parameterisation.search import TrustRegion as TrustRegion
from diffmm.parameterisation.space import Space as Space
