"What training looks like in a terminal, in a log, and in Jupyter; and that showing it costs next to nothing"
import fcntl, os, pty, re, select, signal, struct, sys, termios, time
from types import SimpleNamespace

import IPython, pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.terminal.interactiveshell import TerminalInteractiveShell
from torcheval.metrics import MeanSquaredError

from fastswa.training.events import Callback, CancelFitException
from fastswa.callbacks.progress import LogView, NotebookView, ProgressCB, TerminalView, View, find_view
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.swa import EMACB
import told_run
from helpers import forkserver, image_learner
from told_run import AveragesCB, Clock, SlowCB, learner

LIMIT = 120                                                 # seconds: only so that a process that hangs comes to an end

@pytest.fixture
def clock(): return Clock()

class Unsized:
    def __init__(self, batches): self.batches = batches
    def __iter__(self): return iter(self.batches)

def start(stdin, stdout, stderr, *args, terminal=False):
    "A run in a process of its own, with these file descriptors; what is the child's is closed here"
    fds = [told_run.Fd(fd) for fd in (stdin, stdout, stderr)]
    # a daemon: where a test fails, pytest does not wait for a run that waits
    p = forkserver().Process(target=told_run.run, args=(fds, terminal, *args), daemon=True)
    p.start()
    for fd in {stdin, stdout, stderr}: os.close(fd)
    return p

def in_terminal(epochs, interrupt_at=None, columns=0):
    """What the run writes into a terminal of so many columns, 0 where it does not know; Ctrl-C is pressed once
    `interrupt_at` has appeared, and the run waits for it"""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    p = start(slave, slave, os.open(os.devnull, os.O_WRONLY), epochs, interrupt_at is not None, terminal=True)
    seen, until = b'', time.monotonic() + LIMIT
    while time.monotonic() < until:
        if not select.select([master], [], [], 1)[0]: continue
        try: new = os.read(master, 65536)
        except OSError: break                                # the other side was closed
        if not new: break
        seen += new
        if interrupt_at and interrupt_at in seen: interrupt_at = os.write(master, b'\x03') and None
    p.join(LIMIT)
    os.close(master)
    return seen.decode(), p.exitcode

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
    for column in range(5):                           # numbers end where their header ends, words begin where it begins
        words = [list(re.finditer(r'\S+', o))[column] for o in lines]
        assert len({o.start() if column in (2, 3) else o.end() for o in words}) == 1
    for bar in '0/2 epochs, train:', '1/2 epochs, valid raw:', '1/2 epochs, valid ema:': assert bar in text
    assert re.search(r'\d+/30 .*loss \d', text)
    assert '\x1b' not in text

@pytest.mark.parametrize('columns, header', [
    (38, ['loss', 'epoch', 'train', 'weights', 'time']), (30, ['loss', 'epoch', 'train', 'weights'])])
def test_narrow_terminal(columns, header):
    "No row goes on in the next line: gaps are narrower, and the time gives way"
    text, code = in_terminal(2, columns=columns)
    lines = screen(text)
    assert code == 0 and len(lines) == 7 and max(map(len, lines)) <= columns
    assert lines[0].split() == header and all(len(o.split()) == len(header) for o in lines)

def test_metrics_give_way_before_what_a_row_is_of():
    "From the last one on, in a terminal too narrow for all of them"
    lines = []
    class Narrow(View):
        width = 45
        def row(self, p, row, new): lines.extend(new)
    cb = ProgressCB(view=Narrow)
    learner(MetricsCB(**{f'metric{i}': MeanSquaredError() for i in range(5)}), cb).fit(1)
    assert lines[0].split() == ['metric0', 'metric1', 'metric2', 'loss', 'epoch', 'train']
    assert len(cb.table.columns) == 9                       # in Jupyter and in the history they all are

def test_ctrl_c_in_a_terminal():
    text, code = in_terminal(5, interrupt_at=b'1/5 epochs, train')
    lines = screen(text)
    assert code not in (0, None) and len(lines) == 5   # the header, three rows of the first epoch, and where it stopped
    assert re.search(r'stopped by KeyboardInterrupt at 1/5 epochs, train, \d+/30 batches', lines[-1])

def piped(epochs, stderr):
    "A run that waits: its process, its stdin, and its stdout, of which the first line is read while it waits"
    (stdin, stdin_here), (stdout_here, stdout) = os.pipe(), os.pipe()
    p = start(stdin, stdout, stdout if stderr else os.open(os.devnull, os.O_WRONLY), epochs, True)
    out = open(stdout_here)
    assert select.select([out], [], [], LIMIT)[0]           # and not when a buffer is full
    return p, open(stdin_here, 'w'), out

def test_log():
    p, stdin, out = piped(2, stderr=True)
    first = out.readline()
    with stdin: stdin.write('\n')
    with out: text = first + out.read()
    p.join(LIMIT)
    assert not re.search(r'[^\x20-\x7e\n]', text)            # no control characters
    assert [re.sub(r'\d\.[\de.-]+|\d:\d\d', '#', o) for o in text.splitlines()] == [
        f'{i}/2 epochs | train loss # | raw loss # | ema loss # | #' for i in (1, 2)]

def test_interrupted_log():
    p, stdin, out = piped(5, stderr=False)
    first = out.readline()
    os.kill(p.pid, signal.SIGINT)
    with stdin, out: lines = [first, *out.read().splitlines()]
    p.join(LIMIT)
    assert p.exitcode not in (0, None)
    assert lines[0].startswith('1/5 epochs | train')
    assert lines[-1].startswith('stopped by KeyboardInterrupt at 1/5 epochs, train')

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
    "Stands for IPython's `display` and for the handle it returns; each output takes a while"
    seconds = 0.02
    def __init__(self, clock): self.clock, self.shown = clock, []
    def __call__(self, data, raw, display_id):
        self._add('new', display_id, data)
        return self
    def update(self, data, raw): self._add('update', None, data)
    def _add(self, *output):
        self.clock.now += self.seconds
        self.shown.append(output)

@pytest.fixture
def display(monkeypatch, clock):
    d = Display(clock)
    monkeypatch.setattr('IPython.display.display', d)
    return d

def test_one_output_updated_by_time(display, clock):
    learner(AveragesCB(), SlowCB(clock), ProgressCB(plot=True, view=NotebookView, clock=clock)).fit(2)
    kinds, ids, data = zip(*display.shown)
    assert kinds[0] == 'new' and set(kinds[1:]) == {'update'} and ids[0] is True
    assert clock.now > 5 and 2*(clock.now - 1) <= len(kinds) <= 2 + 6 + 2*clock.now     # start, end, rows, two a second
    assert any('1/2 epochs, valid ema, ' in o['text/plain'] for o in data)
    assert '<progress' in data[1]['text/html'] and '<progress' not in data[-1]['text/html']
    assert data[-1]['text/html'].count('<tr>') == 7 and data[-1]['text/html'].count('data:image/png;base64,') == 1
    assert len(data[-1]['text/plain'].splitlines()) == 7
    assert all(o['text/html'].find('<img') < o['text/html'].find('<table') for o in data if '<table' in o['text/html'])
    assert 'max-height' in data[-1]['text/html']

def test_many_short_epochs_are_not_an_output_each(display, clock):
    learner(SlowCB(clock, 0.001), ProgressCB(plot=True, view=NotebookView, clock=clock), n=2).fit(200)
    assert len(display.shown) < 10 and len(display.shown[-1][2]['text/plain'].splitlines()) == 401

@pytest.mark.parametrize('seconds', [0.1, 1.])
def test_what_takes_long_to_draw_is_drawn_less_often(display, clock, seconds):
    "Twice a second at most, however many rows there are. Wrong: an output for each row"
    display.seconds = seconds
    learner(SlowCB(clock), ProgressCB(view=NotebookView, clock=clock), n=2).fit(200)
    training = 200*(2 + 2)*0.05
    *live, last = (o[2]['text/html'].count('<tr>') for o in display.shown)
    assert max(live) == 1 + 20 and last == 1 + 400          # what is below a long table stays in sight
    assert 10 < len(display.shown) <= 3 + training/0.5

def test_plots_take_a_twentieth_of_the_time(display, clock, monkeypatch):
    drawn = []
    def draws(p):
        clock.now += 0.1
        drawn.append(clock.now)
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
    "Validation stands where it took place: without training or validation, in a second fit, from a late average on"
    from matplotlib.figure import Figure
    handle = SimpleNamespace(update=lambda *args, **kwargs: None)
    monkeypatch.setattr('IPython.display.display', lambda *args, **kwargs: handle)
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
    def run(code):
        seen = []
        def hook(m): seen.append((m['msg_type'], m['content']))
        kc.execute_interactive(code, output_hook=hook, timeout=LIMIT, allow_stdin=False)
        return seen
    try:
        seen = run('import told_run; told_run.script(2)')
        run('import time; from fastswa.core import progress_bar')
        bar = run('for _ in progress_bar("abc", "bar"): time.sleep(1)')
    finally:
        kc.stop_channels()
        km.shutdown_kernel(now=True)
    shown = [o for o in seen if 'display' in o[0]]
    assert [o[0] for o in shown] == ['display_data'] + ['update_display_data']*(len(shown) - 1) and len(shown) > 2
    assert len({o[1]['transient']['display_id'] for o in shown}) == 1
    assert not [o for o in seen if o[0] in ('stream', 'error')]
    # a bar that goes away leaves nothing: of one in stderr, JupyterLab keeps an empty red box
    written = [o for kind, o in bar if kind == 'stream']
    assert {o['name'] for o in written} == {'stdout'} and 'bar' in written[0]['text']
    assert not ''.join(o['text'] for o in written).split('\r')[-1].strip()

# --- what it must not do

def test_nothing_of_the_learner_is_replaced():
    class Watch(Callback):
        order = 90
        def before_batch(self, learn): self.seen = learn.dl, learn.epochs
    watch = Watch()
    learn = learner(ProgressCB(view=View), watch)
    learn.fit(2)
    assert watch.seen[0] is learn.dls.valid and learn.epochs == range(2)
    assert learn.metrics is None

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
