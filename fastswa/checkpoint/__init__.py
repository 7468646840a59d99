"Save, load, export, and go on with a run as if it had never stopped"
from .archive import load_weights, read_checkpoint
from .checkpoint import CheckpointCB
from .hub import load_from_hub

__all__ = [
    'CheckpointCB', 'load_from_hub', 'load_weights', 'read_checkpoint']
