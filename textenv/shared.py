"""A handle by which a live model is passed to an environment without being copied."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Shared:
    """A handle around a live module (or any callable) that stays one object wherever it is copied to.

    Gymnasium deep-copies an environment's arguments, so a live policy handed over bare would silently become a frozen
    copy. A deep copy of a `Shared` is the `Shared` itself.
    """

    def __init__(
        self, module: Callable[..., Any], within: Callable[[], AbstractContextManager[Any]] | None = None
    ) -> None:
        """Wrap `module`.

        Args:
            module: A module or another callable.
            within: Makes a context manager that every forward through the handle runs inside, such as the
                `disable_adapter` of a LoRA model, by which one copy of the weights is both policy and reference.
        """
        self.module = module
        self.within = within

    def scope(self) -> AbstractContextManager[Any]:
        """The context to run a forward of `module` inside; does nothing without `within`."""
        return nullcontext() if self.within is None else self.within()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, inside `within`."""
        with self.scope():
            return self.module(*args, **kwargs)

    def __copy__(self) -> Shared:
        """Return the handle itself."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """Return the handle itself."""
        return self

    def __repr__(self) -> str:
        """Name the class of what is shared."""
        return f"Shared({type(self.module).__name__})"
