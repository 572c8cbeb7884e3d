"""What is changed for a moment: by several at once, and where it was so before."""

import gc
import os
import sys
import threading

import pytest

from weightwire.interpreter import collecting_later, taking_turns


def test_it_is_on_again_when_the_last_of_several_is_done() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with collecting_later():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with collecting_later():
        thread.start()
        inside.wait(60)
    assert not gc.isenabled()
    leave.set()
    thread.join(60)
    assert gc.isenabled()


def test_it_is_on_again_after_an_error() -> None:
    with pytest.raises(RuntimeError), collecting_later():
        raise RuntimeError
    assert gc.isenabled()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_meanwhile_has_it_on() -> None:
    with collecting_later():
        child = os.fork()
        if not child:
            os._exit(0 if gc.isenabled() and not collecting_later._holders else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.isenabled()


def test_it_stays_off_where_it_was() -> None:
    gc.disable()
    try:
        with collecting_later():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_turns_are_as_long_as_before_once_the_last_is_done() -> None:
    before = sys.getswitchinterval()
    with taking_turns():
        with taking_turns():
            pass
        assert sys.getswitchinterval() < before
    assert sys.getswitchinterval() == before


def test_turns_that_are_shorter_stay_so() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.00005)
    try:
        with taking_turns():
            assert sys.getswitchinterval() < 0.0001
        assert sys.getswitchinterval() < 0.0001
    finally:
        sys.setswitchinterval(before)
