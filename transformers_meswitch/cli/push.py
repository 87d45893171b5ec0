"""``meswitch push``: a delta or a family onto the Hub."""

from __future__ import annotations

import argparse
import json

_EXAMPLE = """examples:
  meswitch push ./math-delta me/math-delta --private
  meswitch push ./my-family me/my-family --commit-message "Add code"
  meswitch push ./math-delta somebody/math-delta --create-pr
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "push",
        help="upload a delta or a family to the Hub",
        description="Upload a delta or family repo in one commit, with the token of `hf auth login`. The repo and the "
        "branch are made if need be. A card that is on the Hub already is merged, not overwritten; files of an "
        "earlier push that the delta no longer has are deleted.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="the delta or family repo")
    parser.add_argument("repo_id", metavar="REPO", help="Hub id: NAME, or OWNER/NAME")
    add_commit_arguments(parser)
    parser.add_argument("--private", action="store_true", default=None, help="make a new repo private")
    parser.add_argument("--commit-message", metavar="TEXT", help="first line of the commit's message")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, parser=parser)


def add_commit_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where on the Hub a commit goes."""
    parser.add_argument("--revision", metavar="BRANCH", help="branch on the Hub; default: main")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request on the Hub instead")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ..hub import push_folder

    info = push_folder(
        args.folder,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        commit_message=args.commit_message,
        create_pr=args.create_pr,
    )
    content = {"commit": info.oid, "commit_url": info.commit_url, "pr_url": info.pr_url}
    print(json.dumps(content) if args.json else info.pr_url or info.commit_url)
