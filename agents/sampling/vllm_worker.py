"""What runs inside a vLLM engine: taking weights in, and saying which arrived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from agents.sampling.sync import checksum


class WeightReceiver:
    """Methods that vLLM adds to its worker (`worker_extension_cls`) and that `collective_rpc` calls."""

    model_runner: Any

    def receive_weights(self, path: str = "", weights: Iterable[tuple[str, Tensor]] | None = None) -> dict[str, str]:
        """Load weights, and tell what was loaded.

        Args:
            path: A safetensors file of them, where the engine is in a process of its own.
            weights: By the names of the checkpoint, where it is in this process.

        Returns:
            `agents.sampling.sync.checksum` of each tensor as it went in, as decimals.

        Raises:
            RuntimeError: If a weight of the engine's model got nothing.
        """
        arrived: dict[str, str] = {}

        def passing() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in _read(path) if weights is None else weights:
                arrived[name] = str(checksum(tensor))
                yield name, tensor

        model = self.model_runner.get_model()
        wanted = {name for name, _ in model.named_parameters()}
        with _noting_loaded(model) as loaded:
            self.reload_weights(weights_iterator=passing())  # type: ignore[attr-defined]
        missing = sorted(wanted - loaded)
        if missing:
            raise RuntimeError(f"weights: expected all of the engine's model, got none of {', '.join(missing[:3])}")
        _repack_heads(model)
        return arrived


@contextmanager
def _noting_loaded(model: Any) -> Iterator[set[str]]:
    """The names of the model's own weights that it has loaded, of which vLLM itself only warns."""
    load, loaded = model.load_weights, set[str]()

    def noting(weights: Iterable[tuple[str, Tensor]]) -> Any:
        found = load(weights)
        loaded.update(found)
        return found

    model.load_weights = noting
    try:
        yield loaded
    finally:
        del model.load_weights


def _read(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping, it only has this method
            yield name, file.get_tensor(name)


def _repack_heads(model: torch.nn.Module) -> None:
    """On a CPU a tied head multiplies by a packed copy of its weight, which a reload leaves as it was."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm  # pyright: ignore[reportMissingImports]

    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
