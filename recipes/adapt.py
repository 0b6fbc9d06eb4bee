"""The command `trl-diffusion adapt`, as a script for `accelerate launch`."""

from trl_diffusion.commands.adapt import main


if __name__ == "__main__":
    main()
