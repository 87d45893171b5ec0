"""The documentation: its examples run and print what it says, its links resolve, and it names no machine.

In ``README.md`` and ``docs/how-to/*.md`` every ``python`` block runs, in order, a page in one namespace, unless the
comment ``<!-- not run: reason -->`` stands before it. In the how-tos so does every ``bash`` block that consists of
``meswitch`` commands. A ``text`` block that follows at once is what the block prints; ``…`` stands for anything.

``README.md`` runs in a folder that holds ``demo-family``, the how-tos in one where ``compress.md`` was followed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub_server import HubServer
from transformers_meswitch import errors
from transformers_meswitch.cli import main
from transformers_meswitch.demo.runner import FAMILY

pytestmark = pytest.mark.xdist_group("docs")

ROOT = Path(__file__).parents[1]
HOW_TO = ROOT / "docs" / "how-to"
HUB = "https://huggingface.co"

_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: [^>]+ -->\s*\Z")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_INLINE_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\[[^\]]*\]\((?P<inline>[^()\s]+)\)|^\[[^\]]+\]:\s*(?P<reference>\S+)", re.MULTILINE)
#: Absolute paths of somebody's own machine, as this file must not spell them either.
_MACHINE_PATH = re.compile(rb"(?<![\w.:/}-])/(?:root|home/\w+|Users/\w+|work|tmp/\w+|mnt/\w+|scratch)/")


@dataclass(frozen=True)
class Block:
    """A piece of code of a page, the line it starts at, and what it prints, where the page says so."""

    language: str
    code: str
    line: int
    output: str | None


def blocks_of(text: str, languages: tuple[str, ...] = ("python",)) -> Iterator[Block]:
    fences = list(_FENCE.finditer(text))
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        if fence["language"] not in languages or _NOT_RUN.search(text[: fence.start()]):
            continue
        output = None
        if following and following["language"] == "text" and not text[fence.end() : following.start()].strip():
            output = following["code"]
        yield Block(fence["language"], fence["code"], text.count("\n", 0, fence.start("code")), output)


def is_expected(printed: str, expected: str) -> bool:
    """Whether a printout is the one expected, where ``…`` stands for anything; space at line ends is ignored."""
    printed, expected = (re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip() for text in (printed, expected))
    return re.fullmatch(".*?".join(map(re.escape, expected.split("…"))), printed, re.DOTALL) is not None


def run_block(block: Block, page: str, namespace: dict[str, object]) -> None:
    if block.language == "python":
        # The blank lines let a traceback name the line of the page.
        exec(compile("\n" * block.line + block.code, page, "exec"), namespace)
        return
    for command in block.code.replace("\\\n", "").splitlines():
        assert main(shlex.split(command)[1:]) == 0, f"{page}, line {block.line + 1}: {command} failed"


def spends_a_budget(block: Block) -> bool:
    """Whether a block fits every layer eight times, which takes most of a page's time."""
    return block.language == "bash" and re.search(r"--(?:preset balanced|target-|max-kl)", block.code) is not None


def run_page(page: Path, wanted: Callable[[Block], bool] = lambda block: True) -> None:
    """Run a page's blocks in the current folder, those that are wanted."""
    languages = ("python", "bash") if page.parent == HOW_TO else ("python",)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page.read_text(encoding="utf-8"), languages):
        commands = block.code.replace("\\\n", "").splitlines()
        if block.language == "bash" and not all(command.startswith("meswitch ") for command in commands):
            continue
        if not wanted(block):
            continue
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            run_block(block, str(page), namespace)
        # Pages are written for the Hub itself.
        printed = stdout.getvalue().replace(os.environ.get("HF_ENDPOINT", HUB), HUB)
        if block.output is not None and not is_expected(printed, block.output):
            raise AssertionError(f"{page}, line {block.line}: printed\n{printed}\nexpected\n{block.output}")


@pytest.fixture(scope="session")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``compress.md`` was followed, but for budgets, of which no other page makes use."""
    folder = tmp_path_factory.mktemp("how-to")
    shutil.copytree(FAMILY, folder / "demo-family")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_page(HOW_TO / "compress.md", lambda block: not spends_a_budget(block))
    return folder


def test_compress(followed: Path) -> None:
    assert (followed / "json-delta" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_compress_with_a_budget(followed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(followed)
    run_page(HOW_TO / "compress.md", spends_a_budget)
    assert {path.name for path in followed.glob("json-*")} >= {"json-balanced", "json-kl"}


@pytest.mark.parametrize(
    "name", sorted(p.name for p in HOW_TO.glob("*.md") if p.name not in ("compress.md", "publish.md"))
)
def test_how_to(name: str, followed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "bitsandbytes.md":
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(followed)
    run_page(HOW_TO / name)


@pytest.mark.integration
def test_publish(followed: Path, tmp_path: Path) -> None:
    """Against a stand-in for the Hub, whose address huggingface_hub reads at import: in a process of its own."""
    shutil.copytree(followed, tmp_path / "folder")
    base = {file.name: file.read_bytes() for file in (FAMILY / "base").iterdir()}
    with HubServer() as hub:
        hub.add_repo("me/base", base)
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])
        run = subprocess.run(
            [sys.executable, "-c", "from tests.test_docs import HOW_TO, run_page; run_page(HOW_TO / 'publish.md')"],
            env=os.environ | hub.environment("me", str(tmp_path / "cache")) | {"PYTHONPATH": path},
            cwd=tmp_path / "folder",
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        repo = hub.repos["me/json-delta"]
        assert repo.private
        assert set(repo.branches) == {"main", "3-bit"}
        assert set(repo.pulls) == {"refs/pr/1"}
        assert repo.history("3-bit")[0].title == "Three bits"
        assert "experts/letter/adapter_config.json" in hub.repos["me/family"].history()[0].files
        assert "me/other-family" not in hub.repos


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FAMILY, tmp_path / "demo-family")
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "README.md")


def test_blocks_are_found_with_their_output_and_their_exceptions() -> None:
    page = "```python\na\n```\n\n```text\n1 …\n```\n\n<!-- not run: why -->\n\n```python\nb\n```\n```bash\nc\n```\n"
    assert list(blocks_of(page)) == [Block("python", "a\n", 1, "1 …\n")]
    assert is_expected("1 2\n3", "1 …\n")
    assert not is_expected("2 1", "1 …")
    with pytest.raises(ZeroDivisionError):
        run_block(Block("python", "1 / 0", 1, None), "page", {})


# -- links and paths -------------------------------------------------------------------------------------------------


def repository_files() -> list[Path]:
    """Files under version control and those about to be."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def prose(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return _COMMENT.sub("", _FENCE.sub("", text))


def anchors(path: Path) -> set[str]:
    """The ids that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ +(.*?)\s*$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for match in _LINK.finditer(_INLINE_CODE.sub("code", prose(page))):
        link = match["inline"] or match["reference"]
        if re.match(r"[a-z]+:|\{\{", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target) if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(f"{page}: {link}")
    return broken


def test_links_resolve() -> None:
    pages = [path for path in repository_files() if path.suffix == ".md"]
    assert ROOT / "docs" / "README.md" in pages
    assert not [link for page in pages for link in broken_links(page)]


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One & two\n[a](gone.md) [b](#one--two) [c](#three) [d](https://host/x) `[e](code.md)`\n\n[f]: no.md\n"
    )
    assert [link.rpartition(" ")[2] for link in broken_links(page)] == ["gone.md", "#three", "no.md"]


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if page != "README.md" and f"({page})" not in index]


def test_no_file_names_a_machines_own_path() -> None:
    assert _MACHINE_PATH.search(b"cd " + b"/".join([b"", b"home", b"alice", b"model"]))
    found = {}
    for path in repository_files():
        match = _MACHINE_PATH.search(path.read_bytes())
        if match:
            found[path.relative_to(ROOT).as_posix()] = match[0].decode()
    assert not found


def test_every_error_type_is_in_troubleshooting_or_says_all_itself() -> None:
    """The page has those whose message leaves a question; the rest name the argument that was wrong."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    self_explanatory = {
        "ExpertNameError",
        "ExpertNotFoundError",
        "MESwitchError",
        "UnsupportedModelError",
        "VerificationError",
    }
    assert {name for name in errors.__all__ if f"`{name}: " not in page} == self_explanatory
