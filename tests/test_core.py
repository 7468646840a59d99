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


def test_clean_ipython_hist_lets_go_of_what_cells_returned():
    "Exported, the course's version looked for `get_ipython` among the module's globals and never ran"
    import weakref
    from IPython.core.interactiveshell import InteractiveShell
    from fastswa.core import clean_mem
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    try:
        shell.run_cell('class Big: pass\nbig = Big()', store_history=True)
        shell.run_cell('big', store_history=True)
        ref = weakref.ref(shell.user_ns['big'])
        del shell.user_ns['big']
        assert ref() is not None                     # Out and _ hold it
        clean_mem()
        assert ref() is None
        assert '_i1' not in shell.user_ns and not any(shell.history_manager.input_hist_raw)
    finally: InteractiveShell.clear_instance()
