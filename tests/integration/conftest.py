"""Run programs with bnb_core in the place of bitsandbytes."""

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def run_program():
    """Run a command in a process of its own and return what it prints. It fails if the command does."""

    def run(*command):
        env = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        done = subprocess.run(list(map(str, command)), capture_output=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr.decode()[-6000:]
        return done.stdout.decode()

    return run


@pytest.fixture(scope="session")
def bnb_run(run_program):
    """Run `bnb run` with these arguments and return what it prints. The real bitsandbytes is hidden where it is installed."""
    command = (sys.executable, "-c", "from bnb_core.cli import main; main()", "run", "--force")
    return lambda *arguments: run_program(*command, *arguments)


@pytest.fixture(scope="session")
def word_tokenizer():
    """Make a tokenizer of transformers for the words "w2", "w3" and so on, as many as are wanted."""

    def make(count):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = {"<unk>": 0, "</s>": 1, **{f"w{number}": number for number in range(2, count)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")

    return make
