"""Sampling from masked diffusion models: one loop, many small selection rules.

A denoiser is a function (`diffmm.typing.PredictFn`), with a cache and other powers if
it offers them; a request is a `diffmm.typing.Canvas`. `sample` runs the loop

    evaluate → guide → suppress → score → select → temper → filter → draw

until every row is complete. Rules, by what they need to know:

| rules | commit |
|---|---|
| `Ancestral`, `DreamOrigin`, `StochasticQuota`, `FirstHitting` | by a schedule |
| `FixedQuota` (MaskGIT, LLaDA, Dream, PC-Sampler) | best-scored, so many a step |
| `Threshold`, `Factor`, `Frechet`, `EntropyBounded`, `KLASS` | as many as are sure |
| `Hierarchy`, `Credit` | the same, by runs of masks or steady arg-maxes |
| `ReMDM`, `WINO`, `JointThreshold` | and take commits back, or rewrite them |

`diffmm.policies.PolicyRule` is a learned one. A rule of your own derives from `Rule`;
see `diffmm.samplers.rule`. `sample_stream` refills finished rows, and
`sample_speculatively` decodes greedily with several guesses per call.

References:
  Sahoo et al., arXiv 2406.07524; Shi et al., arXiv 2406.04329; Zheng et al., arXiv
  2409.02908 (first hitting, exact draws); Chang et al., arXiv 2202.04200; Nie et al.,
  arXiv 2502.09992; Ho and Salimans, arXiv 2207.12598; and those of each module.
"""

from diffmm.samplers.adapters import shifted as shifted
from diffmm.samplers.adaptive import EntropyBounded as EntropyBounded
from diffmm.samplers.adaptive import Factor as Factor
from diffmm.samplers.adaptive import Frechet as Frechet
from diffmm.samplers.adaptive import Threshold as Threshold
from diffmm.samplers.adaptive import entropy_bounded_set as entropy_bounded_set
from diffmm.samplers.adaptive import factor_set as factor_set
from diffmm.samplers.adaptive import frechet_set as frechet_set
from diffmm.samplers.adaptive import threshold_set as threshold_set
from diffmm.samplers.block_ends import AdaptiveEnds as AdaptiveEnds
from diffmm.samplers.caches import CacheStrategy as CacheStrategy
from diffmm.samplers.caches import CacheView as CacheView
from diffmm.samplers.caches import Delayed as Delayed
from diffmm.samplers.caches import Dual as Dual
from diffmm.samplers.caches import Exact as Exact
from diffmm.samplers.caches import Prefix as Prefix
from diffmm.samplers.canvas import canvas_from_prompts as canvas_from_prompts
from diffmm.samplers.categorical import categorical as categorical
from diffmm.samplers.categorical import draw as draw
from diffmm.samplers.categorical import filter_logits as filter_logits
from diffmm.samplers.dinfer import Credit as Credit
from diffmm.samplers.dinfer import Hierarchy as Hierarchy
from diffmm.samplers.dinfer import hierarchy_set as hierarchy_set
from diffmm.samplers.filters import FILL as FILL
from diffmm.samplers.filters import min_p as min_p
from diffmm.samplers.filters import suppress as suppress
from diffmm.samplers.filters import temper as temper
from diffmm.samplers.filters import top_k as top_k
from diffmm.samplers.filters import top_p as top_p
from diffmm.samplers.guidance import Constant as Constant
from diffmm.samplers.guidance import GuidanceSchedule as GuidanceSchedule
from diffmm.samplers.guidance import Interval as Interval
from diffmm.samplers.guidance import LinearRamp as LinearRamp
from diffmm.samplers.guidance import combine as combine
from diffmm.samplers.guidance import hide_condition as hide_condition
from diffmm.samplers.klass import KLASS as KLASS
from diffmm.samplers.klass import kl_divergence as kl_divergence
from diffmm.samplers.klass import klass_set as klass_set
from diffmm.samplers.loop import generate as generate
from diffmm.samplers.loop import resume as resume
from diffmm.samplers.quota import RemainingFn as RemainingFn
from diffmm.samplers.quota import quota_table as quota_table
from diffmm.samplers.quota import remaining_cosine as remaining_cosine
from diffmm.samplers.quota import remaining_even as remaining_even
from diffmm.samplers.quota import remaining_linear as remaining_linear
from diffmm.samplers.registry import RULES as RULES
from diffmm.samplers.registry import rule_from_name as rule_from_name
from diffmm.samplers.remasking import WINO as WINO
from diffmm.samplers.remasking import JointThreshold as JointThreshold
from diffmm.samplers.remasking import edit_set as edit_set
from diffmm.samplers.remasking import wino_sets as wino_sets
from diffmm.samplers.remdm import ReMDM as ReMDM
from diffmm.samplers.remdm import largest_sigma as largest_sigma
from diffmm.samplers.remdm import unmask_probability as unmask_probability
from diffmm.samplers.rule import Advance as Advance
from diffmm.samplers.rule import BlockEnds as BlockEnds
from diffmm.samplers.rule import Prediction as Prediction
from diffmm.samplers.rule import Rule as Rule
from diffmm.samplers.rule import Selection as Selection
from diffmm.samplers.rule import Window as Window
from diffmm.samplers.rule import best_ranked as best_ranked
from diffmm.samplers.rule import ensure_progress as ensure_progress
from diffmm.samplers.rule import top_ranked as top_ranked
from diffmm.samplers.rule import uniform_per_position as uniform_per_position
from diffmm.samplers.rules import Ancestral as Ancestral
from diffmm.samplers.rules import FirstHitting as FirstHitting
from diffmm.samplers.rules import FixedQuota as FixedQuota
from diffmm.samplers.rules import first_hitting_time as first_hitting_time
from diffmm.samplers.sampling import Request as Request
from diffmm.samplers.sampling import SampleResult as SampleResult
from diffmm.samplers.sampling import describe as describe
from diffmm.samplers.sampling import frames as frames
from diffmm.samplers.sampling import prepare as prepare
from diffmm.samplers.sampling import result_of as result_of
from diffmm.samplers.sampling import sample as sample
from diffmm.samplers.scores import SCORES as SCORES
from diffmm.samplers.scores import Drawn as Drawn
from diffmm.samplers.scores import Margin as Margin
from diffmm.samplers.scores import MaxProb as MaxProb
from diffmm.samplers.scores import NegativeEntropy as NegativeEntropy
from diffmm.samplers.scores import PCScore as PCScore
from diffmm.samplers.scores import Position as Position
from diffmm.samplers.scores import Random as Random
from diffmm.samplers.scores import Score as Score
from diffmm.samplers.scores import score_from_name as score_from_name
from diffmm.samplers.serving import Finished as Finished
from diffmm.samplers.serving import sample_stream as sample_stream
from diffmm.samplers.settings import Controls as Controls
from diffmm.samplers.settings import Settings as Settings
from diffmm.samplers.settings import resolve as resolve
from diffmm.samplers.speculation import SpeculativeResult as SpeculativeResult
from diffmm.samplers.speculation import sample_speculatively as sample_speculatively
from diffmm.samplers.state import Counts as Counts
from diffmm.samplers.state import Limits as Limits
from diffmm.samplers.state import Problem as Problem
from diffmm.samplers.state import Program as Program
from diffmm.samplers.state import Spec as Spec
from diffmm.samplers.state import State as State
from diffmm.samplers.state import Trace as Trace
from diffmm.samplers.statistics import Statistics as Statistics
from diffmm.samplers.statistics import logit_statistics as logit_statistics
from diffmm.samplers.stochastic import DreamOrigin as DreamOrigin
from diffmm.samplers.stochastic import StochasticQuota as StochasticQuota
from diffmm.samplers.turns import Plan as Plan
from diffmm.samplers.turns import defaults_for as defaults_for
from diffmm.samplers.turns import sample_in_turn as sample_in_turn
