"""Holding off the garbage collector: by several at once, and where it was off before."""

import gc
import os
import threading

import pytest

from weightwire import collector


def test_it_is_on_again_when_the_last_of_several_is_done() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with collector.held():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with collector.held():
        thread.start()
        inside.wait(60)
    assert not gc.isenabled()
    leave.set()
    thread.join(60)
    assert gc.isenabled()


def test_it_is_on_again_after_an_error() -> None:
    with pytest.raises(RuntimeError), collector.held():
        raise RuntimeError
    assert gc.isenabled()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_meanwhile_has_it_on() -> None:
    with collector.held():
        child = os.fork()
        if not child:
            os._exit(0 if gc.isenabled() and not collector._holders else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.isenabled()


def test_it_stays_off_where_it_was() -> None:
    gc.disable()
    try:
        with collector.held():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
