"Every public name, for notebooks: `from fastswa.all import *`"
from fastswa.averaging import *
from fastswa.batchnorm import *
from fastswa.callbacks import *
from fastswa.core import *
from fastswa.curves import *
from fastswa.data import *
from fastswa.events import *
from fastswa.init import *
from fastswa.layers import *
from fastswa.learner import *
from fastswa.plot import *
from fastswa.progress import *
from fastswa.sched import *
from fastswa.sources import *
from fastswa.swa import *
from fastswa.weights import *
