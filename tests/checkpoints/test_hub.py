"""Models by the names of repositories and tags, from a Hugging Face cache that the tests fill, without a network."""

import hashlib
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import clipfast
from clipfast import (
    convert_checkpoint,
    create_model,
    create_model_and_transforms,
    create_model_from_pretrained,
    get_tokenizer,
)
from clipfast.checkpoints import pretrained
from clipfast.checkpoints.hub import HubError, fetch

from ..small_runs import refusal_of, run_command
from .conftest import (
    CONFIGS,
    PICTURE,
    TOLERANCE,
    assert_same,
    features,
    hugging_face_features,
    make_model,
    quick,
    same_bits,
    save_config,
    save_own,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREPARED = {"mean": [0.5, 0.25, 0.125], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    """Tell the package huggingface_hub that there is no network."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Return an empty folder, which is the Hugging Face cache of clipfast, transformers and tokenizers."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(cache: Path, repository: str, folder: Path) -> None:
    """Copy the files of ``folder`` into the Hugging Face cache, as a download of ``repository`` would store them."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    for part in (home / "blobs", home / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    for file in folder.iterdir():
        content = file.read_bytes()
        blob = home / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)


def open_clip_folder(folder: Path, kind: str, safe: bool | str = "both", **prepared: object) -> Path:
    """Write a model with random weights by OpenCLIP's own code, as OpenCLIP uploads it, and return its folder."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip.push_to_hf_hub import save_for_hf

    config = CONFIGS[kind].to_dict()
    model = open_clip.CLIP(**config)
    model.load_state_dict(make_model(CONFIGS[kind]).state_dict())
    open_clip.model.set_model_preprocess_cfg(model, {"size": 32, **PREPARED, **prepared})
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: (folder / "tokenizer.json").write_text("{}"))
    save_for_hf(model, tokenizer, config, str(folder), safe_serialization=safe)
    return folder


def assert_prepares_as(preprocess, theirs):
    """Check that clipfast's preprocessing of a model from the hub gives the same pixels as the other package's."""
    torch.testing.assert_close(preprocess(PICTURE), theirs(PICTURE), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "safe"), [("QuickGELU", True), ("ResNet", False)])
def test_a_repository_of_open_clip(kind, safe, cache, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    fill(cache, "org/tiny", open_clip_folder(tmp_path / "made", kind, safe))
    name = "hf-hub:org/tiny"
    theirs, _, their_preprocess = open_clip.create_model_and_transforms(name, cache_dir=str(cache))
    ours, _, preprocess = create_model_and_transforms(name, cache_dir=cache)
    assert ours.config == CONFIGS[kind]
    assert_same(ours, theirs, ours.config)
    as_tuples = {key: tuple(PREPARED[key]) for key in ("mean", "std")}
    assert ours.visual.preprocess_cfg | {"size": None} == theirs.visual.preprocess_cfg | {"size": None, **as_tuples}
    assert_prepares_as(preprocess, their_preprocess)
    with pytest.raises(ValueError, match="tiny has a vocabulary of 600 tokens, and CLIP's tokenizer has 49408"):
        get_tokenizer(name, cache_dir=cache)
    assert same_bits(create_model("org/tiny", cache_dir=cache).state_dict(), ours)
    # forced settings take precedence in both packages
    forced = {"image_mean": (0.5, 0.5, 0.5), "image_resize_mode": "longest", "image_interpolation": "bicubic"}
    preprocess = create_model_from_pretrained(name, cache_dir=cache, **forced)[1]
    assert_prepares_as(preprocess, open_clip.create_model_from_pretrained(name, cache_dir=str(cache), **forced)[1])


def test_a_repository_of_transformers(cache, tmp_path):
    transformers = pytest.importorskip("transformers")
    convert_checkpoint(save_own(make_model(CONFIGS["QuickGELU"]), tmp_path / "own.pt"), tmp_path / "hf", "hf")
    transformers.CLIPModel.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "made", max_shard_size="50KB")
    assert (tmp_path / "made" / "model.safetensors.index.json").exists()
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text()) | {"image_mean": [0.5] * 3}
    (tmp_path / "made" / "preprocessor_config.json").write_text(json.dumps(processor))
    fill(cache, "openai/tiny", tmp_path / "made")
    model, preprocess = create_model_from_pretrained("openai/tiny")
    assert model.visual.image_mean == (0.5, 0.5, 0.5)
    black = preprocess(Image.new("RGB", (40, 40), "black"))[:, 0, 0]
    torch.testing.assert_close(black, -0.5 / torch.tensor(model.visual.image_std))
    expected = hugging_face_features(tmp_path / "hf", model.config)
    torch.testing.assert_close(features(model, model.config), expected, **TOLERANCE)
    info = convert_checkpoint("hf-hub:openai/tiny", tmp_path / "back.pt", "clipfast")
    assert (info.mean, info.activation) == ((0.5, 0.5, 0.5), "QuickGELU")
    assert same_bits(tmp_path / "back.pt", model)


def test_all_files_are_of_one_commit(cache, hf_folder, monkeypatch):
    """All files of a checkpoint are downloaded from one commit, since a repository may change meanwhile."""
    import huggingface_hub

    fill(cache, "org/tiny", hf_folder)
    download, asked = huggingface_hub.hf_hub_download, []

    def note(repository, name, **options):
        """Record the commit from which a file of a checkpoint is downloaded."""
        asked.append(options["revision"])
        return download(repository, name, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", note)
    create_model("hf-hub:org/tiny", cache_dir=cache)
    assert set(asked) == {None, COMMIT}
    first = asked.index(COMMIT)
    # All files between two downloads of a configuration are of one commit.
    assert set(asked[first : asked.index(None, first)]) == {COMMIT}


@pytest.fixture
def tagged(cache, tmp_path, monkeypatch, open_clip_registry) -> str:
    """Give a model the tags "plain" and "quick" in clipfast's and OpenCLIP's tables, and put both into the cache."""
    open_clip = pytest.importorskip("open_clip")
    path = save_config(CONFIGS["ViT"], tmp_path / "tiny-tagged.json")
    for package in (clipfast, open_clip):
        package.add_model_config(path)
    entries = {
        "plain": pretrained._entry("org/plain half squash"),
        "quick": pretrained._entry("org/quick quick_gelu"),
    }
    monkeypatch.setattr(pretrained, "_table", lambda: {"tiny-tagged": entries})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-tagged", entries)
    for tag in entries:
        fill(cache, f"org/{tag}", open_clip_folder(tmp_path / tag, "ViT"))
    yield "tiny-tagged"
    clipfast.models.registry._CONFIGS.pop("tiny-tagged")


def test_a_tag(tagged, cache):
    open_clip = pytest.importorskip("open_clip")
    ours, _, preprocess = create_model_and_transforms(tagged, "plain", cache_dir=cache)
    theirs, _, their_preprocess = open_clip.create_model_and_transforms(tagged, "plain", cache_dir=str(cache))
    assert_same(ours, theirs, ours.config)
    # the tag's preprocessing takes precedence over the repository's
    assert ours.visual.preprocess_cfg | {"size": 32} == theirs.visual.preprocess_cfg | {"size": 32}
    assert ours.visual.image_mean == (0.5, 0.5, 0.5)
    assert_prepares_as(preprocess, their_preprocess)
    random = create_model(tagged, "plain", load_weights=False)
    assert not torch.equal(random.visual.proj, ours.visual.proj)


def test_weights_with_quick_gelu_make_a_model_with_quick_gelu(tagged, tmp_path, capsys):
    open_clip = pytest.importorskip("open_clip")
    with pytest.warns(UserWarning, match="the weights 'quick' of tiny-tagged were trained with QuickGELU"):
        ours = create_model(tagged, "quick")
    assert ours.config == quick(CONFIGS["ViT"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning is expected, since the activation is that of the weights
        assert create_model(tagged, "quick", force_quick_gelu=True).config == ours.config
    assert_same(ours, open_clip.create_model(tagged, "quick", force_quick_gelu=True), ours.config)
    info = convert_checkpoint(f"{tagged}:quick", tmp_path / "out.pt", "clipfast")
    assert (info.activation, info.interpolation) == ("QuickGELU", "bicubic")
    assert same_bits(tmp_path / "out.pt", ours)
    code, out, _ = run_command(capsys, "inspect-checkpoint", f"{tagged}:plain")
    assert (code, "0.5, 0.5, 0.5; 0.5, 0.5, 0.5" in out, "resize mode squash" in out) == (0, True, True)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-32", "laion3b", "ViT-B-32 has no such tag; its tags are openai, laion"),
        ("ViT-S-32", "openai", "ViT-S-32 has no such tag; it has no tags"),
        ("ViT-B-32", "openai", "timm/vit_base_patch32_clip_224.openai is not in .*, run: hf down"),
        ("hf-hub:org/none", None, "open_clip_config.json or config.json of hf-hub:org/none is not in the cache"),
        ("org/none", None, "org/none is no model .*, and as a repository: open_clip_config"),
        ("hf-hub:a/b/c", None, "hf-hub:a/b/c is no name of a repository, which is ORG/REPO"),
        ("hf-hub:org/bare", None, "_pytorch_model.bin of hf-hub:org/bare is not in the cache .*HF_HUB_OFFLINE is set"),
        ("hf-hub:org/siglip", None, "hf-hub:org/siglip: .*pool_type.*open_clip.create_model"),
        ("ViT-B-16-Unknown", None, "unknown model 'ViT-B-16-Unknown'.*open_clip.create_model.*apply_to_open_clip"),
        ("runs/weights.safetensors", None, "runs/weights.safetensors alone is no model: give the name of a model and"),
        ("./none", None, "there is no file or folder ./none"),
        ("runs/demo", None, "no runs/demo in the folder runs; a repository on the hub is hf-hub:runs/demo"),
    ],
)
@pytest.mark.filterwarnings("ignore:the weights 'openai'")
def test_what_is_missing(name, pretrained, message, cache, tmp_path, vit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/weights.safetensors").touch()
    config = vit.config.to_dict()
    for repository, changes in (("bare", {}), ("siglip", {"pool_type": "last"})):
        (tmp_path / repository).mkdir()
        described = {"model_cfg": config | {"text_cfg": config["text_cfg"] | changes}}
        (tmp_path / repository / "open_clip_config.json").write_text(json.dumps(described))
        fill(cache, f"org/{repository}", tmp_path / repository)
    if name == "hf-hub:org/bare":
        create_model(name, load_weights=False)  # without weights, the model needs no download of them
    with pytest.raises(ValueError, match=message):
        create_model(name, pretrained)


def test_without_the_package(monkeypatch, cache):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"config.json of hf-hub:org/tiny needs huggingface_hub, .*'clipfast\[hub\]'"):
        create_model("hf-hub:org/tiny")


def test_every_tag_is_that_of_open_clip():
    """For every model that clipfast builds, tags have the repositories, activations and preprocessing of OpenCLIP."""
    open_clip = pytest.importorskip("open_clip")
    built = set(clipfast.list_models()) & set(open_clip.list_models())
    assert len(built) > 40
    theirs = [pair for pair in open_clip.list_pretrained() if pair[0] in built]
    assert sorted(clipfast.list_pretrained()) == sorted(theirs)
    assert clipfast.list_pretrained(as_str=True) == [":".join(pair) for pair in clipfast.list_pretrained()]
    for model, tag in theirs:
        entry = dict(open_clip.pretrained.get_pretrained_cfg(model, tag))
        entry.pop("url")
        assert clipfast.get_pretrained_cfg(model, tag.upper().replace("_", "-")) == entry, (model, tag)
    tags = open_clip.list_pretrained_tags_by_model("ViT-B-32")
    assert sorted(clipfast.list_pretrained_tags_by_model("ViT-B-32")) == sorted(tags)
    expected = built.intersection(open_clip.list_pretrained_models_by_tag("openai"))
    assert set(clipfast.list_pretrained_models_by_tag("openai")) == expected
    assert clipfast.get_pretrained_cfg("ViT-B-32", "none") == clipfast.get_pretrained_cfg("none", "openai") == {}


def test_every_plain_model_of_open_clip_is_built():
    open_clip = pytest.importorskip("open_clip")
    built = 0
    for name in open_clip.list_models():
        try:
            config = clipfast.models.CLIPConfig.from_dict(open_clip.get_model_config(name))
        except ValueError:  # clipfast has no such tower
            continue
        assert clipfast.get_model_config(name) == config, name
        built += 1
    assert built > 40


def test_list_command(capsys):
    code, out, _ = run_command(capsys, "list-pretrained", "--model", "ViT-B/32", "--tag", "openai")
    assert (code, out.splitlines()[1].split()[0]) == (0, "ViT-B-32:openai")
    code, out, _ = run_command(capsys, "list-pretrained", "--json")
    listed = sorted((entry["model"], entry["tag"]) for entry in json.loads(out))
    assert listed == sorted(clipfast.list_pretrained())
    error = refusal_of(capsys, "list-pretrained", "--model", "RN101", "--tag", "laion")
    assert "known for RN101 laion; RN101 has the tags openai, yfcc15m" in error


def answer(status: int) -> object:
    """Return a stand-in for an HTTP response, with the attributes that errors of huggingface_hub read."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


def test_what_the_hub_answers(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    for error, message in (
        (errors.GatedRepoError("no", response=answer(403)), "private or gated: .*: hf auth login"),
        (errors.RemoteEntryNotFoundError("no", response=answer(404)), "^hf-hub:org/x has no a.bin or b$"),
        (RuntimeError("broken pipe"), "a.bin or b of hf-hub:org/x cannot be downloaded: broken pipe"),
    ):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=error))
        with pytest.raises(HubError, match=message):
            fetch("org/x", "a.bin", "b")


def test_a_hub_without_an_address_is_not_tried_again_and_again(monkeypatch, cache):
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("clipfast.checkpoints.hub.getproxies", lambda: {"no": "localhost"})
    monkeypatch.setattr("socket.getaddrinfo", Mock(side_effect=OSError("no such name")))
    monkeypatch.setattr(file_download, "get_hf_file_metadata", Mock(side_effect=AssertionError("asked the hub")))
    with pytest.raises(HubError, match=r"is not in the cache .* \(https://\S+ has no address here\)"):
        fetch("org/x", "a.bin", "b")


def test_no_other_file_is_downloaded_in_place_of_one_that_may_be_there(monkeypatch, tmp_path):
    """After a time-out for OpenCLIP's config, config.json is not tried: the repository would pass as transformers'."""
    import huggingface_hub
    from huggingface_hub import errors

    def download(repository, name, *, local_files_only=False, **options):
        """Stand in for a download from the hub: of a missing file, a cached file, or the first file, which fails."""
        if name == "missing" and not local_files_only:
            raise errors.RemoteEntryNotFoundError("no", response=answer(404))
        if local_files_only and name != "cached":
            raise errors.LocalEntryNotFoundError("not in the cache")
        if name == "first":
            raise failure
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for failure, message in (  # noqa: B007
        (TimeoutError("timed out"), "timed out"),
        (errors.LocalEntryNotFoundError("no cache"), "the hub cannot be reached"),
    ):
        assert fetch("org/x", "missing", "second") == tmp_path / "second"
        with pytest.raises(HubError, match=message):
            fetch("org/x", "first", "second")
        assert fetch("org/x", "first", "cached") == tmp_path / "cached"
