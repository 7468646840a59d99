"The `fastswa` command. It imports torch when a command begins, and not before"
from .entry_point import main

__all__ = ['main']
