"""`accelerate launch`, which takes what is left out from its defaults and does not list it."""

from __future__ import annotations

from accelerate.commands.launch import main


if __name__ == "__main__":
    main()
