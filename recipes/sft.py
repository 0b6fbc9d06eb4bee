"""The command `trl-diffusion sft`, as a script for `accelerate launch`."""

from trl_diffusion.commands.sft import main


if __name__ == "__main__":
    main()
