"""The command line: its help texts, and its errors for wrong input."""

import subprocess
import sys

from ..small_runs import TINY, commands, output_of, refusal_of, run_command


@commands("""
train => --train-data is needed
train --recipe emojis => no recipe 'emojis' (did you mean emoji?)
train --recipe emoji --batch-size 0 => --batch-size must be more than 0, got 0
train --train-data missing-{0..2}.tar => no such shard: missing-0.tar (3 of 3 are missing)
train --resume nowhere => no run to resume at nowhere: there is neither a folder nor a checkpoint
train --recipe emoji --unique-by breed => has no 'breed' in its json; it has category, hexcode
train --recipe emoji --backend triton => backend='triton' cannot run on a cpu tensor
eval zeroshot --data x --model ViT-B-32 => ViT-B-32 has no weights of its own: pass the path of a checkpoint
eval zeroshot --data x --model ViT-T-8-32 --pretrained openai => no checkpoint at openai
eval zeroshot --data x --model local-dir:nowhere => is not a model configuration that can be read
eval zeroshot --data x --model x.pt --templates funny => --templates must be one of plain, simple, openai or a file
eval zeroshot --data x --model x.pt --templates t.txt => template 'a photo.' in t.txt has no {} for the class name
eval zeroshot --data x --model x.pt --classnames funny => --classnames must be 'imagenet' or a file, got 'funny'
eval zeroshot --data x --model x.pt --device cuda => no GPU for 'cuda': PyTorch finds none
train --recipe emoji --device warp => unknown device 'warp': use cpu, cuda, cuda:N or auto
train --recipe emoji --logs t.txt/runs => Not a directory
train --recipe emoji --batchsize 7 => unrecognized arguments: --batchsize 7 (did you mean --batch-size?)
train --train-data train.csv => shard train.csv cannot be read: it is empty
train --train-data t.txt => t.txt is no shard: pairs come from tar, Parquet and Arrow files
train --train-data folder => shard folder/ cannot be read: the folder has no images (jpg, jpeg
train --train-data folder/*.tar => no such shard: nothing matches folder/*.tar
train --train-data t.tar => t.tar cannot be read: not a tar file
train --resume folder => folder holds no checkpoint to resume from
plan --pairs 0 => --pairs must be at least 1, got 0
plan --card v100 => --card: unknown 'v100'; known: a100, h100, h200, b200. For another, take
plan --memory-gb nan => --memory-gb must be a finite number, got nan
plan --json nowhere/plan.json => no folder nowhere to write plan.json in
verify --op softmax => --op: unknown 'softmax'
verify --against timm => --against: unknown 'timm'; known: openclip, hf
verify --device cuda => --device cuda: PyTorch sees no CUDA GPU here
verify --op curve --quick => leave nothing to check
eval zero-shot => invalid choice: 'zero-shot' (did you mean zeroshot?)
trian => invalid choice: 'trian' (did you mean train?)
""")
def test_bad_input_is_one_clear_line(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    for name, text in {"t.txt": "a photo.\n", "t.tar": "a photo.\n", "empty.txt": "\n", "train.csv": "a,b\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    err = refusal_of(capsys, *words)
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".safetensors")]


def test_a_command_is_needed(capsys):
    err = refusal_of(capsys)
    assert "the following arguments are required: COMMAND" in err


def test_an_interruption_while_a_command_is_imported_is_one_line(capsys, monkeypatch):
    def interrupted(name):
        """Raise KeyboardInterrupt in place of importing a command of clipfast, as Ctrl-C during a slow import."""
        raise KeyboardInterrupt

    monkeypatch.setattr("pkgutil.resolve_name", interrupted)
    assert run_command(capsys, "train", "--recipe", "emoji") == (130, "", "clipfast train: interrupted\n")


def test_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    err = refusal_of(capsys, "train", "--recipe", "emoji")
    assert "install what it needs: pip install 'clipfast[data,eval]'" in err.splitlines()[-1]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    _, _, err = run_command(capsys, "train", "--train-data", "s3://bucket/a.tar")
    assert err == "clipfast train: error: Install s3fs to access S3\n"


def test_output_that_nobody_reads_is_no_error():
    # Without PYTHONUNBUFFERED, so little is written at the end of the process only.
    script = "set -o pipefail; env -u PYTHONUNBUFFERED $0 -m clipfast list-pretrained --model RN50 | true"
    done = subprocess.run(["bash", "-c", script, sys.executable], stderr=subprocess.PIPE, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (141, "")


def test_run_is_named_after_its_recipe(capsys, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(f'train-data = "{shards}"\nmodel = "{TINY}"\nepochs = 1\nbatch-size = 24')
    output_of(capsys, "train", "--recipe", "mine.toml")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine-2")
