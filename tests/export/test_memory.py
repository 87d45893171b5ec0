"""Writing a merged checkpoint takes the memory of a layer, not of a model: measured as the process's peak."""

import sys

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.compression.test_memory import write
from tests.peaks import peaks_of
from transformers_meswitch import MESwitchConfig, compress

RUN = """
    import json, sys
    from benchmarks.compress.one_run import peak_bytes
    from transformers_meswitch import merge_checkpoint
    from transformers_meswitch.export import merged_checkpoint
    folder, held = sys.argv[1:]
    if held:
        write = merged_checkpoint.write_tensors
        kept = []

        def keep(path, headers, get, metadata):
            tensors = {name: get(name) for name in headers}
            kept.append(tensors)
            write(path, headers, tensors.__getitem__, metadata)

        merged_checkpoint.write_tensors = keep

    def run(name):
        merge_checkpoint(f"{folder}/delta-{name}", f"{folder}/out-{name}", progress=False)
        return peak_bytes()

    small = run("small")  # what the program itself takes, libraries and all
    print(json.dumps([small, run("large")]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("held", ["", "held"])
def test_peak_memory_is_that_of_a_layer(tmp_path, held):
    """Unless all tensors are held, to show that the measure notices."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    for name, layers in (("small", 2), ("large", 60)):
        for changed, who in enumerate(("base", "expert")):
            write(tmp_path / f"{who}-{name}", layers, changed, tokenizer)
        config = MESwitchConfig(bits=1, salient_channels=0)
        pair = (tmp_path / f"{who}-{name}" for who in ("base", "expert"))
        compress(*pair, tmp_path / f"delta-{name}", config, calibration=None, progress=False)
    small, large = peaks_of(RUN, str(tmp_path), held)
    # A layer is 2 MB in bfloat16, a checkpoint 126 MB.
    assert (large - small < 20e6) is not bool(held)
    assert len(load_file(tmp_path / "out-large" / "model.safetensors")) == 60 * 9 + 2
