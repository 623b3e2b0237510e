"""``python -m clipfast.run MODULE_OR_SCRIPT ARGS...`` runs a program that uses OpenCLIP, with clipfast's parts in it.

OpenCLIP is not imported here. An import hook waits until the program imports one of OpenCLIP's modules, and replaces
classes and functions of that module before other code can import them from it.
"""

import builtins
import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any, NamedTuple

VARIABLE = "CLIPFAST_DISABLE"
NEWEST = (4, 2)  # the newest version of OpenCLIP that was tested or whose source was read
# A program whose name has one of these suffixes, or a slash, is a file; any other name is a module.
SCRIPT_ENDINGS = (".py", ".pyc", ".pyz", ".zip")
# This maps OpenCLIP's loss classes to clipfast's modules with the replacements. The modules are imported only after
# OpenCLIP has imported PyTorch, because they import it too.
LOSSES = {
    "ClipLoss": "clipfast.losses.clip_loss",
    "SigLipLoss": "clipfast.losses.siglip_loss",
    "DistillClipLoss": "clipfast.losses.distill_loss",
    "CoCaLoss": "clipfast.losses.coca_loss",
}
# This maps the arguments of apply_to_open_clip, which are the names of parts of a model, to summaries for --help.
MODEL_PARTS = {
    "attention": "attention of images and texts, and the attention pooling of ResNets",
    "norms": "layer norms, each in one pass with the addition before it",
    "activations": "GELU and QuickGELU, in one pass with the bias before them",
    "patch_embed": "patches to tokens in one pass",
    "text_embed": "texts to tokens with their positions in one pass",
    "pooled_last_block": "the last block of a tower computes only the row that the tower reads (needs attention)",
    "pack_text": "a text tower computes no token behind the one that it reads (needs attention)",
    "pack_image": "a NaFlex tower computes no patch that is padding (needs attention)",
}


class Part(NamedTuple):
    """A part of OpenCLIP that ``clipfast.run`` replaces."""

    module: str  # the module of OpenCLIP after whose import the part is replaced
    # The function that replaces the part, and returns a line about it. Parts with the same function are replaced by one
    # call, which gets their names.
    replace: Callable[[ModuleType, Sequence[str]], str]
    summary: str  # the line of --help about the part


def replace_losses(loss: ModuleType, names: Sequence[str]) -> str:
    """Replace the loss classes in all modules of OpenCLIP for ``clipfast.run``, and return a line that names them.

    A class with arguments that clipfast's class does not have, as in a later version of OpenCLIP, is not replaced.
    """
    replaced, left = [], []
    for name, module in LOSSES.items():
        theirs = getattr(loss, name, None)
        if theirs is None:
            continue
        ours = pkgutil.resolve_name(f"{module}:{name}")
        unknown = sorted(_arguments(theirs) - _arguments(ours))
        if unknown:
            left.append(f"; {name} is left as it is, because it takes {', '.join(unknown)}")
            continue
        _replace_everywhere(theirs, ours)
        replaced.append(name)
    return f"{', '.join(replaced) or 'none'} of open_clip replaced ({_leaves(names)}){''.join(left)}"


def replace_create_model(factory: ModuleType, names: Sequence[str]) -> str:
    """Patch ``open_clip.create_model`` for ``clipfast.run``: each model that it returns runs on clipfast's kernels.

    ``create_model_and_transforms`` and ``create_model_from_pretrained`` call ``create_model``; models of
    ``load_openai_model`` are not changed. ``names`` are the parts of the model to replace.
    """
    theirs = factory.create_model

    @functools.wraps(theirs)
    def create_model(*args: Any, **kwargs: Any) -> Any:
        """Call OpenCLIP's ``create_model`` under ``clipfast.run``, and apply the kernels to the model."""
        model = theirs(*args, **kwargs)
        _say(apply_to_model(model, names))
        return model

    _replace_everywhere(theirs, create_model)
    return f"{', '.join(names)} of models that open_clip.create_model returns are replaced ({_leaves(names)})"


def apply_to_model(model: Any, names: Sequence[str]) -> str:
    """Replace the parts ``names`` in a model of OpenCLIP for ``clipfast.run``; return a line with counts of modules.

    A model is not changed if nothing in it can be replaced, as in a TorchScript model, or if it comes from a later
    version of OpenCLIP and lacks something that our code uses: the program continues with the original.
    """
    adopt = importlib.import_module("clipfast.adopt")
    kind = type(model).__name__
    try:
        adopt.apply_to_open_clip(model, **{name: name in names for name in MODEL_PARTS})
    except Exception as error:
        with contextlib.suppress(TypeError):  # revert_model raises a TypeError if the model is not an nn.Module
            adopt.revert_model(model)
        return f"a {kind} is left as it is ({error})"
    places = adopt.count_places(model)
    counts = ["{} {} of {}".format(name, *places[name]) for name in names if name in places]
    return f"a {kind} runs on clipfast in these places (on a CPU, most of them as before): {', '.join(counts)}"


# The one list of the parts that are replaced. An environment variable (``VARIABLE``) switches parts off by name.
PARTS = {
    "loss": Part("open_clip.loss", replace_losses, f"{', '.join(LOSSES)}, which then never hold N x N logits"),
    **{name: Part("open_clip.factory", replace_create_model, summary) for name, summary in MODEL_PARTS.items()},
}

HELP = f"""usage: python -m clipfast.run MODULE_OR_SCRIPT [ARGS ...]

Run a module as `python -m MODULE ARGS` would, or a script as `python SCRIPT ARGS` would, with clipfast in the place of
parts of OpenCLIP. No line of the program changes. Lines on stderr say what was replaced, and in how many places of each
model. clipfast.report_kernels(model) says what each place runs on.

  python -m clipfast.run open_clip_train.main --model ViT-B-32 --train-data 'data/*.tar'
  python -m clipfast.run ./my_training.py --epochs 3
  torchrun --nproc-per-node 8 -m clipfast.run open_clip_train.main --model ViT-B-32 ...

A name that has a slash or ends in {", ".join(SCRIPT_ENDINGS)} is a script, any other name a module.

What is replaced, and the name that switches it off in {VARIABLE}, where names are separated by commas:
{chr(10).join(f"  {name:<19}{part.summary}" for name, part in PARTS.items())}

On a CPU, OpenCLIP's own attention, norms, activations and text embeddings are faster, and run there. All other parts
are ours on a CPU too.

Models that open_clip.create_model, create_model_and_transforms and create_model_from_pretrained return have our parts;
models of open_clip.load_openai_model stay as they are, and so does a model that OpenCLIP has given to TorchScript.
If the program itself gives such a model to torch.jit.script or torch.nn.DataParallel, call clipfast.revert_model(model)
first, or switch off the parts of models with {VARIABLE}. A whole model that is pickled needs clipfast where it is
loaded; a state_dict does not.

The replacement works in this process and in those that it forks. Those that the program starts with multiprocessing's
"spawn" or "forkserver" have OpenCLIP's own parts. Processes of torchrun are each started with clipfast.run.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a program by ``clipfast.run`` and return 0; return 2 for wrong arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    program, *options = arguments
    try:
        parts = enabled_parts(os.environ.get(VARIABLE, ""))
        run = _script_runner(program) if _is_script(program) else _module_runner(program)
    except ValueError as error:
        print(f"clipfast.run: error: {error}", file=sys.stderr)
        return 2
    hook = ImportHook(parts)
    sys.meta_path.insert(0, hook)
    sys.argv = [program, *options]
    try:
        run()
    finally:
        hook.say_what_never_happened()
    return 0


def enabled_parts(disabled: str) -> dict[str, Part]:
    """Return the parts of OpenCLIP that ``clipfast.run`` replaces: those that are not in ``disabled``.

    Raises:
        ValueError: a name is not the name of a part.
    """
    names = {name.strip() for name in disabled.split(",")} - {""}
    unknown = sorted(names - set(PARTS))
    if unknown:
        raise ValueError(
            f"{VARIABLE}={disabled!r} names {', '.join(map(repr, unknown))}: it can name {', '.join(PARTS)}"
        )
    return {name: part for name, part in PARTS.items() if name not in names}


class ImportHook(MetaPathFinder):
    """An import hook that replaces each part of OpenCLIP as soon as the import system has executed its module."""

    def __init__(self, parts: dict[str, Part]) -> None:
        # For each module of OpenCLIP, this maps each replacing function to the names of its parts.
        self.waiting: dict[str, dict[Callable[[ModuleType, Sequence[str]], str], list[str]]] = {}
        for name, part in parts.items():
            self.waiting.setdefault(part.module, {}).setdefault(part.replace, []).append(name)
        self.disabled = [name for name in PARTS if name not in parts]
        self.done: set[str] = set()
        for module in [sys.modules[name] for name in self.waiting if name in sys.modules]:
            self._replace(module)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module whose parts ``clipfast.run`` replaces; None for other modules."""
        if fullname not in self.waiting:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            # The loader object stays the original one, because tracebacks and inspect ask it for the source.
            execute = spec.loader.exec_module

            def execute_and_replace(module: ModuleType) -> None:
                """Execute a module of OpenCLIP under ``clipfast.run``, and then replace its parts."""
                execute(module)
                self._replace(module)

            spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec

    def say_what_never_happened(self) -> None:
        """Print to stderr the parts that ``clipfast.run`` did not replace: switched off, or never imported."""
        if self.disabled:
            _say(f"{', '.join(self.disabled)} of open_clip left as they are ({VARIABLE})")
        never = sorted(set(self.waiting) - self.done)
        if never:
            _say(f"the program did not import {', '.join(never)}, so nothing was replaced there")

    def _replace(self, module: ModuleType) -> None:
        """Replace the parts of a module of OpenCLIP after its import."""
        for replace, names in self.waiting[module.__name__].items():
            said = replace(module, names)
            if module.__name__ not in self.done:  # importlib.reload executes a module again: only the first time prints
                _say(said)
        unknown = "" if self.done else unknown_version(module.__name__.partition(".")[0])
        if unknown:
            _say(unknown)
        self.done.add(module.__name__)


def unknown_version(package: str) -> str:
    """Return a warning if OpenCLIP's version is newer than ``clipfast.run`` knows, else ""."""
    version = str(getattr(importlib.import_module(package), "__version__", "0"))
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers <= NEWEST:
        return ""
    return (
        f"{package} {version} is later than {NEWEST[0]}.{NEWEST[1]}, the last version that clipfast knows: its classes "
        f"with other arguments are not replaced; compare a few losses with those of {VARIABLE}={','.join(PARTS)}"
    )


def _say(text: str) -> None:
    """Print a line of ``clipfast.run`` to stderr, on only one of torchrun's processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"clipfast: {text}", file=sys.stderr, flush=True)


def _leaves(names: Sequence[str]) -> str:
    """Return a hint for users: the environment variable that keeps ``clipfast.run`` from replacing these parts."""
    return f"to leave them: {VARIABLE}={','.join(names)}"


def _arguments(kind: type) -> set[str]:
    """Return the arguments of a loss class of OpenCLIP or of clipfast: its constructor's and ``forward``'s."""
    methods = (getattr(kind, name) for name in ("__init__", "forward"))
    return {name for method in methods for name in inspect.signature(method).parameters}


def _replace_everywhere(theirs: object, ours: object) -> None:
    """Replace the object ``theirs`` by ``ours`` in every loaded module of OpenCLIP, for ``clipfast.run``."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("open_clip", "open_clip_train"):
            for attribute in [key for key, value in vars(module).items() if value is theirs]:
                setattr(module, attribute, ours)


def _is_script(program: str) -> bool:
    """Return whether the first argument of ``clipfast.run`` is a script's path, and not a module's name."""
    return os.sep in program or program.endswith(SCRIPT_ENDINGS)


def _module_runner(name: str) -> Callable[[], object]:
    """Return a function by which ``clipfast.run`` runs a module as the program, like ``python -m``.

    Raises:
        ValueError: the name is an option, or there is no module or package of this name.
    """
    if name.startswith("-"):
        raise ValueError(f"there is no option {name}: the first argument is a module or a script (see --help)")
    top = name.partition(".")[0]  # find_spec of a submodule would import the package, so only the package is looked up
    if importlib.util.find_spec(top) is None:
        raise ValueError(f"there is no module {top!r} in {os.getcwd()} or sys.path; a script is given as ./{name}")
    return lambda: _run_module(name)


def _run_module(name: str) -> None:
    """Run a module as the program of ``clipfast.run``."""
    package, _, last = name.rpartition(".")
    if package and importlib.util.find_spec(name) is None:  # this imports the package, as running the module would
        print(f"clipfast.run: error: there is no module {last!r} in {package}", file=sys.stderr)
        sys.exit(2)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _script_runner(path: str) -> Callable[[], object]:
    """Return a function by which ``clipfast.run`` runs a script, or a folder or an archive with a ``__main__.py``.

    Raises:
        ValueError: the file does not exist.
    """
    if not os.path.exists(path):
        raise ValueError(f"there is no file {path!r}")
    return lambda: _run_script(path)


def _run_script(path: str) -> None:
    """Run a script as the program of ``clipfast.run``."""
    whole_path = os.path.abspath(path)
    is_source = os.path.isfile(path) and not path.endswith((".pyc", ".pyz", ".zip"))
    # sys.path[0] is the working directory here, because clipfast.run was started as a module. For a script it must be
    # the script's folder; for a folder or an archive, runpy adds the entry itself.
    if not sys.flags.safe_path:
        sys.path[:1] = [os.path.dirname(os.path.realpath(path))] if is_source else []
    if not is_source:
        runpy.run_path(whole_path, run_name="__main__")
        return
    # runpy is not used for a script, since __file__ or sys.argv[0] would differ from those that Python sets.
    program, loader = ModuleType("__main__"), SourceFileLoader("__main__", whole_path)
    program.__dict__.update(__file__=whole_path, __builtins__=builtins, __loader__=loader)
    sys.modules["__main__"] = program
    exec(loader.source_to_code(loader.get_data(whole_path), whole_path), program.__dict__)


if __name__ == "__main__":
    sys.exit(main())
