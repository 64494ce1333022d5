"""What scores a response."""

from textenv.rewards.answers import ExactAnswer, NumericAnswer, last_number
from textenv.rewards.base import RewardContext, RewardError, RewardFunction, Scores
from textenv.rewards.binding import as_reward
from textenv.rewards.classifier import ClassifierReward
from textenv.rewards.combinators import Affine, Clip, Ensemble, LengthPenalty, WeightedSum
from textenv.rewards.folders import load_reward
from textenv.rewards.human import HumanReward
from textenv.rewards.language_model import ImplicitReward, LogProbReward, TextLogProbReward, TokenLogprobs
from textenv.rewards.lexicon import LexiconReward, read_lexicon
from textenv.rewards.preference import PairClassifier, Pointwise, PreferenceReward
from textenv.rewards.reward import Reward
from textenv.rewards.rules import LengthTarget, MissingEOS, RegexMatch, SoftOverlong
from textenv.rewards.running import LengthControlled, RunningNormalization
from textenv.rewards.token_classifier import TokenClassifierReward
from textenv.rewards.tokens import StepReward, TokenAggregate, TokenFunction
from textenv.rewards.words import WordsReward

__all__ = [
    "Affine",
    "ClassifierReward",
    "Clip",
    "Ensemble",
    "ExactAnswer",
    "HumanReward",
    "ImplicitReward",
    "LengthControlled",
    "LengthPenalty",
    "LengthTarget",
    "LexiconReward",
    "LogProbReward",
    "MissingEOS",
    "NumericAnswer",
    "PairClassifier",
    "Pointwise",
    "PreferenceReward",
    "RegexMatch",
    "Reward",
    "RewardContext",
    "RewardError",
    "RewardFunction",
    "RunningNormalization",
    "Scores",
    "SoftOverlong",
    "StepReward",
    "TextLogProbReward",
    "TokenAggregate",
    "TokenClassifierReward",
    "TokenFunction",
    "TokenLogprobs",
    "WeightedSum",
    "WordsReward",
    "as_reward",
    "last_number",
    "load_reward",
    "read_lexicon",
]
