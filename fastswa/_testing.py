"The environment of the notebooks' tests, and the command `nbdev_test`. Written by hand; it is read before torch is"
import os, sys

def notebook_setup(cells):
    "What nbdev-test calls first (`test_setup` in pyproject.toml). It fills the cores with processes: one thread each"
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    os.environ.setdefault('FASTSWA_REDUCED', '1')      # `FASTSWA_REDUCED= nbdev-test` runs the experiments whole
    import fastswa.all                                 # once, for the processes are forked from this one
    if '--save' in sys.argv: return
    from matplotlib_inline.config import InlineBackend
    InlineBackend.instance().print_figure_kwargs = dict(dpi=20, bbox_inches=None)      # figures that nobody sees

# nbdev's own function and no wrapper: it reads the command line only where the script itself calls it
try: from nbdev.test import nbdev_test
except ModuleNotFoundError:
    def nbdev_test():
        "Say what to install; returns the exit status"
        print("nbdev_test: running the notebooks needs nbdev: pip install 'fastswa[dev]'", file=sys.stderr)
        return 1
