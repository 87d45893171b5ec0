"""An expert as a plain checkpoint: the very tensors of the merged model, for programs without this package."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.fixtures_models import TinyFamily
from tests.hub_server import HubServer
from transformers_meswitch import MESwitchModelForCausalLM, merge_checkpoint
from transformers_meswitch.cli import main
from transformers_meswitch.demo.runner import FAMILY
from transformers_meswitch.errors import MESwitchError
from transformers_meswitch.export import merged_checkpoint
from transformers_meswitch.export.inputs import split_expert

IDS = torch.tensor([[5, 40, 90, 3, 100, 61]])


def merged_model(base, delta, **kwargs):
    model = MESwitchModelForCausalLM.from_pretrained(base, experts={"it": str(delta)}, **kwargs)
    return model.merge_and_unload(adapter_names=["it"])


def same_tensors(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


@pytest.mark.parametrize("fixture", ["tiny_family", "untied_family"])
@pytest.mark.parametrize("name", ["math", "code"])
def test_it_is_the_merged_model_to_the_bit(fixture, name, request, tmp_path):
    family: TinyFamily = request.getfixturevalue(fixture)
    delta = family.deltas[name]
    found = merge_checkpoint(delta, tmp_path / "out", base=family.base, progress=False)
    plain, twin = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), merged_model(family.base, delta)
    assert same_tensors(plain, twin)
    assert torch.equal(plain(IDS).logits, twin(IDS).logits)
    other = merged_model(family.base, family.deltas["code" if name == "math" else "math"])
    assert not same_tensors(plain, other), "any expert would do"

    assert plain.config.to_dict() | {"_name_or_path": ""} == twin.config.to_dict() | {"_name_or_path": ""}
    assert plain.generation_config.eos_token_id == twin.generation_config.eos_token_id
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert tied == (fixture == "tiny_family")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
        assert len(file.keys()) == found.tensors
        assert file.metadata() == {"format": "pt"}
    assert found.total_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    theirs = AutoTokenizer.from_pretrained(delta)
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (ours.get_vocab(), ours.chat_template) == (theirs.get_vocab(), theirs.chat_template)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_another_dtype_sums_are_rounded_once(dtype, tiny_family, tmp_path):
    delta = tiny_family.deltas["math"]
    merge_checkpoint(delta, tmp_path / "out", base=tiny_family.base, dtype=dtype, progress=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert plain.dtype == dtype
    assert same_tensors(plain, merged_model(tiny_family.base, delta).to(dtype))
    twice = merged_model(tiny_family.base, delta, dtype=dtype)
    assert not same_tensors(plain, twice), "of this base, rounding twice gives other numbers"


def test_shards_hold_each_tensor_once_and_are_no_larger_than_asked(tiny_family, tmp_path):
    limit = 40_000
    found = merge_checkpoint(
        tiny_family.deltas["code"], tmp_path / "out", base=tiny_family.base, max_shard_size=limit, progress=False
    )
    assert len(found.files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: load_file(tmp_path / "out" / name) for name in found.files}
    assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors}
    total = 0
    for tensors in held.values():
        bytes_held = sum(tensor.nbytes for tensor in tensors.values())
        total += bytes_held
        assert bytes_held <= limit or len(tensors) == 1
    assert index["metadata"]["total_size"] == total
    twin = merged_model(tiny_family.base, tiny_family.deltas["code"])
    assert same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), twin)


def test_an_expert_of_a_family_on_the_familys_own_base(tmp_path):
    merge_checkpoint(FAMILY, tmp_path / "out", "json", progress=False)
    family = AutoModelForCausalLM.from_pretrained(FAMILY)
    assert same_tensors(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"), family.merge_and_unload(adapter_names=["json"])
    )
    # The delta of the family finds its base by itself, too: its path is relative to where the delta is.
    merge_checkpoint(FAMILY / "experts" / "json", tmp_path / "alone", progress=False)
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "alone")]
    assert same[0] == same[1]


def test_an_expert_that_is_untied_from_a_tied_base(tmp_path):
    """The base stores one matrix for both; the expert's head gets a name of its own."""
    from tests.models.architectures import build, fine_tune
    from transformers_meswitch import MESwitchConfig, compress

    base, expert, delta = (tmp_path / name for name in ("base", "expert", "delta"))
    build("llama", True).save_pretrained(base)
    fine_tune(base, seed=1, tied=False).save_pretrained(expert)
    compress(base, expert, delta, MESwitchConfig(bits=2, salient_channels=3), calibration=None, progress=False)
    merge_checkpoint(delta, tmp_path / "out", base=base, progress=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.get_output_embeddings().weight is not plain.get_input_embeddings().weight
    assert same_tensors(plain, merged_model(base, delta))


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "gpt_neox", "phi3", "qwen3"])
def test_other_architectures(model_type, tmp_path):
    from tests.models.architectures import build, fine_tune
    from transformers_meswitch import MESwitchConfig, compress

    base, expert, delta = (tmp_path / name for name in ("base", "expert", "delta"))
    build(model_type, model_type != "gpt_neox").save_pretrained(base)
    fine_tune(base, seed=1).save_pretrained(expert)
    compress(base, expert, delta, MESwitchConfig(bits=2, salient_channels=3), calibration=None, progress=False)
    merge_checkpoint(delta, tmp_path / "out", base=base, progress=False)
    assert same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), merged_model(base, delta))


def gemma4(layer_scalar):
    from transformers import Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, global_head_dim=16, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=64, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(layer_scalar)
    return model


def test_buffers_that_a_checkpoint_holds_come_along(tmp_path):
    """Gemma 4 scales the output of its layers by numbers that are no parameters."""
    from transformers_meswitch import MESwitchConfig, compress

    base, expert, delta = (tmp_path / name for name in ("base", "expert", "delta"))
    gemma4(0.37).save_pretrained(base)
    model = gemma4(0.37)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1 * torch.randn(64, 32)
    model.save_pretrained(expert)
    compress(base, expert, delta, MESwitchConfig(bits=2, salient_channels=3), calibration=None, progress=False)
    merge_checkpoint(delta, tmp_path / "out", base=base, progress=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    scalars = [buffer for name, buffer in plain.named_buffers() if name.endswith("layer_scalar")]
    assert [float(scalar) for scalar in scalars] == [pytest.approx(0.37)] * 2
    assert same_tensors(plain, merged_model(base, delta))

    edited(expert, lambda tensors: next(t for key, t in tensors.items() if key.endswith("layer_scalar")).fill_(2))
    with pytest.raises(MESwitchError, match="layer_scalar that is no parameter"):
        compress(base, expert, tmp_path / "other", MESwitchConfig(bits=2), calibration=None, progress=False)


@pytest.mark.parametrize("expert_tied", [True, False])
def test_a_tied_base_that_is_stored_as_its_head(expert_tied, tmp_path):
    from tests.models.architectures import build, fine_tune
    from transformers_meswitch import MESwitchConfig, compress

    base, expert, delta = (tmp_path / name for name in ("base", "expert", "delta"))
    build("llama", True).save_pretrained(base)
    fine_tune(base, seed=1, tied=expert_tied).save_pretrained(expert)
    edited(base, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    compress(base, expert, delta, MESwitchConfig(bits=2, salient_channels=3), calibration=None, progress=False)
    merge_checkpoint(delta, tmp_path / "out", base=base, progress=False)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert same_tensors(plain, merged_model(base, delta))


def test_a_delta_with_a_chat_template_alone_gets_its_bases_tokenizer(tiny_family, tmp_path):
    delta = Path(shutil.copytree(tiny_family.deltas["math"], tmp_path / "delta"))
    for path in delta.glob("tokenizer*"):
        path.unlink()
    (delta / "chat_template.jinja").write_text("{{ messages }}")
    merge_checkpoint(delta, tmp_path / "out", base=tiny_family.base, progress=False)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tiny_family.base)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == "{{ messages }}"


def test_the_code_that_a_base_names_is_not_asked_for(tiny_family, tmp_path):
    base = Path(shutil.copytree(tiny_family.base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text()) | {"auto_map": {"AutoConfig": "configuration_x.X"}}
    (base / "config.json").write_text(json.dumps(config))
    merge_checkpoint(tiny_family.deltas["math"], tmp_path / "out", base=base, progress=False)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_without_a_generation_config_the_bases_ends_where_the_expert_does(tiny_family, tmp_path):
    delta = Path(shutil.copytree(tiny_family.deltas["code"], tmp_path / "delta"))
    (delta / "generation_config.json").unlink()
    merge_checkpoint(delta, tmp_path / "out", base=tiny_family.base, progress=False)
    stated = json.loads((delta / "adapter_config.json").read_text())["eos_token_id"]
    assert [GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id] == stated


def test_a_program_without_this_package_reads_it(tiny_family, tmp_path):
    merge_checkpoint(tiny_family.deltas["code"], tmp_path / "out", base=tiny_family.base, progress=False)
    torch.save(merged_model(tiny_family.base, tiny_family.deltas["code"])(IDS).logits, tmp_path / "logits.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "sys.modules['transformers_meswitch'] = None\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/out')\n"
        "assert AutoTokenizer.from_pretrained(sys.argv[1] + '/out').chat_template\n"
        f"logits = model(torch.tensor({IDS.tolist()})).logits\n"
        "assert torch.equal(logits, torch.load(sys.argv[1] + '/logits.pt')), 'other logits'\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.integration
def test_a_family_on_the_hub(tmp_path):
    code = (
        "import sys\n"
        "from transformers_meswitch.cli import main\n"
        "for more, name in ((['--subfolder', 'experts/json'], ''), ([], ':json')):\n"
        "    output = sys.argv[1] + ('' if name else '-alone')\n"
        "    assert not main(['merge', 'alice/family' + name, '-o', output, '--json', *more])\n"
    )
    with HubServer() as hub:
        files = [path for path in FAMILY.rglob("*") if path.is_file()]
        hub.add_repo("alice/family", {path.relative_to(FAMILY).as_posix(): path.read_bytes() for path in files})
        process = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "out")],
            env=os.environ | hub.environment("alice", str(tmp_path / "home")),
            capture_output=True,
            text=True,
        )
    assert process.returncode == 0, process.stderr
    for line in process.stdout.splitlines():
        assert json.loads(line)["base"].startswith("alice/family/base (revision ")
    merge_checkpoint(FAMILY, tmp_path / "local", "json", progress=False)
    alone, out, local = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("out-alone", "out", "local")
    )
    assert alone == out == local
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# The expert `json`, restored from its delta" in card
    assert "[alice/family](https://huggingface.co/alice/family), `experts/json`," in card


def edited(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def another_base(family, tmp_path):
    base = Path(shutil.copytree(family.base, tmp_path / "base"))
    edited(base, lambda tensors: tensors["model.norm.weight"].add_(1))
    return {"source": family.deltas["math"], "base": base}


def quantised_base(family, tmp_path):
    base = Path(shutil.copytree(family.base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (base / "config.json").write_text(json.dumps(config))
    return {"source": family.deltas["math"], "base": base}


def damaged_delta(family, tmp_path):
    delta = Path(shutil.copytree(family.deltas["math"], tmp_path / "delta"))
    path = delta / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return {"source": delta, "base": family.base}


def delta_without_base(family, tmp_path):
    delta = Path(shutil.copytree(family.deltas["math"], tmp_path / "delta"))
    config = json.loads((delta / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (delta / "adapter_config.json").write_text(json.dumps(config))
    return {"source": delta}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (another_base, "another base than .*'model.norm.weight'"),
        (quantised_base, "quantised checkpoint"),
        (damaged_delta, "adapter_model.safetensors"),
        (delta_without_base, "base_model_name_or_path is None, expected"),
        (lambda family, _: {"source": family.base, "base": family.base}, "no adapter_config.json"),
        (lambda family, _: {"source": family.base, "expert": "math"}, "is a plain model .*'llama'"),
        (lambda family, _: {"source": FAMILY, "expert": "poetry"}, "no expert 'poetry'. It has: 'json', "),
        (lambda family, _: {"source": family.deltas["math"], "max_shard_size": "much"}, "max_shard_size is 'much'"),
        (lambda family, _: {"source": family.deltas["math"], "max_shard_size": 0}, "max_shard_size is 0"),
        (lambda family, _: {"source": FAMILY}, "is a family; name one of its experts, json, letter, redact"),
        (lambda family, _: {"source": family.deltas["math"], "dtype": torch.int8}, "dtype is torch.int8, expected"),
    ],
)
def test_bad_input_leaves_nothing(arguments, message, tiny_family, tmp_path):
    given = {"output_dir": tmp_path / "new" / "out", **arguments(tiny_family, tmp_path)}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((MESwitchError, ValueError), match=message):
        merge_checkpoint(**given, progress=False)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_there_is_not_overwritten(what, tiny_family, tmp_path):
    output = tmp_path / "out"
    if what == "folder":
        output.mkdir()
        (output / "mine.txt").write_text("mine")
    else:
        output.write_text("mine")
    with pytest.raises(MESwitchError, match="exists and is not an empty folder"):
        merge_checkpoint(tiny_family.deltas["math"], output, base=tiny_family.base, progress=False)
    assert (output / "mine.txt" if what == "folder" else output).read_text() == "mine"


@pytest.mark.parametrize("how", ["there", "here", "link"])
def test_an_empty_folder_is_taken(how, tiny_family, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    output = folder
    if how == "here":
        monkeypatch.chdir(folder)
        output = Path(".")
    elif how == "link":
        output = tmp_path / "link"
        output.symlink_to(folder, target_is_directory=True)
    inode = folder.stat().st_ino
    merge_checkpoint(tiny_family.deltas["math"], output, base=tiny_family.base, progress=False)
    assert folder.stat().st_ino == inode, "a mounted disk cannot be replaced"
    assert (output / "model.safetensors").is_file()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_disk_without_room_is_told_before_anything_is_written(tiny_family, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(MESwitchError, match=r"has 1,000 left"):
        merge_checkpoint(tiny_family.deltas["math"], tmp_path / "out", base=tiny_family.base, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_run_leaves_nothing(error, there, tiny_family, tmp_path, monkeypatch):
    output = tmp_path / "new" / "parents" / "out"
    if there:
        output.mkdir(parents=True)
    written = []
    write = merged_checkpoint.write_tensors

    def fail(path, *args):
        if written:
            raise error
        written.append(path)
        write(path, *args)

    monkeypatch.setattr(merged_checkpoint, "write_tensors", fail)
    with pytest.raises(type(error)):
        merge_checkpoint(
            tiny_family.deltas["math"], output, base=tiny_family.base, max_shard_size=40_000, progress=False
        )
    assert written
    assert list(tmp_path.iterdir()) == [tmp_path / "new"] * there
    assert not there or not list(output.iterdir())


def test_command(tiny_family, tmp_path, capsys):
    arguments = ["merge", str(tiny_family.deltas["math"]), "-o", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main([*arguments, "--base", str(tiny_family.base), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["files"], found["dtype"]) == (["model.safetensors"], ["BF16"])
    assert found["total_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert main(["merge", f"{FAMILY}:json", "-o", str(tmp_path / "family"), "--max-shard-size", "1MB"]) == 0
    output = capsys.readouterr().out
    assert "38 tensors (BF16)" in output
    assert "in 2 files" in output
    assert main(["merge", f"{FAMILY}:json", "-o", str(tmp_path / "family")]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_a_folder_with_a_colon_is_a_folder(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert split_expert(str(tmp_path / "a:b")) == (str(tmp_path / "a:b"), None)
    assert split_expert(str(tmp_path / "a:c")) == (str(tmp_path / "a"), "c")
    assert split_expert("C:\\deltas\\math") == ("C:\\deltas\\math", None)
