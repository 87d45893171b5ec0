"""Write ``frozen.json``: how many test prompts each domain has, and their digest. Done once, before any training."""

from __future__ import annotations

import json
from pathlib import Path

from .sources import EIGHT, HARD, digest, hard_set, test_prompts

__all__ = ["FROZEN", "check_frozen", "current"]

FROZEN = Path(__file__).parent / "frozen.json"


def current() -> dict[str, dict[str, object]]:
    found = {domain: {"prompts": len(p), "sha256": digest(p)} for domain, p in test_prompts(EIGHT).items()}
    hard = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in hard_set()]
    return {**found, HARD.name: {"prompts": len(hard), "sha256": digest(hard)}}


def check_frozen() -> None:
    """Refuse to measure on anything but what was frozen."""
    frozen, now = json.loads(FROZEN.read_text()), current()
    changed = [name for name in frozen if frozen[name] != now.get(name)]
    if changed:
        raise SystemExit(
            f"The test prompts of {', '.join(changed)} are not those that were frozen. Install the very versions that "
            "sources.py names."
        )


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(current(), indent=2) + "\n")
