"""The command `trl-diffusion train`, as a script for `accelerate launch`."""

from trl_diffusion.commands.train import main


if __name__ == "__main__":
    main()
