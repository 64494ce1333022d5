"""TRL's first `PPOTrainer`: a loop of one's own around `generate` and `step`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from agents.adapters.trl_compat.config import PPOConfig
from agents.adapters.trl_compat.generate import Layout, respond, warn_of_another_law
from agents.adapters.trl_compat.model import AutoModelForCausalLMWithValueHead
from agents.adapters.trl_compat.names import refuse_overrides
from agents.adapters.trl_compat.reference import create_reference_model, reference_of
from agents.adapters.trl_compat.runtime import (
    LocalProcess,
    check_arguments,
    choose_device,
    game_table,
    make_controller,
    make_dataloader,
    make_tracker,
)
from agents.adapters.trl_compat.step import (
    RunningScores,
    charged_kl,
    check_context,
    checked_scores,
    learnt_scores,
    pack,
    recorded,
    token_rewards,
)
from agents.adapters.trl_compat.update import estimate, objective, run_epochs, summary, warn_of_negative_kl
from textenv.reference import Reference

Stats = dict[str, float | np.ndarray]


class PPOTrainer:
    """PPO on queries, responses and scores that you bring.

    The rewards are r_t = score·[t is last] − β·kl_t, the advantages GAE's, whitened over the batch; then `ppo_epochs`
    passes over it, with the clipped surrogate and `vf_coef` times the clipped value loss.

    A subclass that overrides what only TRL's `step` called, such as `compute_rewards` or `loss`, is a TypeError.

    Attributes:
        config: The settings.
        model: What learns.
        ref_model: The frozen reference; None if it is the model with its adapter off.
        tokenizer: For `generate`, and saved with the model.
        optimizer: Adam, unless another was given.
        lr_scheduler: Steps once per `step`, if given.
        dataloader: Batches of `batch_size` of the dataset, shuffled; None without one.
        kl_ctl: Holds β in `value`.
        running: Mean and deviation of all scores so far.
        accelerator: The device and the like, under accelerate's names.
        current_device: The device.
        is_peft_model: Whether the model has an adapter.
        is_encoder_decoder: False.
        current_step: How often `log_stats` was called.
    """

    def __init_subclass__(cls) -> None:
        """Refuse overrides that would be ignored."""
        refuse_overrides(cls)

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: AutoModelForCausalLMWithValueHead | None = None,
        ref_model: Any = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[..., Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: LRScheduler | None = None,
        training_data_collator: Any = None,
    ) -> None:
        """Move the models to the device, and make what is not given.

        Args:
            config: The settings; None: the defaults.
            model: What learns.
            ref_model: The reference, value-headed or not; None: the model without its adapter, else a copy of it.
            tokenizer: A Hugging Face tokenizer.
            dataset: Anything a `DataLoader` takes; None: the loop brings its own queries.
            optimizer: Over the model's parameters; None: Adam.
            data_collator: `collate_fn` of the dataloader.
            num_shared_layers: See `create_reference_model`; for a reference made here.
            lr_scheduler: Of `optimizer`.
            training_data_collator: Must be None: rows are laid out here.

        Raises:
            ValueError: Naming the argument, what was expected and what came.
        """
        config = PPOConfig() if config is None else config
        check_arguments(config, model, ref_model, tokenizer, lr_scheduler, training_data_collator)
        assert model is not None
        from transformers import set_seed

        set_seed(config.seed)
        self.config, self.model, self.tokenizer, self.dataset = config, model, tokenizer, dataset
        self.is_peft_model, self.is_encoder_decoder = model.is_peft_model, False
        config.world_size, config.is_peft_model, config.is_encoder_decoder = 1, self.is_peft_model, False
        self.accelerator = LocalProcess(choose_device(model.device, config))
        self.current_device = self.accelerator.device
        if ref_model is None and not self.is_peft_model:
            ref_model = create_reference_model(model, num_shared_layers)
        elif num_shared_layers is not None:
            raise ValueError("num_shared_layers: expected None with a reference of its own or an adapter")
        self.ref_model = ref_model
        model.to(self.current_device)
        if ref_model is not None:
            ref_model.to(self.current_device).requires_grad_(False)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trainable, lr=config.learning_rate) if optimizer is None else optimizer
        self.lr_scheduler = lr_scheduler
        self.kl_ctl, self.running = make_controller(config), RunningScores()
        self.dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        self.current_step, self._warned_of_law = 0, False
        self._order = torch.Generator().manual_seed(config.seed)
        self._tracker = make_tracker(config)

    def prepare_dataloader(self, dataset: Any, data_collator: Callable[..., Any] | None = None) -> DataLoader:
        """Batches of `batch_size`, shuffled by the seed, the last one dropped if it is short."""
        return make_dataloader(dataset, data_collator, self.config)

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        *,
        remove_padding: bool = True,
        pad_to_multiple_of: int | None = None,
        **generation_kwargs: Any,
    ) -> Any:
        """Continue one query, or a list of them.

        Args:
            query_tensor: Token ids `[l]`, or a list of such.
            length_sampler: Gives `max_new_tokens` of each batch.
            batch_size: Queries of a list that are continued together.
            return_prompt: Whether queries are part of what comes back.
            generate_ref_response: Whether the reference answers too.
            remove_padding: For a list: whether responses are cut after their first stop id.
            pad_to_multiple_of: For a list: queries are padded to a multiple of this.
            **generation_kwargs: For Hugging Face's `generate`, which checks them.

        Returns:
            For one query `[1, l + n]` (or `[1, n]`), as Hugging Face gives it; for a list a list of `[l + n]`. With
            `generate_ref_response` a pair of such, the model's and the reference's.

        Raises:
            ValueError: If a query has another shape.
        """
        if not self._warned_of_law:
            warn_of_another_law(self.model, generation_kwargs)
            self._warned_of_law = True
        layout = Layout(return_prompt, remove_padding, pad_to_multiple_of, batch_size)

        def answers(model: AutoModelForCausalLMWithValueHead) -> Any:
            return respond(model, self.tokenizer, query_tensor, length_sampler, layout, generation_kwargs)

        responses = answers(self.model)
        if not generate_ref_response:
            return responses
        with self.model.pretrained_model.disable_adapter() if self.ref_model is None else nullcontext():
            return responses, answers(self.model if self.ref_model is None else self.ref_model)

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor] | Tensor,
        response_masks: list[Tensor] | None = None,
    ) -> Stats:
        """Learn from a batch.

        Args:
            queries: Token ids, `batch_size` tensors of shape `[l]`.
            responses: Token ids, likewise.
            scores: One number per response: a list, or a tensor `[batch_size]`.
            response_masks: Which response tokens count (nonzero), each the shape of its response; None: all.

        Returns:
            TRL's statistics under TRL's names: floats, and arrays over responses or tokens.

        Raises:
            ValueError: Naming the argument, what was expected and what came.
        """
        start = time.perf_counter()
        config, policy = self.config, self.model.policy
        assert config.mini_batch_size is not None
        given = checked_scores(queries, responses, scores, response_masks, config.batch_size)
        batch = pack(queries, responses, response_masks, self.current_device)
        check_context(policy.lm, batch)
        prepared = learnt_scores(given.to(self.current_device), self.running, config)
        logprobs, values = recorded(policy, batch, config.mini_batch_size)
        reference = reference_of(self.model, self.ref_model)
        ref_logprobs = Reference(reference, temperature=1.0).logprobs(
            batch.ids, batch.prompt_lengths, batch.response_lengths
        )
        timing = {"time/ppo/forward_pass": (forward := time.perf_counter()) - start}
        kl = charged_kl(self.model.pretrained_model, reference, batch, logprobs, ref_logprobs, config)
        rewards, non_score = token_rewards(prepared, kl, self.kl_ctl.value, batch.mask)
        timing["time/ppo/compute_rewards"] = (rewarded := time.perf_counter()) - forward
        targets = estimate(rewards, logprobs, values, batch.mask, config)
        timing["time/ppo/compute_advantages"] = (estimated := time.perf_counter()) - rewarded
        self.model.train()
        told = run_epochs(policy, self.optimizer, batch, targets, config, self._order)
        timing["time/ppo/optimize_step"] = (learnt := time.perf_counter()) - estimated
        stats = objective(logprobs, ref_logprobs, kl, non_score, prepared, self.kl_ctl.value, batch) | summary(told)
        stats["ppo/learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        warn_of_negative_kl(stats["objective/kl_dist"])  # type: ignore[arg-type]
        self.kl_ctl.update(float(stats["objective/kl"]), len(batch))
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if config.optimize_device_cache and self.current_device.type == "cuda":
            torch.cuda.empty_cache()
        timing["time/ppo/calc_stats"] = time.perf_counter() - learnt
        return stats | timing | {"time/ppo/total": time.perf_counter() - start}

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Any] | Tensor,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Send the statistics of a step to the tracker, with the mean and deviation of the scores.

        Args:
            stats: What `step` gave.
            batch: Columns by name; those of `columns_to_log` make wandb's table.
            rewards: The scores.
            columns_to_log: Names in `batch`.

        Raises:
            ValueError: If wandb's table lacks a column.
        """
        numbers = np.array([float(reward) for reward in rewards])
        wanted = self.config.log_with == "wandb"
        table = game_table(batch, list(columns_to_log), numbers.tolist()) if wanted else None
        spread = float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0
        own = {"env/reward_mean": float(numbers.mean()), "env/reward_std": spread, "env/reward_dist": numbers}
        self.current_step += 1
        self._tracker.log(self.current_step, {**stats, **own}, table)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save the model and the tokenizer; see the model's own `save_pretrained`."""
        self.model.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    _save_pretrained = save_pretrained
