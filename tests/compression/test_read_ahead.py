"""Reading ahead gives what reading gives, and only reads earlier."""

import threading

import pytest
import torch

from transformers_meswitch.compression.read_ahead import ReadAhead


class Recorded:
    """Parameters that note what is read, and where."""

    tied, modules = False, ("a", "b", "c")

    def __init__(self):
        self.read = []

    def shapes(self, module):
        return {"weight": (1,)}

    def of(self, module):
        self.read.append((module, threading.current_thread() is threading.main_thread()))
        if module == "c":
            raise OSError("gone")
        return {"weight": torch.tensor([float(ord(module))])}

    def announce(self, module):
        raise AssertionError("reading says it all")


def test_what_is_announced_is_read_once_and_in_a_thread():
    parameters = Recorded()
    with ReadAhead(parameters) as ahead:
        assert (ahead.tied, ahead.modules, ahead.shapes("a")) == (False, ("a", "b", "c"), {"weight": (1,)})
        assert ahead.of("a")["weight"].item() == ord("a")
        ahead.announce("b")
        assert ahead.of("b")["weight"].item() == ord("b")
    assert parameters.read == [("a", True), ("b", False)]


def test_another_module_than_the_one_announced_is_read_all_the_same():
    with ReadAhead(Recorded()) as ahead:
        ahead.announce("b")
        assert ahead.of("a")["weight"].item() == ord("a")
        assert ahead.of("b")["weight"].item() == ord("b")


def test_a_failure_is_raised_where_the_module_is_asked_for():
    with ReadAhead(Recorded()) as ahead:
        ahead.announce("c")
        with pytest.raises(OSError, match="gone"):
            ahead.of("c")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
