"""`python -m ghn_init.training train|evaluate ...`."""

from __future__ import annotations

from ghn_init.training.commands import app

if __name__ == "__main__":
    app()()
