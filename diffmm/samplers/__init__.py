"""Sampling from masked diffusion models: one loop, many small selection rules.

A denoiser is a function (`diffmm.typing.PredictFn`); a request is a
`diffmm.typing.Canvas`. `sample` runs the loop

    evaluate → guide → suppress → score → select → temper → top-k → top-p → draw

until every row is complete. The rules here are `Ancestral` (any schedule, evaluations
that reveal nothing are skipped), `FirstHitting` (exact, one token per evaluation) and
`FixedQuota` (MaskGIT, LLaDA, Dream: the best-scored positions). A rule of your own is a
frozen dataclass with three methods; see `diffmm.samplers.rule`.

References:
  Sahoo et al., arXiv 2406.07524; Shi et al., arXiv 2406.04329; Zheng et al., arXiv
  2409.02908 (first hitting, exact draws); Chang et al., arXiv 2202.04200; Nie et al.,
  arXiv 2502.09992; Ho and Salimans, arXiv 2207.12598.
"""

from diffmm.samplers.adapters import shifted as shifted
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
from diffmm.samplers.loop import generate as generate
from diffmm.samplers.loop import resume as resume
from diffmm.samplers.quota import RemainingFn as RemainingFn
from diffmm.samplers.quota import quota_table as quota_table
from diffmm.samplers.quota import remaining_cosine as remaining_cosine
from diffmm.samplers.quota import remaining_even as remaining_even
from diffmm.samplers.quota import remaining_linear as remaining_linear
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
from diffmm.samplers.turns import Plan as Plan
from diffmm.samplers.turns import defaults_for as defaults_for
from diffmm.samplers.turns import sample_in_turn as sample_in_turn
