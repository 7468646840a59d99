"What the notebook of `core` cannot show: signals reach the main thread only"
import signal

import pytest

from fastswa.core import uninterrupted


def test_ctrl_c_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append('the rest of the block')
    assert done == ['the rest of the block']        # without protection the block would end at the signal
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_inside_is_not_hidden_by_ctrl_c():
    with pytest.raises(KeyboardInterrupt) as e:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            raise ValueError('inside')
    assert isinstance(e.value.__context__, ValueError)
