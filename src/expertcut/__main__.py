"""`python -m expertcut`, which is also what torchrun and accelerate start."""

from expertcut.cli import main

if __name__ == "__main__":
    main()
