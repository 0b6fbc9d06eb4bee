"""The command `trl-diffusion compare`, as a script."""

from trl_diffusion.commands.compare import main


if __name__ == "__main__":
    raise SystemExit(main())
