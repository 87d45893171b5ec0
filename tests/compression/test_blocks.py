"""The same result however many threads there are, and threads that leave torch's own as they were."""

import pytest
import torch

from transformers_meswitch.compression import blocks
from transformers_meswitch.compression.blocks import over_blocks
from transformers_meswitch.compression.differences import Difference
from transformers_meswitch.compression.linear import compress_linear

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks of small matrices; the threads are put back whatever a test does."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(blocks, "_BLOCK", {"cpu": 512})
    yield
    torch.set_num_threads(threads)


def pair(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(50, 64, generator=generator)
    return base.to(dtype), (base + 0.002 * torch.randn(50, 64, generator=generator)).to(dtype)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_row_is_worked_on_once_and_in_order(threads):
    torch.set_num_threads(threads)
    seen = over_blocks(lambda start, stop: list(range(start, stop)), (50, 64), CPU)
    assert [row for block in seen for row in block] == list(range(50))
    assert {len(block) for block in seen[:-1]} == {8}
    assert torch.get_num_threads() == threads
    assert over_blocks(lambda start, stop: 1 / 0, (0, 64), CPU) == []


def test_each_block_has_a_single_thread_of_torch():
    torch.set_num_threads(3)
    assert set(over_blocks(lambda *_: torch.get_num_threads(), (50, 64), CPU)) == {1}
    assert torch.get_num_threads() == 3


def test_an_error_reaches_the_caller_and_threads_are_put_back():
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        over_blocks(lambda start, stop: 1 / (start - 8), (50, 64), CPU)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_number_of_threads_changes_no_bit(bits, weighted):
    moment = torch.rand(64, generator=torch.Generator().manual_seed(1)) if weighted else None
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(compress_linear(Difference(*pair()), bits, 4, moment).tensors)
    for other in found[1:]:
        assert all(torch.equal(found[0][leaf], other[leaf]) for leaf in found[0])
    changed = compress_linear(Difference(*pair()[::-1]), bits, 4, moment).tensors
    assert not torch.equal(found[0]["codes"], changed["codes"])  # another matrix would be noticed
