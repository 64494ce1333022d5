"""One row as text: the prompt, the response so far, and what each token cost and earned."""

from __future__ import annotations

import torch

from textenv.core import TextCore
from textenv.types import FinishReason


def render_row(core: TextCore, row: int) -> str:
    """The `ansi` picture of a row."""
    if not core.started[row]:
        return "(not started)"
    task = core.task
    prompts, responses = core.texts(torch.tensor([row], device=task.device))
    prompt, response = prompts[0], responses[0]
    reason = FinishReason(int(core.state.finish_reasons[row]))
    lines = [_text(core, prompt, response)]
    if response:
        lines += ["", *_table(core, row, response)]
    total = float(core.payments.history["reward"][row].sum())
    state = "running" if reason is FinishReason.NONE else reason.name
    score = float(core.payments.latest["score"][row])
    lines += ["", f"{len(response)} tokens · {state} · score {score:+.3f} · return {total:+.3f}"]
    return "\n".join(lines)


def _text(core: TextCore, prompt: list[int], response: list[int]) -> str:
    if core.task.tokenizer is None:
        return f"{prompt} ▸ {response}"
    prompts, responses = core.task.text_decoder([prompt], [response])
    return f"{prompts[0]} ▸{responses[0]}"


def _table(core: TextCore, row: int, response: list[int]) -> list[str]:
    tokenizer = core.task.tokenizer
    waiting = core.task.options.kl_credit == "sequence" and core.state.finish_reasons[row] == FinishReason.NONE
    ref_known = core.task.reference is not None and not waiting
    rewards, refs, logprobs = (core.payments.history[key][row].tolist() for key in ("reward", "ref_logprob", "logprob"))
    lines = [f"{'t':>3}  {'id':>6}  {'token':<14} {'log π_ref':>9} {'KL':>8} {'reward':>8}"]
    for step, token in enumerate(response):
        piece = "" if tokenizer is None else repr(tokenizer.decode([token]))[1:-1]
        ref = f"{refs[step]:.3f}" if ref_known else "?"
        kl = f"{logprobs[step] - refs[step]:+.3f}" if ref_known and core.knows_kl else "?"
        lines.append(f"{step:>3}  {token:>6}  {piece:<14.14} {ref:>9} {kl:>8} {rewards[step]:>+8.3f}")
    return lines
