"What training looks like in a terminal, in a log, and in Jupyter; and that showing it costs next to nothing"
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import IPython, pytest, torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.terminal.interactiveshell import TerminalInteractiveShell
from torch import nn

from fastswa.averaging.average import Average
from fastswa.averaging.rules import ema
from fastswa.training.events import Callback, CancelFitException
from fastswa.training.learner import TrainLearner
from fastswa.callbacks.progress import LogView, NotebookView, ProgressCB, TerminalView, View, find_view
from fastswa.callbacks.swa import EMACB
from helpers import image_learner

class AverageCB(Callback):
    def before_fit(self, learn):
        self.average = Average(learn.model, ema(decay=0.9))
        learn.add_average('ema', self.average)
    def after_step(self, learn): self.average.update()

LIMIT = 120                                                  # seconds: only so that a process that hangs comes to an end

class Clock:
    "Seconds as `ProgressCB` sees them: 0.05 for each batch, and what drawing is said to take"
    def __init__(self): self.seconds = 0.
    def __call__(self): return self.seconds

class SlowCB(Callback):
    def __init__(self, clock): self.clock = clock
    def before_batch(self, learn): self.clock.seconds += 0.05

class WaitsCB(Callback):
    "At some batch of a training epoch, wait for Ctrl-C, or for a line on stdin"
    def __init__(self, epoch, batch, line): self.at, self.line = (epoch, batch), line
    def before_batch(self, learn):
        if not learn.training or (learn.epoch, learn.iter) != self.at: return
        if self.line: sys.stdin.readline()
        else: time.sleep(60)

class Unsized:
    def __init__(self, batches): self.batches = batches
    def __iter__(self): return iter(self.batches)

def learner(*cbs, n=30):
    torch.manual_seed(0)
    x = torch.randn(n, 8, 3)
    batches = list(zip(x, x.sum(-1, keepdim=True)))
    return TrainLearner(nn.Linear(3, 1), SimpleNamespace(train=batches, valid=batches[:10]), lr=0.02, cbs=cbs)

def script(epochs, line=False):
    "A training run for a process of its own; one of 5 epochs waits in the second"
    clock = Clock()
    learner(AverageCB(), SlowCB(clock), WaitsCB(epochs - 4, 12, line), ProgressCB(clock=clock)).fit(epochs)

def popen(epochs, line=False, **kwargs):
    code = f'import test_progress as t; t.script({epochs}, {line})'
    return subprocess.Popen([sys.executable, '-c', code], cwd=os.path.dirname(__file__), **kwargs)

def in_terminal(epochs, interrupt_at=None):
    "What the run writes into a terminal; Ctrl-C is pressed once `interrupt_at` has appeared, and the run waits for it"
    master, slave = pty.openpty()
    p = popen(epochs, interrupt_at is not None, stdin=slave, stdout=slave, stderr=subprocess.DEVNULL, start_new_session=True,
              preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))   # its own terminal: Ctrl-C reaches it, and nobody else
    os.close(slave)
    seen, until = b'', time.monotonic() + LIMIT
    while time.monotonic() < until:
        if not select.select([master], [], [], 1)[0]: continue
        try: new = os.read(master, 65536)
        except OSError: break                                # the other side was closed
        if not new: break
        seen += new
        if interrupt_at and interrupt_at in seen: interrupt_at = os.write(master, b'\x03') and None
    p.wait(LIMIT)
    os.close(master)
    return seen.decode(), p.returncode

def screen(text):
    "The lines that are to be seen in the end: `\\r` goes back to the start of a line, and what follows overwrites"
    lines = []
    for line in text.replace('\r\n', '\n').split('\n'):
        cells = []
        for part in line.split('\r'): cells[:len(part)] = part
        lines.append(''.join(cells).rstrip())
    return [o for o in lines if o]

def test_terminal():
    text, code = in_terminal(2)
    lines = screen(text)
    assert code == 0 and len(lines) == 7                     # a header and six rows: the bars are gone
    assert lines[0].split() == ['loss', 'epoch', 'train', 'weights', 'time']
    assert [o.split()[1:4] for o in lines[1:4]] == [['0', 'train', 'raw'], ['0', 'eval', 'raw'], ['0', 'eval', 'ema']]
    for column in range(5):                                  # numbers end where their header ends, words begin where it begins
        words = [list(re.finditer(r'\S+', o))[column] for o in lines]
        assert len({o.start() if column in (2, 3) else o.end() for o in words}) == 1
    for bar in '0/2 epochs, train:', '1/2 epochs, valid raw:', '1/2 epochs, valid ema:': assert bar in text
    assert re.search(r'\d+/30 .*loss \d', text)
    assert '\x1b' not in text

def test_ctrl_c_in_a_terminal():
    text, code = in_terminal(5, interrupt_at=b'1/5 epochs, train')
    lines = screen(text)
    assert code not in (0, None) and len(lines) == 5         # the header, three rows of the first epoch, and where it stopped
    assert re.search(r'stopped by KeyboardInterrupt at 1/5 epochs, train, \d+/30 batches', lines[-1])

def first_line(p):
    "What is written while the run waits, and not when a buffer is full"
    assert select.select([p.stdout], [], [], LIMIT)[0]
    return p.stdout.readline().decode()

def test_log():
    p = popen(5, line=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    first = p.stdout.readline().decode()
    assert p.poll() is None                                  # written while it waits, not when a buffer is full
    out = first + p.communicate(b'go on\n', timeout=60)[0].decode()
    assert not re.search(r'[^\x20-\x7e\n]', out)             # no control characters
    assert [re.sub(r'\d\.[\de.-]+|\d:\d\d', '#', o) for o in out.splitlines()] == [
        f'{i}/5 epochs | train loss # | raw loss # | ema loss # | #' for i in range(1, 6)]

def test_interrupted_log():
    p = popen(5, wait=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    first = first_line(p)
    p.send_signal(signal.SIGINT)
    lines = [first, *p.communicate(timeout=LIMIT)[0].decode().splitlines()]
    assert p.returncode != 0
    assert lines[0].startswith('1/5 epochs | train')
    assert re.match(r'stopped by KeyboardInterrupt at 1/5 epochs, train, \d+/30 batches', lines[-1])

# --- which view

def test_find_view(monkeypatch):
    def found(ip, tty=False):
        monkeypatch.setattr(IPython, 'get_ipython', lambda: ip)
        monkeypatch.setattr(sys, 'stdout', SimpleNamespace(isatty=lambda: tty))
        try: return find_view()
        finally: monkeypatch.undo()
    assert type(found(None)) is LogView and type(found(None, tty=True)) is TerminalView
    assert type(found(SimpleNamespace(kernel=None, mainloop=0), tty=True)) is TerminalView
    assert found(SimpleNamespace(kernel=object())).live is True
    assert found(SimpleNamespace()).live is False
    assert hasattr(TerminalInteractiveShell, 'mainloop') and not hasattr(InteractiveShell, 'mainloop')
    monkeypatch.setattr(sys, 'stdout', None)                 # as in a program without a console
    assert type(find_view()) is LogView

# --- Jupyter

class Display:
    "Stands for IPython's `display` and for the handle it returns"
    def __init__(self): self.shown, self.costs = [], lambda: None
    def __call__(self, data, raw, display_id):
        self.shown.append(('new', display_id, data))
        self.costs()
        return self
    def update(self, data, raw):
        self.shown.append(('update', None, data))
        self.costs()

@pytest.fixture
def display(monkeypatch, clock):
    d = Display(clock)
    monkeypatch.setattr('IPython.display.display', d)
    return d

def test_one_output_updated_by_time(display):
    clock = Clock()
    learner(AverageCB(), SlowCB(clock), ProgressCB(plot=True, view=NotebookView, clock=clock)).fit(2)
    assert clock.seconds == pytest.approx(5)                 # 2*(30 + 10 + 10) batches
    kinds, ids, data = zip(*display.shown)
    assert kinds[0] == 'new' and set(kinds[1:]) == {'update'} and ids[0] is True
    assert 2 + 6 <= len(kinds) <= 2 + 6 + 2*5                # start, end, rows, two a second
    assert any('1/2 epochs, valid ema, ' in o['text/plain'] for o in data)
    assert '<progress' in data[1]['text/html'] and '<progress' not in data[-1]['text/html']
    assert data[-1]['text/html'].count('<tr>') == 7 and data[-1]['text/html'].count('data:image/png;base64,') == 1
    assert len(data[-1]['text/plain'].splitlines()) == 7

@pytest.mark.parametrize('cost', [0.1, 1.])
def test_many_short_epochs_are_not_an_output_each(display, cost):
    "Drawing that takes long is done less often: in a twentieth of the time, but at least twice a second"
    clock = Clock()
    display.costs = lambda: setattr(clock, 'seconds', clock.seconds + cost)
    learner(SlowCB(clock), ProgressCB(view=NotebookView, clock=clock), n=2).fit(200)
    seconds = 200*(2 + 2)*0.05
    assert len(display.shown) <= 3 + seconds/0.5 and len(display.shown[-1][2]['text/plain'].splitlines()) == 401

def test_plots_take_a_twentieth_of_the_time(display, monkeypatch):
    clock, drawn = Clock(), []
    def draws(p):
        clock.seconds += 0.1
        drawn.append(clock.seconds)
        return b''
    monkeypatch.setattr('fastswa.callbacks.progress._png', draws)
    learner(SlowCB(clock), ProgressCB(plot=True, view=NotebookView, clock=clock)).fit(5)
    assert len(drawn) > 3
    assert min(b - a for a, b in zip(drawn[:-1], drawn[1:-1])) >= 20*0.1       # the last one is due in any case

def test_other_shells_get_one_output(display):
    learner(ProgressCB(view=lambda: NotebookView(live=False))).fit(2)
    assert [o[:2] for o in display.shown] == [('new', None)]

def test_stopped_in_jupyter(display):
    class Stop(Callback):
        def before_batch(self, learn):
            if learn.epoch: raise ZeroDivisionError('<oh>')
    with pytest.raises(ZeroDivisionError): learner(Stop(), ProgressCB(view=NotebookView)).fit(3)
    last = display.shown[-1][2]
    assert last['text/plain'].startswith('stopped by ZeroDivisionError at 1/3 epochs, train, 0/30 batches\n')
    assert 'value="0" max="30"' in last['text/html'] and last['text/html'].count('<tr>') == 3

@pytest.mark.usefixtures('strict')
def test_the_plot_of_any_fit(monkeypatch):
    "Validation stands where it took place: without training, without validation, in a second fit, from a late average on"
    from matplotlib.figure import Figure
    monkeypatch.setattr('IPython.display.display', lambda *args, **kwargs: SimpleNamespace(update=lambda *args, **kwargs: None))
    cb, axes = ProgressCB(plot=True, view=NotebookView), Figure().subplots()
    def drawn(*cbs, n=2, fits=1, **kwargs):
        axes.clear()
        learn = image_learner(cb, *cbs)
        for _ in range(fits): learn.fit(n, **kwargs)
        return {line.get_label(): list(map(int, line.get_xdata())) for line in cb.plot_losses(axes).lines}
    train = list(range(1, 15))
    assert drawn() == drawn(fits=2) == dict(training=train, validation=[7, 14])
    cb.plot = False                                              # from here on only what is drawn in the end
    assert drawn(train=False, n=3) == dict(training=[], validation=[0]*3)
    assert drawn(valid=False) == dict(training=train)
    assert drawn(EMACB(start='8ba', apply=False)) == dict(training=train, raw=[7, 14], ema=[14])
    assert drawn(EMACB(apply=False), valid='raw') == dict(training=train, validation=[7, 14])

def test_in_a_kernel():
    pytest.importorskip('ipykernel')
    from jupyter_client.manager import start_new_kernel
    km, kc = start_new_kernel(startup_timeout=LIMIT, kernel_name='python3', cwd=os.path.dirname(__file__))
    seen = []
    def hook(m): seen.append((m['msg_type'], m['content']))
    try: kc.execute_interactive('import test_progress as t; t.script(2)', output_hook=hook, timeout=LIMIT, allow_stdin=False)
    finally:
        kc.stop_channels()
        km.shutdown_kernel(now=True)
    shown = [o for o in seen if 'display' in o[0]]
    assert [o[0] for o in shown] == ['display_data'] + ['update_display_data']*(len(shown) - 1) and len(shown) > 2
    assert len({o[1]['transient']['display_id'] for o in shown}) == 1
    assert not [o for o in seen if o[0] in ('stream', 'error')]

# --- what it must not do

def test_nothing_of_the_learner_is_replaced():
    class Watch(Callback):
        order = 90
        def before_batch(self, learn): self.seen = learn.dl, learn.epochs
    watch = Watch()
    learn = learner(ProgressCB(view=View), watch)
    learn.fit(2)
    assert watch.seen[0] is learn.dls.valid and learn.epochs == range(2)
    assert not hasattr(learn, 'metrics')

def test_one_callback_serves_two_learners():
    cb = ProgressCB(view=View)
    for n in (30, 20):
        learner(cb, n=n).fit(1)
        assert len(cb.losses) == n and len(cb.table.rows) == 2

def test_loader_without_length():
    cb = ProgressCB(view=View)
    learn = learner(cb)
    learn.dls.train = Unsized(learn.dls.train)
    learn.fit(1, valid=False)
    assert (cb.total, cb.n, cb.status().split(', ')[2]) == (None, 30, '30 batches')

def test_a_row_that_ends_the_fit_is_shown():
    class Stop(Callback):
        def after_epoch(self, learn): raise CancelFitException()
    cb = ProgressCB(view=View)
    learner(cb, Stop()).fit(3)
    assert len(cb.table.rows) == 1 and cb.note == 'stopped at 0/3 epochs, after train'
