"""The command `trl-diffusion evaluate`, as a script for `accelerate launch`."""

from trl_diffusion.commands.evaluate import main


if __name__ == "__main__":
    main()
