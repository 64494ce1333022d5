"""PPO on a language model in one file: read it from top to bottom.

The embedded storyteller learns to write what the embedded reward model likes, in a few minutes on one CPU core:

    python docs/examples/cleanrl_style_ppo.py
    python docs/examples/cleanrl_style_ppo.py --iterations 60 --kl-coef 0.3

A prompt is the first state, a token is an action, appending it is the transition. The environment pays the score of a
finished text; this file charges the KL to the frozen reference, from the log-probs it draws with. Nothing here comes
from `agents`: copy the file and change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import textenv


@dataclass(frozen=True)
class Args:
    """Settings; each is a flag of the command line."""

    iterations: int = 40
    """Rollouts, each learnt from."""
    num_envs: int = 64
    """Rows that act side by side."""
    num_steps: int = 48
    """Tokens of each row in a rollout; a text may go on in the next."""
    epochs: int = 2
    """Passes over a rollout."""
    minibatches: int = 4
    """Optimizer steps of a pass."""
    learning_rate: float = 3e-4
    """Of Adam; falls to 0 over the run."""
    kl_coef: float = 0.15
    """β, the price of a nat away from the reference."""
    gae_lambda: float = 0.98
    """λ. There is no γ: texts are short, and a score is worth the same whenever it comes."""
    clip_eps: float = 0.2
    """How far a probability may move, as a ratio, in one update."""
    value_coef: float = 0.5
    """Weight of the critic's loss."""
    max_grad_norm: float = 1.0
    """Bound of the gradient's norm."""
    seed: int = 0
    """Of prompts, tokens and minibatches."""


class Agent(nn.Module):
    """A pretrained language model is the actor; a second copy of its trunk, with one new layer, is the critic.

    The critic does not share the actor's trunk: the value loss would pull at the weights that know the language.
    """

    def __init__(self, folder: str, temperature: float = 1.0) -> None:
        super().__init__()
        self.actor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.critic = AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.value_head = nn.Linear(self.critic.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)  # V = 0 until something has been learnt
        nn.init.zeros_(self.value_head.bias)
        self.temperature = temperature
        self.eval()  # no dropout: the law that drew a token must be the law that learns from it

    def forward(self, texts: Tensor, row: Tensor, length: Tensor) -> tuple[Categorical, Tensor]:
        """π(·|s) and V(s) of states that are prefixes of texts: state b is `texts[row[b], :length[b]]`.

        A causal model reads a text once and knows every prefix of it: position t has seen nothing after t. So the
        states of a whole episode cost one row, and what pads a row on the right changes nothing.
        """
        texts = texts[:, : int(length.max())]
        hidden = self.actor.base_model(input_ids=texts, use_cache=False).last_hidden_state[row, length - 1]
        logits = self.actor.get_output_embeddings()(hidden) / self.temperature
        seen = self.critic(input_ids=texts, use_cache=False).last_hidden_state[row, length - 1]
        return Categorical(logits=logits, validate_args=False), self.value_head(seen).squeeze(-1)

    @torch.no_grad()
    def act(self, ids: Tensor, length: Tensor, afresh: bool) -> Categorical:
        """π(·|s) of each row's present text `[N, L]`, at the price of one token a row.

        Keys and values of the tokens before are kept. `afresh` reads everything again: at the start of a rollout, since
        the weights have moved, and when a row begins a new text. (`agents.prefix.PrefixNetwork` reads that row only.)
        """
        every = torch.arange(len(ids))
        if afresh:
            ids = ids[:, : int(length.max())]
            self.seen = (torch.arange(ids.shape[1]) < length[:, None]).long()
            read = self.actor.base_model(input_ids=ids, attention_mask=self.seen, use_cache=True)
            hidden = read.last_hidden_state[every, length - 1]
        else:  # the new tokens stand in one column, behind each row's padding: their positions must be told
            self.seen = torch.cat([self.seen, torch.ones(len(ids), 1, dtype=torch.int64)], dim=1)
            read = self.actor.base_model(
                input_ids=ids[every, length - 1][:, None],
                attention_mask=self.seen,
                position_ids=length[:, None] - 1,
                past_key_values=self.cache,
                use_cache=True,
            )
            hidden = read.last_hidden_state[:, 0]
        self.cache = read.past_key_values
        return Categorical(logits=self.actor.get_output_embeddings()(hidden) / self.temperature, validate_args=False)


class Rollout(NamedTuple):
    """T steps of N rows, `[T, N]` each, and the texts that their states are prefixes of."""

    texts: Tensor
    """`[E, L]`: one row an episode, or a piece of one."""
    row: Tensor
    """Which text a state is a prefix of."""
    length: Tensor
    """How long a prefix."""
    actions: Tensor
    logprobs: Tensor
    values: Tensor
    rewards: Tensor
    """What the environment paid, with the KL charged."""
    ends: Tensor
    """1 where the episode ended with this action."""
    next_value: Tensor
    """`[N]`: V of the states after the last step, which the next rollout goes on from."""
    scores: list[float]
    """Of the episodes that ended."""
    kls: list[float]
    """Their Σ log π/π_ref."""


class Collector:
    """Steps the environment, and remembers between rollouts where each row is."""

    def __init__(self, envs: gym.vector.VectorEnv, seed: int) -> None:
        self.envs, self.task = envs, envs.unwrapped.task
        self.obs, _ = envs.reset(seed=seed)
        self.kl = np.zeros(envs.num_envs)

    @torch.no_grad()
    def collect(self, agent: Agent, steps: int) -> Rollout:
        """Let every row act `steps` times."""
        count = self.envs.num_envs
        # An observation holds all earlier ones of its episode, so one text an episode is kept: the latest.
        texts, row = list(self.obs["input_ids"]), np.arange(count)
        columns: list[list[Tensor]] = [[] for _ in range(6)]
        scores, kls, done = [], [], np.ones(count, dtype=bool)
        for _ in range(steps):
            ids, length = self.obs["input_ids"], torch.from_numpy(self.obs["attention_mask"].sum(1, dtype=np.int64))
            for env in range(count):
                texts[row[env]] = ids[env]
            law = agent.act(torch.from_numpy(ids), length, afresh=bool(done.any()))
            action = law.sample()
            logprob = law.log_prob(action)
            self.obs, reward, terminated, truncated, info = self.envs.step(action.numpy())
            # Both ends are ends: a text that is cut at its longest is scored, so nothing is owed for what would follow.
            done = terminated | truncated
            ref, score = info["ref_logprob"], info["score"]
            if done.any():  # these rows have begun anew; what they ended with is told apart
                final = info["final_info"]
                ref, score = np.where(done, final["ref_logprob"], ref), np.where(done, final["score"], score)
            # The one line of RLHF: a token pays for being likelier here than in the reference.
            kl = logprob.numpy() - ref
            reward = reward - self.task.kl_coef * kl
            step = (row, length, action, logprob, reward.astype(np.float32), done.astype(np.float32))
            for column, entry in zip(columns, step, strict=True):
                column.append(torch.as_tensor(entry).clone())
            self.kl += kl
            scores += score[done].tolist()
            kls += self.kl[done].tolist()
            self.kl[done] = 0.0
            row = np.where(done, len(texts) + np.cumsum(done) - 1, row)  # a row that ended goes on in a new text
            texts += [ids[env] for env in np.flatnonzero(done)]  # the place; the text itself comes with the next step
        length = torch.from_numpy(self.obs["attention_mask"].sum(1, dtype=np.int64))
        _, next_value = agent(torch.from_numpy(self.obs["input_ids"]), torch.arange(count), length)
        rows, lengths, actions, logprobs, rewards, ends = (torch.stack(column) for column in columns)
        # A row that ended with the last step has nothing in its new text yet.
        stacked = torch.from_numpy(np.stack(texts[: int(rows.max()) + 1]))
        _, values = agent(stacked, rows.flatten(), lengths.flatten())
        values = values.reshape(rows.shape)
        return Rollout(stacked, rows, lengths, actions, logprobs, values, rewards, ends, next_value, scores, kls)


def advantages(rollout: Rollout, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates `[T, N]` (Schulman et al. 2016), backwards in time, γ = 1."""
    found = torch.zeros_like(rollout.rewards)
    later, next_value = torch.zeros_like(rollout.next_value), rollout.next_value
    for t in reversed(range(len(found))):
        goes_on = 1.0 - rollout.ends[t]
        surprise = rollout.rewards[t] + goes_on * next_value - rollout.values[t]
        later = surprise + goes_on * gae_lambda * later
        found[t], next_value = later, rollout.values[t]
    return found


def losses(
    agent: Agent, rollout: Rollout, chosen: Tensor, advantage: Tensor, returns: Tensor, clip_eps: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss and the critic's squared error over some of the texts, one row of the model each."""
    inside = torch.isin(rollout.row, chosen)
    place = torch.zeros(len(rollout.texts), dtype=torch.int64)
    place[chosen] = torch.arange(len(chosen))
    law, value = agent(rollout.texts[chosen], place[rollout.row[inside]], rollout.length[inside])
    ratio = (law.log_prob(rollout.actions[inside]) - rollout.logprobs[inside]).exp()
    gain = advantage[inside]
    policy_loss = -torch.minimum(ratio * gain, ratio.clamp(1 - clip_eps, 1 + clip_eps) * gain).mean()
    return policy_loss, (value - returns[inside]).square().mean()


def update(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, args: Args) -> None:
    """Learn from a rollout: epochs × minibatches steps.

    Minibatches are drawn by text, not by token: shuffled tokens would touch nearly every text, and each costs a row.
    """
    advantage = advantages(rollout, args.gae_lambda)
    returns = advantage + rollout.values
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)  # after the returns: they keep their unit
    for _ in range(args.epochs):
        for chosen in torch.randperm(len(rollout.texts)).chunk(args.minibatches):
            policy_loss, value_loss = losses(agent, rollout, chosen, advantage, returns, args.clip_eps)
            optimizer.zero_grad()
            (policy_loss + args.value_coef * value_loss).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()


def train(agent: Agent, envs: gym.vector.VectorEnv, args: Args) -> list[dict[str, float]]:
    """Collect and learn, over and over; the mean score, KL and objective of each rollout's episodes."""
    torch.manual_seed(args.seed)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    collector, history = Collector(envs, args.seed), []
    for iteration in range(args.iterations):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / args.iterations)
        rollout = collector.collect(agent, args.num_steps)
        update(agent, optimizer, rollout, args)
        score, kl = float(np.mean(rollout.scores)), float(np.mean(rollout.kls))
        history.append({"score": score, "kl": kl, "objective": score - collector.task.kl_coef * kl})
        print(f"{iteration + 1:4d}  score {score:6.2f}  kl {kl:6.2f}  objective {history[-1]['objective']:6.2f}")
    return history


def main(args: Args) -> None:
    """Train the embedded storyteller, and show a text from before and after."""
    torch.set_num_threads(1)
    disable_progress_bar()
    folder = str(textenv.embedded.STORYTELLER)
    envs = gym.make_vec("RLHF-Text-v0", num_envs=args.num_envs, kl_coef=args.kl_coef)
    agent, tokenizer = Agent(folder, envs.unwrapped.task.options.temperature), AutoTokenizer.from_pretrained(folder)

    def a_text() -> str:
        torch.manual_seed(args.seed)
        text = Collector(envs, args.seed).collect(agent, envs.unwrapped.task.options.max_new_tokens).texts[0]
        return tokenizer.decode(text, skip_special_tokens=True)

    before = a_text()
    train(agent, envs, args)
    print(f"\nbefore: {before}\n\nafter:  {a_text()}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
