"""`python -m bitsandbytes` is `bnb doctor`."""

from bnb_core.cli.doctor import doctor

if __name__ == "__main__":
    doctor(prog_name="python -m bitsandbytes")
