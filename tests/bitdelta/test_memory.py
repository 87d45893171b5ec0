"""An import takes the memory of a layer and of the mapped diff, not of the base: measured as the process's peak."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.compression.test_memory import write
from tests.peaks import peaks_of

RUN = """
    import json, sys
    from benchmarks.compress.one_run import peak_bytes
    from transformers_meswitch import import_bitdelta
    from transformers_meswitch.bitdelta import recipe
    folder, held = sys.argv[1:]
    if held:
        check, kept = recipe.sort_diff, []

        def keep(tensors, path, base, model):
            kept.extend(base.of(module) for module in base.modules)
            return check(tensors, path, base, model)

        recipe.sort_diff = keep

    def run(name):
        import_bitdelta(f"{folder}/base-{name}", f"{folder}/{name}.pt", f"{folder}/delta-{name}", progress=False)
        return peak_bytes()

    small = run("small")  # what the program itself takes, libraries and all
    print(json.dumps([small, run("large")]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("held", ["", "held"])
def test_peak_memory_is_not_that_of_the_base(tmp_path, held):
    """Unless its tensors are held, to show that the measure notices."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    for name, layers in (("small", 2), ("large", 60)):
        write(tmp_path / f"base-{name}", layers, 0, tokenizer)
        diff = {}
        for full, weight in load_file(tmp_path / f"base-{name}" / "model.safetensors").items():
            module = full.removesuffix(".weight")
            if module.endswith("proj"):
                out_features, in_features = weight.shape
                diff[f"{module}.mask"] = torch.randint(-(2**31), 2**31, (in_features // 32, out_features)).int()
                diff[f"{module}.coeff"] = torch.tensor(0.01)
        torch.save(diff, tmp_path / f"{name}.pt")
    small, large = peaks_of(RUN, str(tmp_path), held)
    # The diff is 8 MB, the delta as well, the base 126 MB.
    assert (large - small < 30e6) is not bool(held), (small, large)
    assert len(json.loads((tmp_path / "delta-large" / "adapter_config.json").read_text())["modules"]) == 60 * 7
