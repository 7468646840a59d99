"Save, load, export, and go on with a run as if it had never stopped"
from .archive import read_checkpoint
from .checkpoint import CheckpointCB
from .hub import load_from_hub
from .saving import load_weights

__all__ = [
    'CheckpointCB', 'load_from_hub', 'load_weights', 'read_checkpoint']
