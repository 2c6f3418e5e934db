"""Whoever presses Ctrl-C is obeyed, wherever it hits."""

import os
import signal

import pytest

from sweeps.ending import heeded, honour


@pytest.mark.parametrize(("sent", "asked"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_that_became_another_error_is_obeyed(sent, asked):
    with pytest.raises(asked), heeded():
        try:
            os.kill(os.getpid(), sent)
        finally:
            raise AttributeError("of a library's clean-up")


@pytest.mark.parametrize(("sent", "asked"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_that_was_swallowed_is_obeyed_before_work_goes_on(sent, asked):
    with heeded():
        with pytest.raises(asked):
            os.kill(os.getpid(), sent)
        with pytest.raises(asked):
            honour()


def test_an_error_alone_is_what_it_is_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="itself"), heeded():
        raise ValueError("itself")
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
