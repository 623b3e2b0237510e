"""``python -m clipfast.run``: programs behave as under ``python``, but with clipfast's losses, not OpenCLIP's."""

import importlib
import importlib.util
import os
import subprocess
import sys
import types

import pytest
from torch import nn

from clipfast import SigLipLoss, run
from clipfast.adopt import apply

from ..small_runs import TINY

LOSSES = "ClipLoss, SigLipLoss, DistillClipLoss, CoCaLoss"
LINE = f"clipfast: {LOSSES} of open_clip replaced (to leave them: CLIPFAST_DISABLE=loss)"
MODEL_PARTS = ", ".join(run.MODEL_PARTS)
MODEL_LINE = (
    f"clipfast: {MODEL_PARTS} of models that open_clip.create_model returns are replaced"
    f" (to leave them: CLIPFAST_DISABLE={','.join(run.MODEL_PARTS)})"
)
NEVER = "clipfast: the program did not import open_clip.factory, open_clip.loss, so nothing was replaced there"


def python(folder, *arguments, **variables):
    """Run Python in a folder, as a separate process, to try ``clipfast run``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    environment.pop("RANK", None)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True
    )


def stand_in_for_pandas(folder):
    """Write an empty ``pandas`` if there is none: OpenCLIP's trainer imports it, and needs it for CSV files only."""
    if importlib.util.find_spec("pandas") is None:
        (folder / "pandas.py").touch()


PROGRAM = """
import os, pickle, sys
class Thing: pass
assert sys.modules["__main__"].__dict__ is globals() and isinstance(pickle.loads(pickle.dumps(Thing())), Thing)
print(__name__, __file__, sys.argv, sys.path[0], __package__, getattr(__spec__, "name", None))
assert "torch" not in sys.modules and "open_clip" not in sys.modules
def fail(): return 1 / 0
if "code" in sys.argv: sys.exit(7)
if "message" in sys.argv: sys.exit("a message")
if "fail" in sys.argv: fail()
if "interrupt" in sys.argv: raise KeyboardInterrupt
"""


@pytest.fixture
def program(tmp_path):
    """Write programs for ``clipfast run``: a script, a package with a module, and a runnable folder."""
    for path in ("script.py", "package/module.py", "folder/__main__.py", "elsewhere/script.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(PROGRAM)
    (tmp_path / "package" / "__init__.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("plain", "through"),
    [
        (["-m", "package.module"], ["package.module"]),
        (["elsewhere/script.py"], ["elsewhere/script.py"]),
        (["{folder}"], ["{folder}"]),
    ],
    ids=" ".join,
)
def test_a_program_finds_what_it_finds_without(plain, through, program):
    words = ["-x", "--help", "a b"]
    plain, through = ([word.format(folder=program / "folder") for word in call] for call in (plain, through))
    expected, found = (python(program, *call, *words) for call in (plain, ["-m", "clipfast.run", *through]))
    assert (expected.returncode, expected.stderr) == (0, "")
    assert (found.returncode, found.stdout, found.stderr) == (0, expected.stdout, NEVER + "\n")


@pytest.mark.parametrize(("ending", "code"), [("message", 1), ("fail", 1), ("interrupt", -2)])
def test_a_program_ends_as_it_ends_without(ending, code, program):
    expected, found = (python(program, *call, "script.py", ending) for call in ([], ["-m", "clipfast.run"]))
    assert (found.returncode, found.stdout) == (code, expected.stdout)
    assert expected.returncode == code
    # Compare the traceback from the program's own lines on; lines of clipfast.run and runpy come before these.
    frames = [text[text.rfind('  File "', 0, text.find("script.py", 1)) :] for text in (expected.stderr, found.stderr)]
    if ending in ("fail", "interrupt"):
        assert "script.py" in frames[0]
        assert frames[1] == frames[0]
    if ending == "message":
        assert found.stderr == f"{NEVER}\na message\n"


@pytest.mark.parametrize(
    ("arguments", "disabled", "message"),
    [
        (["script"], "loss, atention", "CLIPFAST_DISABLE='loss, atention' names 'atention': it can name loss"),
        (["no_such_module"], "", "there is no module 'no_such_module' in "),
        (["no_such_file.py"], "", "there is no file 'no_such_file.py'"),
        (["--model", "ViT-B-32"], "", "there is no option --model: the first argument is a module or a script"),
    ],
)
def test_a_wrong_call_is_one_line(arguments, disabled, message, capsys, monkeypatch):
    monkeypatch.setenv("CLIPFAST_DISABLE", disabled)
    assert run.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"clipfast.run: error: {message}")
    assert error.count("\n") == 1


def test_a_module_that_its_package_lacks_is_a_line_and_no_traceback(program):
    found = python(program, "-m", "clipfast.run", "package.modul")
    assert (found.returncode, found.stderr) == (
        2, f"clipfast.run: error: there is no module 'modul' in package\n{NEVER}\n"
    )  # fmt: skip


def test_help_and_a_part_that_is_switched_off(program, capsys):
    assert run.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("torchrun", "CLIPFAST_DISABLE", *run.PARTS))
    assert run.main([]) == 2
    found = python(program, "-m", "clipfast.run", "script", CLIPFAST_DISABLE=f" loss,{MODEL_PARTS}")
    expected = f"clipfast: loss, {MODEL_PARTS} of open_clip left as they are (CLIPFAST_DISABLE)\n"
    assert (found.returncode, found.stderr) == (0, expected)


def test_a_module_is_replaced_before_others_take_from_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "package_a").mkdir()
    (tmp_path / "package_a" / "__init__.py").write_text("from .one import NAME")
    (tmp_path / "package_a" / "one.py").write_text("NAME = 'theirs'")
    monkeypatch.syspath_prepend(tmp_path)

    def replace(module, names):
        """Replace the attribute ``NAME`` of a module, as ``clipfast run`` replaces OpenCLIP's parts."""
        module.NAME = "ours"
        return f"replaced {names}"

    parts = dict.fromkeys(("loss", "other"), run.Part("package_a.one", replace, ""))
    hook = run.ImportHook(parts)
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    package = importlib.import_module("package_a")
    assert package.NAME == package.one.NAME == "ours"
    assert importlib.reload(package.one).NAME == "ours"
    assert package.one.__loader__.get_source("package_a.one") == "NAME = 'theirs'"
    hook.say_what_never_happened()
    assert capsys.readouterr().err.startswith("clipfast: replaced ['loss', 'other']\n")
    package.one.NAME = "theirs"
    run.ImportHook(parts)  # parts of modules that are imported already are replaced, too
    assert package.one.NAME == "ours"
    for name in ("package_a", "package_a.one"):
        del sys.modules[name]


def test_a_class_with_unknown_arguments_stays(monkeypatch):
    class LaterLoss(nn.Module):
        def __init__(self, local_loss=False, temperature_schedule=None):
            super().__init__()

        def forward(self, image_features, text_features, logit_scale):
            """Do nothing; a later OpenCLIP may have such a loss class, which ``clipfast run`` must not replace."""

    class SameLoss(LaterLoss):
        def __init__(self, cache_labels=False):
            super().__init__()

    loss, other = types.ModuleType("open_clip.loss"), types.ModuleType("open_clip.other")
    loss.ClipLoss, loss.SigLipLoss, other.Renamed, other.GenLipLoss = LaterLoss, SameLoss, SameLoss, LaterLoss
    monkeypatch.setattr(sys, "modules", {**sys.modules, "open_clip.loss": loss, "open_clip.other": other})
    said = run.replace_losses(loss, ["loss"])
    assert (loss.ClipLoss, loss.SigLipLoss, other.Renamed, other.GenLipLoss) == (
        LaterLoss, SigLipLoss, SigLipLoss, LaterLoss,
    )  # fmt: skip
    assert said.startswith("SigLipLoss of open_clip replaced")
    assert said.endswith("; ClipLoss is left as it is, because it takes temperature_schedule")


LATER = {  # the parts of OpenCLIP 4.2.1 that clipfast.run replaces
    "__init__.py": "from .version import __version__\nfrom .factory import create_loss, create_model",
    "version.py": "__version__ = '4.2.1'",
    "loss.py": """
from torch import nn
class ClipLoss(nn.Module):
    def __init__(self, local_loss=False, gather_with_grad=False, cache_labels=False, rank=0, world_size=1):
        super().__init__()
    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False): pass
class DistillClipLoss(ClipLoss):
    def forward(self, image_features, text_features, logit_scale, dist_image_features, dist_text_features,
        dist_logit_scale, output_dict=False): pass
class CoCaLoss(ClipLoss):
    def __init__(self, caption_loss_weight, clip_loss_weight, pad_id=0, local_loss=False, gather_with_grad=False,
        cache_labels=False, rank=0, world_size=1, z_loss_weight=0.0, compute_dtype=None):
        super().__init__()
    def forward(self, image_features, text_features, logits=None, labels=None, logit_scale=None, output_dict=False,
        caption_loss_ce=None, caption_loss_z=None): pass
class SigLipLoss(nn.Module):
    def __init__(self, cache_labels=False, rank=0, world_size=1, dist_impl=None, chunk_size=0):
        super().__init__()
    def forward(self, image_features, text_features, logit_scale, logit_bias, output_dict=False): pass
""",
    "factory.py": """
from torch import nn
from .loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
class Model(nn.Module): pass
def create_model(name, **options):
    model = Model()
    model.traits = name
    return model
def create_loss(args, model):
    ranks = {"rank": 0, "world_size": 1, "cache_labels": True}
    if args.siglip:
        return SigLipLoss(dist_impl=args.loss_dist_impl, **ranks)
    if model.traits in ("coca", "mammut"):
        return CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=None, z_loss_weight=0.1,
            compute_dtype="float32", local_loss=True, gather_with_grad=True, **ranks)
    return (DistillClipLoss if args.distill else ClipLoss)(local_loss=True, gather_with_grad=True, **ranks)
""",
    "program.py": """
import argparse, open_clip
for name, distill, siglip in ("clip", 0, 0), ("clip", 1, 0), ("clip", 0, 1), ("coca", 0, 0), ("mammut", 0, 0):
    args = argparse.Namespace(distill=distill, siglip=siglip, loss_dist_impl="gather")
    print(type(open_clip.create_loss(args, open_clip.create_model(name))).__module__)
""",
}


@pytest.mark.parametrize(("version", "with_losses"), [("4.2.1", True), ("4.3.0", True), ("4.2.1", False)])
def test_open_clip_4_has_our_losses_and_later_versions_are_named(version, with_losses, tmp_path):
    (tmp_path / "open_clip").mkdir()
    for name, text in LATER.items():
        (tmp_path / (name if name == "program.py" else f"open_clip/{name}")).write_text(text.replace("4.2.1", version))
    disabled = [part for part in run.PARTS if part != "loss" or not with_losses]
    found = python(tmp_path, "-m", "clipfast.run", "./program.py", CLIPFAST_DISABLE=",".join(disabled))
    assert found.returncode == 0, found.stderr
    modules = ("clip_loss", "distill_loss", "siglip_loss", "coca_loss", "coca_loss")
    ours = [f"clipfast.losses.{module}" for module in modules]
    assert found.stdout.split() == (ours if with_losses else ["open_clip.loss"] * 5)
    assert (LINE in found.stderr.splitlines()) == with_losses
    assert ("open_clip 4.3.0 is later than 4.2, the last version" in found.stderr) == (version == "4.3.0")


REPLACED = """
import argparse, inspect, sys
import clipfast, open_clip, open_clip.factory, open_clip.loss
from open_clip_train.main import create_loss
for module in open_clip, open_clip.factory, open_clip.loss:
    for name in "ClipLoss", "SigLipLoss", "DistillClipLoss", "CoCaLoss":
        assert module is open_clip or hasattr(module, name)
        assert getattr(module, name, open_clip.loss.ClipLoss).__module__.startswith("clipfast"), (module, name)
for model, distill, siglip, name in [
    ("ViT", False, False, "ClipLoss"), ("ViT", False, True, "SigLipLoss"),
    ("ViT", True, False, "DistillClipLoss"), ("coca_ViT", False, False, "CoCaLoss"),
]:
    loss = create_loss(argparse.Namespace(
        model=model, distill=distill, siglip=siglip, horovod=False, local_loss=True, gather_with_grad=True, rank=0,
        world_size=1, loss_dist_impl=None, coca_caption_loss_weight=2.0, coca_contrastive_loss_weight=1.0,
    ))
    assert type(loss).__module__.startswith("clipfast") and type(loss).__name__ == name
assert "class ClipLoss" in inspect.getsource(open_clip.loss)
assert "pretrained" in inspect.signature(open_clip.create_model).parameters

# Whatever creates a model.
import torch
open_clip.add_model_config(sys.argv[1])
created = [open_clip.create_model("tiny"), open_clip.create_model_and_transforms("tiny")[0]]
torch.save(created[0].state_dict(), "weights.pt")
created += [open_clip.create_model_from_pretrained("tiny", "weights.pt")[0], open_clip.create_model("tiny", jit=True)]
for model in created:
    places = [line.split(maxsplit=3) for line in clipfast.report_kernels(model).splitlines()[1:]]
    print(sorted({kind for _, _, kind, text in places if not text.startswith("as before")}))
"""
TINY_LINE = (
    "clipfast: a CLIP runs on clipfast in these places (on a CPU, most of them as before): attention 4 of 4, "
    "norms 15 of 15, activations 4 of 4, patch_embed 1 of 1, text_embed 1 of 1, pooled_last_block 2 of 2, "
    "pack_text 1 of 1"
)


def test_open_clip_has_our_losses_and_its_models_our_parts(tmp_path):
    pytest.importorskip("open_clip")
    stand_in_for_pandas(tmp_path)
    (tmp_path / "program.py").write_text(REPLACED)
    found = python(tmp_path, "-m", "clipfast.run", "program", TINY)
    assert found.returncode == 0, found.stderr
    said = [text for text in found.stderr.splitlines() if text.startswith("clipfast: ")]
    left = "apply_to_open_clip: nothing in this RecursiveScriptModule is a module of open_clip"
    assert said == [LINE, MODEL_LINE, *3 * [TINY_LINE], f"clipfast: a RecursiveScriptModule is left as it is ({left})"]
    of_clip = sorted(run.MODEL_PARTS.keys() - {"pack_image"})  # pack_image is for NaFlex towers
    assert found.stdout.splitlines() == 3 * [str(of_clip)] + ["[]"]


@pytest.mark.parametrize("error", [AttributeError("no such part"), RuntimeError("other")])
def test_a_model_that_our_code_fails_on_is_left_as_it_is(error, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    block = open_clip.transformer.ResidualAttentionBlock(32, 2)
    before = {name: sorted(module.__dict__) for name, module in block.named_modules()}
    carry_out, calls = apply.carry_out, []

    def fail_later(*args):
        """Carry out a replacement of ``clipfast run``, but fail at the fourth."""
        calls.append(args)
        if len(calls) == 4:
            raise error
        return carry_out(*args)

    monkeypatch.setattr(apply, "carry_out", fail_later)
    said = run.apply_to_model(block, list(run.MODEL_PARTS))
    assert said == f"a ResidualAttentionBlock is left as it is ({error})"
    assert {name: sorted(module.__dict__) for name, module in block.named_modules()} == before
    said = run.apply_to_model("no module", list(run.MODEL_PARTS))
    assert said.startswith("a str is left as it is (apply_to_open_clip: model must be a torch.nn.Module")
