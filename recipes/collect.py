"""The command `trl-diffusion collect`, as a script for `accelerate launch`."""

from trl_diffusion.commands.collect import main


if __name__ == "__main__":
    main()
