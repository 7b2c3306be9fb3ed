"""What the command line promises, asked of the whole program."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from qtool.cli.app import main

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [
    "synthesize images",
    "synthesize moire",
    "train demoire",
    "quantize",
    "switch-bits",
    "demoire",
    "eval",
    "models",
    "info",
]
KEYS = ["schema", "command", "status", "items", "summary"]


@dataclass
class Ran:
    """What one run left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def qtool(capfd, monkeypatch, tmp_path):
    """Run `qtool WORDS...` in an empty folder, with nothing cached and no network."""
    for name in ("QTOOL_DEVICE", "QTOOL_BACKEND", "QTOOL_THREADS", "QTOOL_DEBUG", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QTOOL_OFFLINE", "1")
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Ran:
        capfd.readouterr()
        code = main(words)
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def pictures(tmp_path):
    """A labelled folder with three good pictures and one that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (64, 64), (80 * index, 40, 120)).save(folder / f"{index}.png")
    (folder / "3.png").write_text("not a picture")
    rows = "".join(f"{index}.png,0\n" for index in range(4))
    (folder / "labels.csv").write_text("file,label\n" + rows)
    return folder


def assert_two_lines(ran: Ran) -> None:
    talk = [line for line in ran.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert talk[0].startswith("error: ")
    assert len(talk) == 2
    assert "Traceback" not in ran.err
    assert ran.out == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_is_one_json_object(qtool, command):
    ran = qtool(*command.split(), "--no-such-flag", "--json")
    assert ran.code == 2
    assert list(ran.json) == KEYS
    assert ran.json["command"] == command
    assert ran.json["summary"]["exit_code"] == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("quantize vit_bb --data-free", "vit_b"),
        ("synthesize images vit_bb -o d", "vit_b"),
        ("eval vit_bb --count 2", "vit_b"),
        ("quantize demo_vit --data-free --bits w9a9", "w9a9"),
        ("quantize demo_vit --data-free --bits w4a16", "w4a16"),
        ("quantize demo_vit --calib nowhere", "nowhere"),
        ("quantize demo_vit --synthetic nowhere", "nowhere"),
        ("eval demo_vit --data nowhere", "nowhere"),
        ("quantize demo_vit", "--data-free"),
        ("quantize demo_vit --engine branches --train d", "--bits any"),
        ("quantize demo_vit --bits any --engine branches", "--train DIR"),
        ("quantize demo_vit --bits any --engine branches --data-free", "--data-free"),
        ("quantize demo_vit --data-free --epochs 3", "--epochs"),
        ("quantize resnet8 --bits any --engine branches --train nowhere", "nowhere"),
        ("quantize bandgate", "--data-free"),
        ("quantize bandgate --data-free --bits any:2-8", "any:2-8"),
        ("quantize bandgate --data-free --bits mixed:4", "mixed:4"),
        ("quantize bandgate --synthetic pictures", "--synthetic"),
        ("synthesize moire -o d", "--simulate"),
        ("synthesize moire --moire nowhere --clean nowhere -o d", "nowhere"),
        ("train demoire nowhere --init none -o w.safetensors", "nowhere"),
        ("train demoire -o w.safetensors", "--moire"),
        ("demoire nowhere -o out", "nowhere"),
        ("demoire -o out", "no photographs"),
        ("demoire . -o out --tile 8", "--tile"),
        ("demoire . -o out --max-memory much", "--max-memory"),
    ],
)
def test_wrong_requests_exit_2(qtool, line, said):
    ran = qtool(*line.split())
    assert ran.code == 2
    assert said in ran.err
    assert_two_lines(ran)
    again = qtool(*line.split(), "--json")
    assert again.code == 2
    assert list(again.json) == KEYS


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 4, b"\xff" * 64, (200).to_bytes(8, "little") + b'{"__metadata__":{"qtool.'],
    ids=["empty", "no length", "endless header", "truncated header"],
)
@pytest.mark.parametrize("command", ["info", "eval"])
def test_damaged_checkpoints_exit_1(qtool, tmp_path, command, content):
    (tmp_path / "damaged-w4a4.safetensors").write_bytes(content)
    ran = qtool(command, "damaged-w4a4.safetensors")
    assert ran.code == 1
    assert "damaged-w4a4.safetensors" in ran.err
    assert ran.out == ""


def test_a_picture_that_is_none_exits_3_and_the_rest_counts(qtool, pictures):
    ran = qtool("eval", "demo_vit", "--data", str(pictures), "--device", "cpu", "--json")
    assert ran.code == 3
    assert ran.json["status"] == "partial"
    failed = [item for item in ran.json["items"] if item.get("status") == "failed"]
    assert [Path(item["path"]).name for item in failed] == ["3.png"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write")
def test_no_permission_exits_1_before_work_starts(qtool):
    ran = qtool("quantize", "demo_vit", "--data-free", "-o", "/proc/qtool-w4a4.safetensors")
    assert ran.code == 1
    assert "/proc" in ran.err
    assert_two_lines(ran)


def test_existing_output_exits_2_naming_both_ways_on(qtool, tmp_path):
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    ran = qtool("quantize", "demo_vit", "--data-free", "-o", "out.safetensors")
    assert ran.code == 2
    assert "--overwrite" in ran.err
    assert "--skip-existing" in ran.err
    assert_two_lines(ran)
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize(("flag", "code"), [("", 2), ("--skip-existing", 2), ("--overwrite", 0)])
@pytest.mark.parametrize("out", ["hub", "hub/"])
def test_a_hub_folder_is_checked_before_work_starts(qtool, tmp_path, out, flag, code):
    card = tmp_path / "hub" / "README.md"
    card.parent.mkdir()
    card.write_text("mine")
    ran = qtool("quantize", "demo_vit", "--data-free", "-o", out, "-n", "--json", *flag.split())
    assert ran.code == code
    if code:
        assert "README.md" in ran.json["summary"]["error"]
        assert "--overwrite" in ran.json["summary"]["remedy"]
    else:
        assert ran.json["summary"]["output"] == "hub/model.safetensors"
    assert [path.name for path in card.parent.iterdir()] == ["README.md"]


def test_a_slash_makes_a_hub_folder_of_a_name_that_is_free(qtool, tmp_path):
    for out, expected in (("new/", "new/model.safetensors"), ("new", "new")):
        ran = qtool("quantize", "demo_vit", "--data-free", "-o", out, "-n", "--json")
        assert ran.json["summary"]["output"] == expected
    (tmp_path / "settings.toml").write_text('[quantize]\nout = "new/"\n')
    line = "quantize demo_vit --data-free -n --json --config settings.toml"
    assert qtool(*line.split()).json["summary"]["output"] == "new/model.safetensors"
    assert 'out = "new/"' in qtool(*line.split()[:-4], "-o", "new/", "--dump-config").out


@pytest.mark.parametrize(
    "line",
    [
        "quantize vit_b --data-free",
        "quantize esdnet --data-free",
        "synthesize images vit_b -o d",
        "eval vit_b --data pictures",
    ],
)
def test_absent_weights_exit_4_with_size_and_licence(qtool, pictures, line):
    ran = qtool(*line.split(), "--device", "cpu")
    assert ran.code == 4
    assert re.search(r"\d+ MB", ran.err)
    assert_two_lines(ran)


@pytest.mark.parametrize(
    "line",
    [
        "info absent.safetensors",
        "switch-bits absent.safetensors --list",
        "switch-bits absent.safetensors --bits 4 -o out.safetensors",
        "eval absent.safetensors --data pictures",
        "quantize absent.safetensors --data-free",
        "quantize demo_vit --weights absent.safetensors --data-free",
        "synthesize images absent.safetensors -o d",
        "demoire pictures -o clean --weights absent.safetensors",
        "eval absent.safetensors --latency",
    ],
)
def test_an_absent_checkpoint_exits_4_and_is_named(qtool, pictures, line):
    ran = qtool(*line.split())
    assert ran.code == 4
    assert "absent.safetensors" in ran.err
    assert_two_lines(ran)


COMPUTING = [
    "synthesize images demo_vit -o d",
    "synthesize moire --simulate --clean good -o d",
    "train demoire pairs -o w.safetensors",
    "quantize demo_vit --data-free",
    "quantize bandgate --data-free --bits w8a8",
    "quantize resnet8 --weights resnet8.safetensors --bits any --engine branches --train classes",
    "demoire good -o clean",
    "eval demo_vit --count 2",
    "eval pairs/moire --reference pairs/clean",
]


@pytest.fixture
def good(tmp_path):
    """What the lines of `COMPUTING` and `DRY` name."""
    from safetensors.torch import save_file

    from qtool.models import cifar

    places = [tmp_path / "good", *(tmp_path / "pairs" / side for side in ("moire", "clean"))]
    places += [tmp_path / "classes" / str(label) for label in range(2)]
    for place in places:
        place.mkdir(parents=True)
        for index in range(20 if place.parent.name == "classes" else 2):
            picture = Image.effect_noise((64, 64), 90).convert("RGB")
            picture.save(place / f"{index}.png")
    save_file(cifar.build("resnet8", num_classes=2).state_dict(), tmp_path / "resnet8.safetensors")
    return tmp_path


def written(folder):
    """Every file of a folder with its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("line", COMPUTING)
def test_cuda_without_cuda_exits_4_and_so_does_the_dry_run(qtool, good, monkeypatch, line):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = written(good)
    for words in ([], ["-n"]):
        ran = qtool(*line.split(), *words, "--device", "cuda")
        assert ran.code == 4
        assert "--device cuda" in ran.err
        assert_two_lines(ran)
    assert written(good) == before


@pytest.mark.parametrize(
    "line",
    [
        "synthesize images vit_b -o d",
        "quantize vit_b --data-free",
        "quantize vit_b --calib good --bits any",
        "quantize resnet18 --bits any --engine branches --train classes",
        "quantize hf-hub:owner/name --data-free",
        "eval vit_b --data good",
        "eval demo_vit --baseline vit_b --count 2",
    ],
)
def test_offline_opens_no_socket_and_the_dry_run_knows(qtool, good, monkeypatch, line):
    import socket

    import huggingface_hub

    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.delenv("QTOOL_OFFLINE")
    # Else this answers for --offline; it is read when the client is imported.
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for words in ([], ["-n"]):
        ran = qtool(*line.split(), *words, "--device", "cpu", "--offline")
        assert ran.code == 4, ran.err
        assert "hf download" in ran.err
        assert_two_lines(ran)


def test_auto_says_which_device_it_took(qtool):
    ran = qtool("eval", "demo_vit", "--count", "8")
    assert ran.code == 0
    assert re.search(r"^device: (cpu|cuda)", ran.err, re.MULTILINE)
    assert "device:" not in qtool("eval", "demo_vit", "--count", "8", "-q").err


def test_a_missed_gate_exits_5_and_still_shows_the_result(qtool):
    ran = qtool("eval", "demo_vit", "--count", "8", "--device", "cpu", "--min", "top1=101")
    assert ran.code == 5
    assert "top1" in ran.out
    assert "101" in ran.err
    content = qtool(
        "eval", "demo_vit", "--count", "8", "--device", "cpu", "--min", "top1=101", "--json"
    ).json
    assert list(content) == KEYS
    assert content["summary"]["exit_code"] == 5


@pytest.mark.parametrize("line", [*COMPUTING, "models"])
def test_a_dry_run_is_planned_and_writes_nothing(qtool, good, line):
    before = written(good)
    ran = qtool(*line.split(), "-n", "--json", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert list(ran.json) == KEYS
    assert ran.json["status"] == "planned"
    assert ran.json["command"] in COMMANDS
    assert line.startswith(ran.json["command"])
    if line != "models":
        assert ran.json["summary"]["device"] == "cpu"
    assert written(good) == before


CHEAP = {
    "synthesize images": "synthesize images demo_vit --method noise --count 2 -o OUT",
    "demoire": "demoire good --force -o OUT",
}


@pytest.mark.parametrize("command", CHEAP)
def test_a_run_ends_in_one_object_and_its_seed_decides_every_byte(qtool, good, command):
    made = {}
    for out, seed in (("one", "0"), ("two", "0"), ("three", "1")):
        words = CHEAP[command].replace("OUT", out).split()
        ran = qtool(*words, "--device", "cpu", "--seed", seed, "--json")
        assert ran.code == 0, ran.err
        assert list(ran.json) == KEYS
        assert (ran.json["command"], ran.json["status"]) == (command, "ok")
        assert all(Path(item["output"]).is_file() for item in ran.json["items"])
        assert "device: cpu" in ran.err
        files = written(good / out)
        assert not [path for path in files if path.suffix in (".tmp", ".resume")]
        made[out] = {
            path.relative_to(good / out): content
            for path, content in files.items()
            if path.name != ".qtool.jsonl"
        }
    assert made["one"] == made["two"]
    # Nothing in it is drawn by chance.
    assert (made["one"] == made["three"]) is (command == "demoire")


@pytest.mark.parametrize(
    "line",
    [
        "eval demo_vit --count 2 --report mine.html",
        "eval pairs/moire --reference pairs/clean --report mine.html",
        "quantize demo_vit --data-free --report mine.html",
        "demoire good -o clean --preview mine.html",
    ],
)
def test_a_page_that_is_there_is_replaced_only_when_asked(qtool, good, tmp_path, line):
    (tmp_path / "mine.html").write_text("mine")
    for flags in ([], ["-n"]):
        ran = qtool(*line.split(), "--device", "cpu", *flags)
        assert ran.code == 2
        assert "mine.html" in ran.err
        assert "--overwrite" in ran.err
        assert_two_lines(ran)
    assert qtool(*line.split(), "--device", "cpu", "-n", "--overwrite").code == 0
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert not (tmp_path / "clean").exists()


def test_a_report_is_replaced_when_asked(qtool, tmp_path):
    words = ["eval", "demo_vit", "--count", "2", "--device", "cpu", "--report", "mine.json"]
    (tmp_path / "mine.json").write_text("mine")
    assert qtool(*words, "--overwrite").code == 0
    assert json.loads((tmp_path / "mine.json").read_text())["command"] == "eval"


def test_processes_that_share_photographs_write_no_preview(qtool, good, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = qtool(*["demoire", "good", "-o", "clean", "--preview", "page.html", "-n"])
    assert ran.code == 2
    assert "--preview" in ran.err


@pytest.mark.parametrize("command", CHEAP)
def test_what_is_there_is_refused_skipped_or_replaced(qtool, good, command):
    words = [*CHEAP[command].replace("OUT", "out").split(), "--device", "cpu", "-q"]
    assert qtool(*words).code == 0
    before = written(good / "out")
    for flags in ([], ["-n"]):
        ran = qtool(*words, *flags)
        assert ran.code == 2
        assert "--overwrite" in ran.err
        assert "--skip-existing" in ran.err
        assert_two_lines(ran)
    ran = qtool(*words, "--skip-existing", "--json")
    assert ran.code == 0
    assert "skipped" in ran.out
    assert written(good / "out") == before
    assert qtool(*words, "--overwrite", "--seed", "1").code == 0
    assert (written(good / "out") == before) is False


@pytest.mark.parametrize("command", CHEAP)
def test_what_a_killed_run_left_is_swept(qtool, good, command):
    from qtool.io import atomic

    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    stale = good / "out" / f".w.qtool-{atomic._HOST}-{dead}-0123abcd.tmp"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    words = CHEAP[command].replace("OUT", "out").split()
    assert qtool(*words, "--device", "cpu").code == 0
    assert not stale.exists()


def test_models_lists_every_alias(qtool):
    from qtool.models.registry import MODELS

    ran = qtool("models")
    assert ran.code == 0
    assert all(spec.alias in ran.out for spec in MODELS)
    names = qtool("models", "swin*").out
    assert "swin_t" in names
    assert "vit_b" not in names


TORCH_FREE = """
import sys
from qtool.cli.app import main
for words in [["--help"], ["--version"], *([*words.split(), "-h"] for words in COMMANDS),
              ["quantize", "--bits", "x", "m"],
              ["quantize", "m", "--data-free", "--dump-config"]]:
    main(words)
import os
os.environ["_QTOOL_COMPLETE"] = "complete_bash"
os.environ["COMP_WORDS"] = "qtool quantize vit"
os.environ["COMP_CWORD"] = "2"
main([])
heavy = {"torch", "timm", "torchvision", "numpy", "PIL", "safetensors"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""


def test_help_version_and_completion_import_no_torch():
    script = f"COMMANDS = {COMMANDS}\n{TORCH_FREE}"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "vit_b" in ran.stdout


LOADED = """
import sys
from qtool.cli.app import main
main(sys.argv[1:])
names = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(*sorted(name for name in names if not name.startswith("_")), file=sys.stderr)
"""
SHELL = {"qtool", "typer", "annotated_doc", "shellingham", "rich"}
SHOWN = {"markdown_it", "mdurl", "pygments"}
CHECKED = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["--version"], SHELL),
        (["--help"], SHELL | SHOWN),
        (["quantize", "--help"], SHELL | SHOWN | CHECKED),
    ],
)
def test_start_up_loads_little(words, allowed):
    """What is loaded decides how long start-up takes; `tests/bench/start_up.py` takes the time."""
    ran = subprocess.run(
        [sys.executable, "-c", LOADED, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "qtool" in ran.stderr
    assert set(ran.stderr.split()) <= allowed
