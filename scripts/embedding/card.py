"""The model card, rendered from the figures that the stages left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write card.json and MODEL_CARD.md."""
    (folder / "card.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf8")
    told = "\n\n".join("> " + text.replace("\n", "\n> ") for text in figures["samples"][:3])
    (folder / "MODEL_CARD.md").write_text(
        TEMPLATE.read_text(encoding="utf8").format(**dict(figures, samples=told)), encoding="utf8"
    )
