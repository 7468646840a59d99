"Which average, how long, is the difference real?"
from .benchmark import AveragesBenchmark, bench_averages
from .comparison import Comparison
from .runs import compare
from .statistics import Difference, paired_difference, sampling_error

__all__ = ['AveragesBenchmark', 'Comparison', 'Difference', 'bench_averages', 'compare', 'paired_difference',
           'sampling_error']
