"""The settings of TRL's first `PPOTrainer` (0.2 to 0.11), by their names and with the defaults of 0.11.4."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

KLPenalty = Literal["kl", "abs", "mse", "full"]
LogWith = Literal["wandb", "tensorboard"]

_DEFAULT_MINI_BATCH = 128
_told: set[str] = set()
_log = logging.getLogger(__name__)


@dataclass
class PPOConfig:
    """Settings of `PPOTrainer`.

    Not frozen, unlike the rest of this library: code for TRL assigns to fields, and `step` reads them anew. A batch is
    what one `step` learns from; `mini_batch_size * gradient_accumulation_steps` of its rows make an optimizer step.

    Raises:
        ValueError: Naming the field, what was expected and what came.
    """

    exp_name: str = "ppo"
    """Told to the tracker, nothing else."""
    seed: int = 0
    """Seeds Python's, NumPy's and PyTorch's global generators when the trainer is made, and the minibatches."""
    log_with: LogWith | None = None
    """Where `log_stats` writes: `wandb`, `tensorboard` or nowhere."""
    task_name: str | None = None
    """Told to the tracker, nothing else."""
    model_name: str = "gpt2"
    """Told to the tracker; for your own `from_pretrained(config.model_name)`."""
    query_dataset: str = "stanfordnlp/imdb"
    """Told to the tracker; for your own `load_dataset`."""
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    """Told to the tracker; for your own pipeline."""
    remove_unused_columns: bool = True
    """A `datasets.Dataset` keeps the columns that the model's forward names, and label, query and response."""
    tracker_kwargs: dict = field(default_factory=dict)
    """Per tracker, such as `{"wandb": {"name": "run 1"}}`, given to `wandb.init`."""
    accelerator_kwargs: dict = field(default_factory=dict)
    """`{"cpu": True}` keeps everything on the CPU; nothing else is legal."""
    project_kwargs: dict = field(default_factory=dict)
    """`logging_dir` (or `project_dir`): where TensorBoard's events go."""
    tracker_project_name: str = "trl"
    """Project of the tracker."""
    push_to_hub_if_best_kwargs: dict = field(default_factory=dict)
    """Must be empty: nothing is sent anywhere by `step`."""
    steps: int = 20000
    """Episodes of your loop in all; `total_ppo_epochs` is this over `batch_size`."""
    learning_rate: float = 1.41e-5
    """Adam's step size, unless an optimizer is given."""
    adap_kl_ctrl: bool = True
    """Whether β follows `target` (Ziegler et al. 2019, §2.2), or stays."""
    init_kl_coef: float = 0.2
    """β at the start."""
    kl_penalty: KLPenalty = "kl"
    """What the reward is charged per token: `kl` k1, `abs` |k1|, `mse` k2, `full` the exact KL of the state."""
    target: float = 6.0
    """KL per response, in nats, that the adaptive β steers to."""
    horizon: float = 10000.0
    """Episodes over which the adaptive β moves."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """λ of the advantages."""
    cliprange: float = 0.2
    """Half-width of the trust region of the ratio."""
    cliprange_value: float = 0.2
    """Half-width of the value clip, in units of the reward."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    batch_size: int = 128
    """Responses of a `step`."""
    forward_batch_size: int | None = None
    """An old name of `mini_batch_size`; wins over it."""
    mini_batch_size: int | None = None
    """Responses of one forward and backward; None: the largest that fits, at most 128."""
    gradient_accumulation_steps: int = 1
    """Forwards of an optimizer step; the step does not depend on how its rows are split."""
    world_size: int | None = None
    """Set by the trainer, to 1."""
    ppo_epochs: int = 4
    """Passes over a batch."""
    max_grad_norm: float | None = None
    """Bound of the gradient's norm at every optimizer step; None: none."""
    optimize_cuda_cache: bool | None = None
    """An old name of `optimize_device_cache`."""
    optimize_device_cache: bool = False
    """Whether `step` hands cached GPU memory back when it is done."""
    early_stopping: bool = False
    """Whether epochs stop once log π_old − log π exceeds 1.5 `target_kl` in the last optimizer step of one."""
    target_kl: float = 1.0
    """See `early_stopping`."""
    compare_steps: int = 1
    """No meaning here: it goes with `push_to_hub_if_best_kwargs`."""
    ratio_threshold: float = 10.0
    """An optimizer step whose mean ratio exceeds this is left out, with a warning."""
    use_score_scaling: bool = False
    """Whether scores are divided by the running standard deviation of all scores so far."""
    use_score_norm: bool = False
    """With `use_score_scaling`: whether the running mean is subtracted too."""
    score_clip: float | None = None
    """Scores are clipped to ± this, after scaling; None: they are not."""
    whiten_rewards: bool = False
    """Rewards to variance 1 over the batch, the mean kept."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""
    is_encoder_decoder: bool | None = None
    """Set by the trainer, to False."""
    is_peft_model: bool | None = None
    """Set by the trainer."""
    backward_batch_size: int = field(default=0, init=False)
    """Responses of an optimizer step, `mini_batch_size * gradient_accumulation_steps`."""
    global_backward_batch_size: int = field(default=0, init=False)
    """The same: there is one process."""
    global_batch_size: int = field(default=0, init=False)
    """`batch_size`: there is one process."""
    total_ppo_epochs: int = field(default=0, init=False)
    """Batches until `steps`, for your own loop."""
    dataset_num_proc: int | None = None
    """For your own `dataset.map`."""

    def __post_init__(self) -> None:
        """Check each field, and derive the batch sizes."""
        _integers(self, 1, "batch_size", "gradient_accumulation_steps", "ppo_epochs", "steps", "compare_steps")
        _integers(self, 0, "seed")
        for name in ("learning_rate", "init_kl_coef", "cliprange", "cliprange_value", "vf_coef", "target_kl"):
            _number(name, getattr(self, name))
        for name in ("target", "horizon", "ratio_threshold"):
            _number(name, getattr(self, name), positive=True)
        for name in ("max_grad_norm", "score_clip"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), positive=True)
        for name in ("gamma", "lam"):
            _number(name, getattr(self, name), high=1.0)
        if self.kl_penalty not in get_args(KLPenalty):
            raise ValueError(f"kl_penalty: expected one of {', '.join(get_args(KLPenalty))}, got {self.kl_penalty!r}")
        if self.log_with is not None and self.log_with not in get_args(LogWith):
            raise ValueError(f"log_with: expected None, 'wandb' or 'tensorboard', got {self.log_with!r}")
        self._refuse_what_is_not_here()
        self._derive_batch_sizes()
        if self.optimize_cuda_cache is not None:
            self.optimize_device_cache = self.optimize_cuda_cache
        self.total_ppo_epochs = math.ceil(self.steps / self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, dictionaries flattened with `/`."""
        flat: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            inner = _flatten(entry.name, value) if isinstance(value, dict) else {entry.name: value}
            flat.update(inner)
        return flat

    def _derive_batch_sizes(self) -> None:
        if self.forward_batch_size is not None:
            self.mini_batch_size = self.forward_batch_size
        if self.mini_batch_size is None:
            self.mini_batch_size = min(_DEFAULT_MINI_BATCH, max(1, self.batch_size // self.gradient_accumulation_steps))
        _integers(self, 1, "mini_batch_size")
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % self.backward_batch_size:
            raise ValueError(
                "batch_size: expected a multiple of mini_batch_size * gradient_accumulation_steps = "
                f"{self.backward_batch_size}, got {self.batch_size}"
            )
        self.global_backward_batch_size, self.global_batch_size = self.backward_batch_size, self.batch_size

    def _refuse_what_is_not_here(self) -> None:
        if self.push_to_hub_if_best_kwargs:
            raise ValueError(
                "push_to_hub_if_best_kwargs: expected {}, because step() sends nothing anywhere; call "
                f"model.pretrained_model.push_to_hub yourself; got {self.push_to_hub_if_best_kwargs!r}"
            )
        if set(self.accelerator_kwargs) - {"cpu"}:
            raise ValueError(
                f"accelerator_kwargs: expected {{}} or {{'cpu': True}} (one process, the model's own type), "
                f"got {self.accelerator_kwargs!r}"
            )
        if set(self.project_kwargs) - {"logging_dir", "project_dir"}:
            raise ValueError(f"project_kwargs: expected logging_dir or project_dir, got {self.project_kwargs!r}")
        if self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder: expected False, only causal language models are here, got True")
        if self.compare_steps != 1:
            tell_once("compare_steps", "has no meaning without push_to_hub_if_best_kwargs")


def tell_once(name: str, sentence: str) -> None:
    """Log that an argument has no effect, the first time it is seen."""
    if name not in _told:
        _told.add(name)
        _log.warning("%s %s", name, sentence)


def _flatten(prefix: str, nested: dict) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}/{key}"
        flat.update(_flatten(name, value) if isinstance(value, dict) else {name: value})
    return flat


def _integers(config: PPOConfig, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")


def _number(name: str, value: object, *, high: float = math.inf, positive: bool = False) -> None:
    bad = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    if bad or not 0 <= value <= high or (positive and value == 0):  # type: ignore[operator]
        sign = "> 0" if positive else ">= 0"
        bound = "" if high == math.inf else f" and <= {high}"
        raise ValueError(f"{name}: expected a finite number {sign}{bound}, got {value!r}")
