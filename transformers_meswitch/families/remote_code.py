"""What lets a program that knows nothing of this package load a family: ``trust_remote_code=True`` and a stub.

transformers runs the module that ``auto_map`` names. This one imports the package, which must be installed; where it
is not, transformers says ``pip install transformers_meswitch``.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["AUTO_MAP", "STUB_NAME", "write_stub"]

STUB_NAME = "modeling_meswitch.py"
_MODULE = STUB_NAME.removesuffix(".py")
_CLASSES = {
    "AutoConfig": "MESwitchFamilyConfig",
    "AutoModel": "MESwitchModel",
    "AutoModelForCausalLM": "MESwitchModelForCausalLM",
}
#: The entry of a family's ``config.json``.
AUTO_MAP = {auto: f"{_MODULE}.{name}" for auto, name in _CLASSES.items()}


def write_stub(folder: Path) -> None:
    """Write the module into a family's folder."""
    (folder / STUB_NAME).write_text(f"from transformers_meswitch import {', '.join(_CLASSES.values())}\n")
