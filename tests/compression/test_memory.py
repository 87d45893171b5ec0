"""What compression holds does not grow with the model: measured as the process's peak."""

import sys

import pytest
import torch
from transformers import LlamaConfig

from tests.peaks import peaks_of
from transformers_meswitch.compression.sources import meta_model
from transformers_meswitch.delta_format.serialize import write_tensors

RUN = """
    import json, sys
    from benchmarks.compress.one_run import peak_bytes
    from transformers_meswitch import MESwitchConfig, compress
    base, expert, out, calibration, mapped = sys.argv[1:]
    if mapped:
        from transformers_meswitch.delta_format.tensor_files import TensorFiles

        TensorFiles.read = TensorFiles.tensor

    def run(name, **more):
        config = MESwitchConfig(bits=1, salient_channels=0)
        compress(base + name, expert + name, out + name, config, calibration or None, progress=False, **more)
        return peak_bytes()

    small = run("-small", max_calibration_tokens=512)  # what the program itself takes, libraries and all
    print(json.dumps([small, run("-large", max_calibration_tokens=512)]))
"""


def write(folder, layers, changed, tokenizer):
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=4,
        dtype="bfloat16", eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    shapes = {name: tuple(parameter.shape) for name, parameter in meta_model(config).named_parameters()}
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(changed)
    write_tensors(
        folder / "model.safetensors",
        {name: ("BF16", shape) for name, shape in shapes.items()},
        lambda name: (0.02 * torch.randn(shapes[name], generator=generator)).to(torch.bfloat16),
        {"format": "pt"},
    )
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("calibration", "mapped"), [("", ""), ("default", ""), ("", "mapped")])
def test_peak_memory_is_that_of_a_layer(tmp_path, tokenizer, calibration, mapped):
    """Unless the files are mapped, to show that the measure notices."""
    total = 0
    for name, layers in (("small", 2), ("large", 60)):
        for changed, who in enumerate(("base", "expert")):
            total += write(tmp_path / f"{who}-{name}", layers, changed, tokenizer)
    assert total > 240e6
    folders = (str(tmp_path / name) for name in ("base", "expert", "delta"))
    small, large = peaks_of(RUN, *folders, calibration, mapped)
    # A layer is 2 MB in bfloat16; the delta alone is 8 MB, a checkpoint 126 MB.
    assert (large - small < 20e6) is not bool(mapped)
