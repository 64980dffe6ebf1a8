"""Learned unmasking policies: a small network decides which positions are committed.

A policy sees how confident a frozen denoiser is about each position, what is still
masked and how many forwards were used. It is trained by reinforcement (`train_policy`)
on any reward of the completion, discounted by the forwards it took, or by imitation of
another sampler (`imitate`), and then used as one more rule of `diffmm.samplers`
(`PolicyRule`), with any denoiser, length and block length.

References:
  Jazbec et al., "Learning Unmasking Policies for Diffusion Language Models", arXiv
  2512.09106.
"""

from diffmm.policies.actions import MODES as MODES
from diffmm.policies.actions import act as act
from diffmm.policies.actions import bernoulli_entropy as bernoulli_entropy
from diffmm.policies.actions import bernoulli_log_prob as bernoulli_log_prob
from diffmm.policies.actions import (
    bernoulli_log_prob_per_position as bernoulli_log_prob_per_position,
)
from diffmm.policies.actions import bernoulli_logs as bernoulli_logs
from diffmm.policies.actions import dpls_log_prob as dpls_log_prob
from diffmm.policies.actions import forced_log_prob as forced_log_prob
from diffmm.policies.actions import log_prob as log_prob
from diffmm.policies.checkpoint import Policy as Policy
from diffmm.policies.checkpoint import load_policy as load_policy
from diffmm.policies.checkpoint import save_policy as save_policy
from diffmm.policies.grpo import Experience as Experience
from diffmm.policies.grpo import PolicyState as PolicyState
from diffmm.policies.grpo import grpo_loss as grpo_loss
from diffmm.policies.grpo import update as update
from diffmm.policies.imitation import imitate as imitate
from diffmm.policies.imitation import imitation_loss as imitation_loss
from diffmm.policies.network import PolicyConfig as PolicyConfig
from diffmm.policies.network import apply as apply
from diffmm.policies.network import init as init
from diffmm.policies.objective import Objective as Objective
from diffmm.policies.objective import advantages as advantages
from diffmm.policies.objective import clipped_objective as clipped_objective
from diffmm.policies.objective import es_mixture as es_mixture
from diffmm.policies.optimizers import Recipe as Recipe
from diffmm.policies.optimizers import optimizer_of as optimizer_of
from diffmm.policies.replay import Steps as Steps
from diffmm.policies.replay import replay as replay
from diffmm.policies.replay import steps_of as steps_of
from diffmm.policies.rewards import RewardFn as RewardFn
from diffmm.policies.rewards import additive_reward as additive_reward
from diffmm.policies.rewards import multiplicative_reward as multiplicative_reward
from diffmm.policies.rewards import row_reward as row_reward
from diffmm.policies.rollouts import (
    prompts_and_completions as prompts_and_completions,
)
from diffmm.policies.rollouts import repeat_rows as repeat_rows
from diffmm.policies.rollouts import rollout as rollout
from diffmm.policies.rule import PolicyRule as PolicyRule
from diffmm.policies.rule import policy_time as policy_time
from diffmm.policies.training import Training as Training
from diffmm.policies.training import TrainResult as TrainResult
from diffmm.policies.training import train_policy as train_policy
