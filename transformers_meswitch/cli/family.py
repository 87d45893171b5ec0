"""``meswitch family``: make a family, add and remove experts, list them; in a folder or on the Hub."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .push import add_commit_arguments

if TYPE_CHECKING:
    from ..configuration import MESwitchFamilyConfig
    from ..delta_format.location import RepoLocation
    from ..families.edit import Change

_EXAMPLE = """examples:
  meswitch family create me/base math=me/math-delta code=./code-delta -o my-family
  meswitch family create me/base math=me/math-delta@v2 --repo-id me/my-family --private
  meswitch family add me/my-family letter=./letter-delta --create-pr
  meswitch family remove ./my-family code
  meswitch family list me/my-family
"""
_EXPERTS = "a delta by the name that it gets: NAME=FOLDER, NAME=ID or NAME=ID@REVISION"
_FAMILY = "the family repo: a folder or a Hub id"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its four actions."""
    parser = subparsers.add_parser(
        "family",
        help="make a family, add and remove experts, list them",
        description="Make or edit a family repo, in a folder or on the Hub, without loading a model. Deltas on the "
        "Hub are named by id and commit, deltas from folders are copied into the family.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a family of a base and deltas", allow_abbrev=False)
    create.add_argument("base", metavar="BASE", help="the base: a folder or a Hub id")
    create.add_argument("experts", nargs="*", metavar="NAME=DELTA", help=_EXPERTS)
    target = create.add_mutually_exclusive_group(required=True)
    target.add_argument("-o", "--output", metavar="DIR", help="folder that the family gets")
    target.add_argument("--repo-id", metavar="REPO", help="Hub id that the family gets, instead of a folder")
    create.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of the base")
    create.add_argument("--private", action="store_true", default=None, help="make a new repo on the Hub private")
    add = actions.add_parser("add", help="add experts to a family", allow_abbrev=False)
    add.add_argument("family", metavar="FAMILY", help=_FAMILY)
    add.add_argument("experts", nargs="+", metavar="NAME=DELTA", help=_EXPERTS)
    remove = actions.add_parser("remove", help="remove experts from a family", allow_abbrev=False)
    remove.add_argument("family", metavar="FAMILY", help=_FAMILY)
    remove.add_argument("experts", nargs="+", metavar="NAME", help="an expert of the family")
    listing = actions.add_parser("list", help="show a family's base and experts", allow_abbrev=False)
    listing.add_argument("family", metavar="FAMILY", help=_FAMILY)
    listing.add_argument("--revision", metavar="REV", help="branch, tag or commit of the family repo")
    for action, run in ((create, _create), (add, _add), (remove, _remove), (listing, _list)):
        if action is not listing:
            add_commit_arguments(action)
        action.add_argument("--json", action="store_true", help="print one JSON object")
        action.set_defaults(run=run, parser=action)


def _create(args: argparse.Namespace) -> None:
    from ..delta_format.location import RepoLocation
    from ..errors import CheckpointError
    from ..families.edit import create_family, create_family_on_hub
    from ..families.experts import parse_assignments

    base = RepoLocation(args.base, args.base_revision, error=CheckpointError)
    experts = parse_assignments(args.experts)
    if args.output is None:
        change = create_family_on_hub(
            base, experts, args.repo_id, private=args.private, revision=args.revision, create_pr=args.create_pr
        )
    else:
        _refuse_hub_arguments(args, args.private)
        change = create_family(base, experts, Path(args.output))
    _print(change, as_json=args.json)


def _add(args: argparse.Namespace) -> None:
    from ..families.edit import add_experts
    from ..families.experts import parse_assignments

    family = _family(args)
    _print(add_experts(family, parse_assignments(args.experts), create_pr=args.create_pr), as_json=args.json)


def _remove(args: argparse.Namespace) -> None:
    from ..families.edit import remove_experts

    _print(remove_experts(_family(args), args.experts, create_pr=args.create_pr), as_json=args.json)


def _list(args: argparse.Namespace) -> None:
    from ..families.reading import read_family

    location, config = read_family(_location(args.family, args.revision))
    if args.json:
        print(json.dumps({"family": location.repo, "revision": location.revision, **_content(config)}))
        return
    rows = [("expert", "delta", "revision"), *_rows(config)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    rows.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2]))
    base = f"base {config.base_model_name_or_path}, revision {config.base_revision or '—'}"
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    default = config.default_expert or "the base"
    print("\n".join([base, "", *lines, "", f"answers by default: {default}"]))


def _rows(config: MESwitchFamilyConfig) -> list[tuple[str, str, str]]:
    rows = []
    for name, reference in (config.experts or {}).items():
        where = "/".join(filter(None, (reference["repo"], reference.get("subfolder"))))
        rows.append((name, where, reference.get("revision") or "—"))
    return rows


def _content(config: MESwitchFamilyConfig) -> dict[str, object]:
    base = {"base": config.base_model_name_or_path, "base_revision": config.base_revision}
    return {**base, "experts": config.experts, "default_expert": config.default_expert}


def _print(change: Change, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"where": change.where, **_content(change.config)}))
    else:
        print(f"{change.where}: {', '.join(change.config.experts or {}) or 'no expert'}")


def _family(args: argparse.Namespace) -> RepoLocation:
    if os.path.isdir(args.family):
        _refuse_hub_arguments(args)
    return _location(args.family, args.revision)


def _location(family: str, revision: str | None) -> RepoLocation:
    from ..delta_format.location import RepoLocation
    from ..errors import CheckpointError

    return RepoLocation(family, revision, error=CheckpointError)


def _refuse_hub_arguments(args: argparse.Namespace, private: bool | None = None) -> None:
    given = {"--revision": args.revision, "--create-pr": args.create_pr, "--private": private}
    for name in (name for name, value in given.items() if value):
        args.parser.error(f"argument {name}: it is of a repo on the Hub, and the family is in a folder")
