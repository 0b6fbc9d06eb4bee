"""The command `trl-diffusion iterate`, as a script."""

from trl_diffusion.commands.iterate import main


if __name__ == "__main__":
    raise SystemExit(main())
