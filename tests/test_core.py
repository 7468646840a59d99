"What the notebook of `core` cannot show: signals, which only the main thread gets, shells, devices that come and go"
import signal
import weakref

import pytest
import torch

from fastswa.callbacks.basics import DeviceCB
from fastswa.core import clean_mem, uninterrupted
from fastswa.batches import to_device
from fastswa.data.loaders import collate_device
from fastswa.nets.layers import get_model


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


@pytest.mark.parametrize('cache_size', [1000, 0])      # 0: the shell keeps no outputs
def test_clean_ipython_hist_lets_go_of_what_cells_returned(cache_size, capsys):
    "Exported, the course's version looked for `get_ipython` among the module's globals and never ran"
    from IPython.core.interactiveshell import InteractiveShell
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(cache_size=cache_size)
    try:
        shell.run_cell('class Big: pass\nbig = Big()', store_history=True)
        shell.run_cell('big', store_history=True)
        ref = weakref.ref(shell.user_ns['big'])
        del shell.user_ns['big']
        assert ref() is not None                     # Out and _ hold it, and the last result
        capsys.readouterr()
        clean_mem()
        assert ref() is None and capsys.readouterr().out == ''
        assert '_i1' not in shell.user_ns and not any(shell.history_manager.input_hist_raw)
    finally: InteractiveShell.clear_instance()


def test_the_device_is_asked_for_when_it_is_needed(monkeypatch):
    "An accelerator that comes, or goes, after the import: the course's version keeps the device of the import"
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda *args: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda *args: torch.device('meta'))
    x = torch.ones(2)
    got = [to_device(x), to_device([x])[0], collate_device([x]), next(get_model().parameters()),
           torch.empty(0, device=DeviceCB().device)]
    assert {t.device.type for t in got} == {'meta'}
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda *args: False)
    assert to_device(x).device.type == DeviceCB().device == 'cpu'
