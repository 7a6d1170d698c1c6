"""The Hub's cache on a person's disk, laid by hand in huggingface_hub's layout."""

import hashlib
import json
import os
import shutil

import huggingface_hub

REVISION = "2c7f1f0b0d5a4a5cb0f6d5ee3a1a7a52b1f0c3d4"


def hub_cache(home, repo_id, folder, files=None, listing=False):
    """Lay a folder's files (all, or those named) into the cache below `home` as a download leaves them.

    Contents are in `blobs` by their hash, `snapshots/<revision>` links to them, `refs/main` names the revision.
    With `listing`, `trees/<revision>.json` names all files of the folder, as newer versions of huggingface_hub write it.
    Gives the snapshot's path.
    """
    repository = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    present = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for file in present if files is None else sorted(files):
        link, blob = snapshot / file, repository / "blobs" / blob_name(folder / file)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    if listing:
        (repository / "trees").mkdir()
        entries = {file: {"size": (folder / file).stat().st_size, "blob_id": "0" * 40} for file in present}
        content = {"format_version": 1, "files": entries}
        (repository / "trees" / f"{REVISION}.json").write_text(json.dumps(content))
    return snapshot


def blob_name(path):
    """The hash that a file is stored under: SHA-256 of a large one, Git's own of a text."""
    content = path.read_bytes()
    if path.suffix in (".safetensors", ".bin", ".model"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def use_cache(monkeypatch, home, offline=True):
    """Let the libraries, loaded already, work on the cache below `home`, as HF_HOME and HF_HUB_OFFLINE would."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)


def environment(home):
    """Variables for a process of its own that is to do so."""
    return os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
