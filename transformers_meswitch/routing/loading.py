"""Reading a router of any kind."""

from __future__ import annotations

from ..delta_format.location import RepoLocation
from ..errors import RouterError
from .files import read_config
from .head import HeadRouter
from .multiple_choice import MultipleChoiceRouter

__all__ = ["ROUTER_TYPES", "Router", "load_router"]

#: Any router.
Router = HeadRouter | MultipleChoiceRouter
#: ``router_type`` in a router's config to its class.
ROUTER_TYPES: dict[str, type[HeadRouter] | type[MultipleChoiceRouter]] = {
    HeadRouter.router_type: HeadRouter,
    MultipleChoiceRouter.router_type: MultipleChoiceRouter,
}


def load_router(location: RepoLocation) -> Router:
    """The router of a repo.

    Raises:
        RouterError: there is none, it is malformed, or of a kind that this release does not know.
    """
    config, pinned = read_config(location)
    kind = config.get("router_type")
    if kind not in ROUTER_TYPES:
        raise RouterError(
            f"{location}: router_type is {kind!r}; this release knows {', '.join(map(repr, ROUTER_TYPES))}. Upgrade "
            "transformers-meswitch, or load the family without it: "
            "MESwitchModelForCausalLM.from_pretrained(family, router=False)."
        )
    return ROUTER_TYPES[kind].from_files(config, pinned)
