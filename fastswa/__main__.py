"`python -m fastswa` is the command `fastswa`. Written by hand"
from .cli import main

if __name__ == '__main__': raise SystemExit(main())
