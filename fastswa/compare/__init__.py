"Which average, how long, is the difference real?"
from .runs import Comparison, compare
from .statistics import Difference, paired_difference, sampling_error

__all__ = ['Comparison', 'Difference', 'compare', 'paired_difference', 'sampling_error']
